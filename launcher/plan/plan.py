"""Config in, Plan out: everything a run will do, decided and written down before anything happens. Pure.

The trainer's spec, the DeepSpeed config and the per-node commands are all made here; `launch` carries out this very object.
"""

import json
import shlex
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.check.hardware import choose_kernels
from launcher.check.problem import Rule
from launcher.check.recipe import leaves_padding_out
from launcher.check.rules import RULES, Verdict, check
from launcher.check.strategy import explain_strategy, resolve
from launcher.check.suggestions import with_typed_hardware
from launcher.config.credentials import without_masked
from launcher.config.schema import Cluster, Config, Run
from launcher.errors import ConfigRefused, refuse_config
from launcher.image.stack import Image, Stack, render
from launcher.memory.deepspeed import render_deepspeed
from launcher.memory.estimate import Memory, estimate_memory
from launcher.memory.states import States, device_count, model_states, ranks_per_node, spreads, trainable_parameters, world_size
from launcher.plan.commands import NodeCommand, node_commands
from launcher.redact import mask_credentials
from trainer.contract import (
    SCHEMA,
    SINGLE_PROCESS_KINDS,
    Batch,
    DataSpec,
    DeviceSpec,
    Evaluation,
    ModelSpec,
    StageSpec,
    TrainSpec,
    decode,
    encode,
)

DATA_FOLDER = ".cache/data"
RUNS_FOLDER = "runs"
FIXED_THREADS = 4
LEAVING_S = 10  # of a server that has answered
# What the trainer is told unchanged, and by the same name, of config.run.
OF_THE_RUN = (
    *("seed", "deterministic", "steps", "save_every", "save_every_s", "keep_checkpoints", "keep_best", "checkpoint_background"),
    *("hang_timeout_s", "trackers", "profile"),
)


@dataclass(frozen=True, kw_only=True)
class LocalContext:
    """What a plan takes from the machine it is made on. `here`: where relative paths start; `user`: uid:gid for containers."""

    project: Path
    here: Path
    interpreter: str
    user: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    schema: int
    run_id: str
    config: Config
    verdict: Verdict
    states: States
    image: Image
    spec: TrainSpec
    commands: tuple[NodeCommand, ...]
    folder: str  # the launcher's own folder of the run: the nodes' where this machine is the node
    overrides: tuple[str, ...] = ()  # as the user typed them
    rerun_of: str = ""  # the run whose record this plan was made from
    accepted: tuple[str, ...] = ()  # kinds of differences from that one that the user took
    image_id: str = ""  # what the nodes' engines must have for the image; '' = any that was built from its files
    memory: Memory | None = None  # None in plans of before
    choice: str = ""  # why strategy and micro-batch are what they are

    @property
    def stop_limit_s(self) -> float:
        """How long the ranks may take to end when they are asked to; a server answers first what it has accepted."""
        serving = self.spec.stage.serving if self.spec.stage.kind == "serve" else None
        return max(self.config.run.stop_timeout_s, serving.drain_timeout_s + LEAVING_S if serving else 0)


def make_plan(
    config: Config,
    stacks: dict[str, Stack],
    place: LocalContext,
    *,
    run_id: str,
    overrides: tuple[str, ...] = (),
    rules: tuple[Rule, ...] = RULES,
    conf: Path | None = None,
) -> Plan:
    """Resolve the strategy, check, render the image, write the spec and the commands. `conf`: the folder that `config` was composed from
    with `overrides`, if it was; offered overrides that choose an axis are judged with it. Raises ConfigRefused with every problem at once;
    one that only prevents a launch (a module still to come, a licence to accept) is left in `verdict` for `launch` to refuse."""
    resolved, recompose = resolve(on_one_rank(config)), partial(compose_change, overrides, conf=conf) if conf else None
    verdict, config = check(resolved.asked, stacks, rules=rules, resolved=resolved, compose=recompose), resolved.config
    refuse(verdict, launching=False, overrides=overrides)
    image = render(
        stacks[config.hardware.stack],
        architecture=config.cluster.nodes[0].architecture,
        root=place.project,
        base=config.cluster.delivery.base,
    )
    spec = train_spec(config, place, run_id=run_id, overrides=overrides)
    return Plan(
        schema=SCHEMA,
        run_id=run_id,
        config=config,
        verdict=verdict,
        states=model_states(config),
        image=image,
        spec=spec,
        commands=node_commands(config, image, spec, interpreter=place.interpreter, user=config.cluster.user or place.user),
        folder=spec.output if all(node.is_local for node in config.cluster.working) else absolute(f"{RUNS_FOLDER}/{run_id}", place.here),
        overrides=overrides,
        memory=resolved.memory,
        choice=explain_strategy(resolved),
    )


def compose_change(overrides: tuple[str, ...], change: str, conf: Path) -> Config:
    """The config with an offered change in place of what was typed for the same keys. Raises ConfigRefused."""
    from launcher.config.compose import compose

    parts = shlex.split(change)
    keys = {part.partition("=")[0] for part in parts}
    kept = (override for override in overrides if override.partition("=")[0] not in keys)
    return on_one_rank(compose((*kept, *parts), conf))


def on_one_rank(config: Config) -> Config:
    """A stage that one process carries out takes the first node alone, and of that one device (two dies, where a job takes no fewer), or all
    that a model is spread over."""
    if not config.cluster.working or not (config.stage.kind in SINGLE_PROCESS_KINDS or spreads(config)):
        return config
    devices = device_count(config) if spreads(config) else config.hardware.device_multiple
    return replace(config, cluster=replace(config.cluster, nodes=config.cluster.working[:1], devices_per_node=devices))


def move_plan(plan: Plan, cluster: Cluster, stacks: dict[str, Stack], place: LocalContext) -> Plan:
    """The same run with the same image on other nodes, or with other networks. Raises ConfigRefused where it cannot work there."""
    config = replace(plan.config, cluster=cluster)
    # Addresses that were recorded without their credentials are missed only where the image has to be built, and there it is said.
    verdict = check(replace(config, cluster=replace(cluster, delivery=without_masked(cluster.delivery))), stacks)
    refuse(verdict, launching=True)
    before, after = (train_spec(each, place, run_id=plan.run_id, overrides=plan.overrides) for each in (plan.config, config))
    spec: TrainSpec = decode(TrainSpec, carry_over(asdict(plan.spec), asdict(before), asdict(after)))
    if plan.spec.expects is not None:  # of the ranks that are left nobody expects what all of them had
        spec = replace(spec, expects=replace(plan.spec.expects, facts={}) if before.device != after.device else plan.spec.expects)
    user = config.cluster.user or place.user
    commands = node_commands(config, plan.image, spec, interpreter=place.interpreter, user=user)
    return replace(
        plan, config=config, verdict=verdict, states=model_states(config), memory=estimate_memory(config), spec=spec, commands=commands
    )


def carry_over(kept: Any, before: Any, after: Any) -> Any:
    """`kept` with the changes from `before` to `after`: what a rerun has from its record stays, whatever would be derived today."""
    if before == after:
        return kept
    if isinstance(kept, dict) and isinstance(before, dict) and isinstance(after, dict):
        return {key: carry_over(kept.get(key, after[key]), before.get(key), after[key]) for key in after}
    return after


def refuse(verdict: Verdict, *, launching: bool, overrides: tuple[str, ...] = ()) -> None:
    """Raise ConfigRefused with all problems that stand in the way of the plan, or of its launch. `overrides`: as typed, which the changes
    that are named go along with."""
    standing = [with_typed_hardware(problem, overrides) for problem in verdict.problems if launching or not problem.launch_only]
    if standing:
        heading = "this cannot work:" if len(standing) == 1 else f"this cannot work, for {len(standing)} reasons:"
        refuse_config("\n".join((heading, *map(str, standing))), (problem.key for problem in standing))


def train_spec(config: Config, place: LocalContext, *, run_id: str, overrides: tuple[str, ...] = ()) -> TrainSpec:
    """What the trainer is told. Paths become absolute: below `cluster.root` for the run, below `here` for what the user names."""
    root = absolute(config.cluster.root, place.here)
    ranks = world_size(config)
    batch = divide(config, ranks)
    return TrainSpec(
        schema=SCHEMA,
        run_id=run_id,
        output=str(PurePosixPath(root) / RUNS_FOLDER / run_id),
        gradient_checkpointing=bool(config.strategy.gradient_checkpointing),
        model=model_spec(config, place),
        stage=stage_spec(config, place),
        precision=config.precision,
        evaluation=evaluation_of(config, place),
        optimizer=config.stage.optimizer,
        batch=batch,
        data=data_spec(config, place, root),
        device=DeviceSpec(
            accelerator=config.hardware.accelerator,
            backend=config.hardware.collectives,
            world_size=ranks,
            devices_per_node=ranks_per_node(config),
            cards=device_count(config) // ranks_per_node(config),
            threads=count_threads(config),
            timeout_s=config.run.collective_timeout_s,
        ),
        deepspeed=render_deepspeed(
            config.strategy, config.precision, config.stage.optimizer, batch, world_size=ranks, trained=trainable_parameters(config)
        ),
        loss_chunk=config.strategy.loss_chunk,
        checkpoint_every=config.strategy.checkpoint_every,
        checkpoint_groups=config.strategy.checkpoint_groups,
        trackers_named=names_trackers(config, overrides),
        kernels=choose_kernels(config),
        **{name: getattr(config.run, name) for name in OF_THE_RUN},
    )


def count_threads(config: Config) -> int:
    """Of each rank; 0 = torch decides, by the processors of the machine that it finds itself on, which a deterministic run must not."""
    return config.hardware.threads or (FIXED_THREADS if config.run.deterministic else 0)


def names_trackers(config: Config, overrides: tuple[str, ...]) -> bool:
    """Whether somebody asked for the run's trackers: what is only the default stops no run where it is not installed."""
    return config.run.trackers != Run.trackers or any(override.startswith("run.trackers") for override in overrides)


def divide(config: Config, ranks: int) -> Batch:
    """The one place where the global batch is divided; `check` has made sure that it can be."""
    micro = 1 if config.strategy.micro_batch is None else config.strategy.micro_batch
    return Batch(
        global_batch=config.stage.global_batch,
        micro_batch=micro,
        accumulation=max(1, config.stage.global_batch // (micro * ranks)),
    )


def model_spec(config: Config, place: LocalContext) -> ModelSpec:
    model = config.model
    source = replace(model.source, path=absolute(model.source.path, place.here)) if model.source.path else model.source
    return ModelSpec(
        name=model.name,
        family=model.family,
        source=source,
        architecture=asdict(model.architecture),
        groups=model.groups,
        image_token=model.image_token,
        template=model.template,
        attention=config.hardware.capability.attention[0],
    )


def stage_spec(config: Config, place: LocalContext) -> StageSpec:
    stage, inference = config.stage, config.stage.inference
    if inference is not None:
        image, rows = (absolute(path, place.here) if path else "" for path in (inference.image, inference.input))
        inference = replace(inference, image=image, input=rows)
    return StageSpec(
        name=stage.name,
        kind=stage.kind,
        trainable=stage.trainable,
        lora=stage.lora,
        checkpoint=absolute(stage.checkpoint, place.here) if stage.checkpoint else "",
        reset=stage.reset,
        needs=tuple(group for group in stage.needs if group in config.model.groups),
        merging=stage.merging,
        conversion=stage.conversion,
        quantization=stage.quantization,
        inference=inference,
        serving=stage.serving,
    )


def evaluation_of(config: Config, place: LocalContext) -> Evaluation:
    evaluation = config.run.evaluation
    return replace(evaluation, base=absolute(evaluation.base, place.here)) if evaluation.base else evaluation


def data_spec(config: Config, place: LocalContext, root: str) -> DataSpec:
    data = config.data
    named = {key: absolute(getattr(data, key), place.here) if getattr(data, key) else "" for key in ("train", "evaluation", "images")}
    return DataSpec(
        name=data.name,
        builtin=data.builtin,
        root=str(PurePosixPath(root) / DATA_FOLDER),
        max_length=data.max_length,
        workers=data.workers,
        packing=data.packing,
        length_aware=data.length_aware,
        max_pixels=data.max_pixels,
        max_tiles=data.max_tiles,
        padding_free=leaves_padding_out(config),
        **named,
    )


def absolute(path: str, here: Path) -> str:
    """An absolute POSIX path without `.` and `..`; `~` is refused, since it means another folder on every node."""
    if path.startswith("~"):
        raise ConfigRefused(f"the path {path!r} starts with '~', which is another folder on every node: write it out")
    parts: list[str] = []
    for part in (PurePosixPath(here.as_posix()) / path).parts:
        if part == "..":
            parts = parts[:-1] or parts
        else:
            parts.append(part)
    return str(PurePosixPath(*parts))


def to_plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data, without credentials in URLs: they are in memory alone."""
    plain: dict[str, Any] = mask_credentials(asdict(plan))
    return plain


def encode_spec(spec: TrainSpec, *, like: Path | None) -> str:
    """Whole; or without the keys that `like` does not have and that are as if they were not there, since each trainer refuses keys that it
    does not know."""
    if like is None:
        return encode(spec)
    return json.dumps(leave_out(spec, json.loads(like.read_text(encoding="utf-8"))), indent=2, ensure_ascii=False) + "\n"


def leave_out(value: Any, like: Any) -> Any:
    if not (is_dataclass(value) and isinstance(like, dict)):
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    kept = {}
    for each in fields(value):
        now = getattr(value, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if each.name in like or now != default:
            kept[each.name] = leave_out(now, like.get(each.name))
    return kept
