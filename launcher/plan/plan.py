"""From a config to a Plan: everything a run will do, decided and written down before anything happens. Pure.

The trainer's spec, the DeepSpeed config and the commands of the nodes are made here; `launch` carries out exactly this object.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.check.hardware import choose_kernels
from launcher.check.problem import Problem, Rule
from launcher.check.recipe import leaves_padding_out
from launcher.check.rules import RULES, Verdict, check, offering
from launcher.check.strategy import explain_strategy
from launcher.check.suggestions import with_typed_hardware
from launcher.config.compose import compose as compose_files
from launcher.config.conf_folder import ConfFolder
from launcher.config.credentials import without_masked
from launcher.config.defaults import keys_of, without_keys
from launcher.config.schema import Cluster, Config, Run
from launcher.errors import ConfigRefused, refuse_config
from launcher.image.licence import AcceptedLicence
from launcher.image.stack import Image, Stack, render
from launcher.memory.deepspeed import render_deepspeed
from launcher.memory.estimate import Memory, estimate_memory
from launcher.memory.states import States, device_count, model_states, ranks_per_node, spreads, trainable_parameters, world_size
from launcher.memory.tokens import bound_of_questions, resolve_context
from launcher.plan.accepted import take_licence
from launcher.plan.commands import NodeCommand, node_commands
from launcher.plan.data.rows import spec_files
from launcher.plan.host_memory import judge
from launcher.plan.machine import Machine, machine_rules
from launcher.plan.stop_limit import stop_limit_s
from launcher.redact import mask_credentials
from trainer.contract import (
    SCHEMA,
    SINGLE_PROCESS_KINDS,
    Batch,
    DataSpec,
    DeviceSpec,
    ModelSpec,
    Source,
    StageSpec,
    TrainSpec,
    decode,
    encode,
)

DATA_FOLDER = ".cache/data"
RUNS_FOLDER = "runs"
FIXED_THREADS = 4
# Keys of the config that the trainer's spec takes over unchanged, under the same name.
MODEL_KEYS = ("name", "family", "groups", "image_token", "template", "add_tokens", "chat_template")
STAGE_KEYS = (
    *("name", "kind", "trainable", "lora", "reset", "merging", "conversion", "quantization"),
    *("label_smoothing", "neftune_alpha"),
)
ROW_KEYS = (
    *("bad_rows", "too_long", "unmarked", "turns", "learn", "truncated_images", "boxes", "reasoning", "question", "system", "image_place"),
)
DATA_KEYS = ("name", "builtin", "max_length", "workers", "packing", "length_aware", "max_tiles", "augmentation", *ROW_KEYS)
RUN_KEYS = (
    *("seed", "deterministic", "steps", "save_every", "save_every_s", "keep_checkpoints", "keep_best", "checkpoint_background"),
    *("hang_timeout_s", "trackers", "profile", "early_stop"),
)


@dataclass(frozen=True, kw_only=True)
class LocalContext:
    """What a plan takes from the machine it is made on. `here`: the folder that relative paths start in; `user`: uid:gid for containers.
    `machine`: what it has, None = not asked; `accepted`: licences that the user has accepted here, SHA-256 -> when; `memory_bytes`: of the
    machine, 0 = not known."""

    project: Path
    here: Path
    interpreter: str
    user: str
    machine: Machine | None = None
    accepted: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int = 0


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
    folder: str  # the run's folder on the launcher's machine; a local run has no other
    overrides: tuple[str, ...] = ()  # as the user typed them
    rerun_of: str = ""  # the run whose record this plan was made from
    accepted: tuple[str, ...] = ()  # kinds of differences from that run that the user accepted
    image_id: str = ""  # the id that the image must have on the nodes; '' = any image that was built from its files
    memory: Memory | None = None  # None in plans of earlier versions
    choice: str = ""  # the reason for strategy and micro-batch
    settled: str = ""  # what the plan lowered because the user left it open; '' = nothing
    conf: str = ""  # the user's own folder of axis files (--conf), absolute
    files: tuple[str, ...] = ()  # that the config was composed from: conf/stage/lora.yaml, or the whole path of one of the user's own
    licence: AcceptedLicence | None = None  # of the image; None where there is none to accept, or it is not accepted yet

    @property
    def is_local(self) -> bool:
        """Whether the run is on the launcher's own machine: nothing is copied to or from a node."""
        return self.config.cluster.is_local

    @property
    def options(self) -> tuple[str, ...]:
        """Of the commands that compose this config again."""
        return ("--conf", self.conf) if self.conf else ()

    @property
    def container_user(self) -> str:
        """uid:gid of the containers; '' for the process runtime, and in plans of versions that did not record it."""
        container = self.commands[0].container
        return container.user if container else self.config.cluster.user

    @property
    def stop_limit_s(self) -> float:
        """How long the ranks may take to save and end when they are asked to, apart from their steps."""
        return stop_limit_s(self.config, self.states)


def make_plan(
    config: Config,
    stacks: dict[str, Stack],
    local: LocalContext,
    *,
    run_id: str,
    overrides: tuple[str, ...] = (),
    rules: tuple[Rule, ...] = RULES,
    conf: Path | ConfFolder | None = None,
    compose: Callable[[Sequence[str]], Config] | None = None,
    accepts: Callable[[str], bool] = bool,
) -> Plan:
    """Resolve the strategy, check, render the image, write the spec and the commands. `compose`, or the files of `conf`, made `config` of
    `overrides`; offered overrides that choose an axis are judged with it, and only those that the command `accepts` are offered. Raises
    ConfigRefused with every problem at once; one that only prevents a launch (a licence to accept) is left in `verdict` for `launch` to refuse."""
    config, licence = take_licence(config, stacks, local.accepted)
    again = compose or (partial(compose_files, conf=conf) if conf else None)
    recompose, rules = partial(compose_change, overrides, compose=again) if again else None, (*rules, *machine_rules(local.machine))
    verdict, resolved, settled = judge(on_one_rank(config), stacks, rules, recompose, local.memory_bytes, overrides)
    config = resolved.config
    refuse(verdict := offering(verdict, accepts), launching=False, overrides=overrides)
    stack, cluster = stacks[config.hardware.stack], config.cluster
    image = render(stack, architecture=cluster.nodes[0].architecture, root=local.project, base=cluster.delivery.base)
    spec = train_spec(config, local, run_id=run_id, overrides=overrides)
    return Plan(
        schema=SCHEMA,
        run_id=run_id,
        config=config,
        verdict=verdict,
        states=model_states(config),
        image=image,
        spec=spec,
        commands=node_commands(config, image, spec, interpreter=local.interpreter, user=config.cluster.user or local.user),
        folder=spec.output if config.cluster.is_local else absolute(f"{RUNS_FOLDER}/{run_id}", local.here),
        overrides=overrides,
        memory=resolved.memory,
        choice=explain_strategy(resolved),
        settled=settled,
        licence=licence,
    )


def with_files(plan: Plan, conf: ConfFolder, files: Sequence[Path]) -> Plan:
    """The plan with the files that its config was composed from. A note names each of the user's own that hides one of the project."""
    notes = tuple(
        f"{file.parent.name}={file.stem} is {file}, in place of the project's file of this name"
        for file in files
        if conf.is_shadowing(file)
    )
    verdict = replace(plan.verdict, notes=(*notes, *plan.verdict.notes))
    return replace(plan, conf=str(conf.own or ""), files=tuple(map(conf.relative, files)), verdict=verdict)


def compose_change(overrides: tuple[str, ...], change: str, compose: Callable[[Sequence[str]], Config]) -> Config:
    """The config with an offered change in place of what was typed for the same keys. Raises ConfigRefused."""
    parts = shlex.split(change)
    return on_one_rank(compose((*without_keys(overrides, keys_of(parts)), *parts)))


def on_one_rank(config: Config) -> Config:
    """The config with one node and as few devices as possible, for a stage that one process carries out: one device (both dies of a module,
    where a job cannot take fewer), or all that a model is spread over. Other stages: the config unchanged."""
    if not config.cluster.working or not (config.stage.kind in SINGLE_PROCESS_KINDS or spreads(config)):
        return config
    devices = device_count(config) if spreads(config) else config.hardware.device_multiple
    return replace(config, cluster=replace(config.cluster, nodes=config.cluster.working[:1], devices_per_node=devices))


def move_plan(plan: Plan, cluster: Cluster, stacks: dict[str, Stack], local: LocalContext) -> Plan:
    """The same run with the same image on other nodes, or with other networks. Raises ConfigRefused where it cannot work there."""
    config = replace(plan.config, cluster=cluster)
    # Addresses that were recorded without their credentials matter only when the image is built, and are refused there.
    verdict = check(replace(config, cluster=replace(cluster, delivery=without_masked(cluster.delivery))), stacks)
    refuse(verdict, launching=True)
    before, after = (train_spec(each, local, run_id=plan.run_id, overrides=plan.overrides) for each in (plan.config, config))
    spec: TrainSpec = decode(TrainSpec, carry_over(asdict(plan.spec), asdict(before), asdict(after)))
    if plan.spec.expects is not None:  # facts that were recorded for all ranks do not hold for the remaining ones
        spec = replace(spec, expects=replace(plan.spec.expects, facts={}) if before.device != after.device else plan.spec.expects)
    user = config.cluster.user or local.user
    commands = node_commands(config, plan.image, spec, interpreter=local.interpreter, user=user)
    return replace(
        plan, config=config, verdict=verdict, states=model_states(config), memory=estimate_memory(config), spec=spec, commands=commands
    )


def with_container_options(plan: Plan, local: LocalContext) -> Plan:
    """The plan with the options of its containers, which plans of earlier versions do not hold: their commands are made again."""
    if plan.config.cluster.runtime != "docker" or all(command.container for command in plan.commands):
        return plan
    user = plan.config.cluster.user or local.user
    return replace(plan, commands=node_commands(plan.config, plan.image, plan.spec, interpreter=local.interpreter, user=user))


def with_problems(plan: Plan, problems: tuple[Problem, ...]) -> Plan:
    """The plan with more problems that prevent its launch, such as a file that is not there."""
    verdict = plan.verdict
    found = (*verdict.problems, *problems)
    return replace(plan, verdict=replace(verdict, problems=found, launchable=not found)) if problems else plan


def carry_over(kept: Any, before: Any, after: Any) -> Any:
    """`kept` with the changes from `before` to `after`: a rerun keeps the values of its record, even where other ones would be derived today."""
    if before == after:
        return kept
    if isinstance(kept, dict) and isinstance(before, dict) and isinstance(after, dict):
        return {key: carry_over(kept.get(key, after[key]), before.get(key), after[key]) for key in after}
    return after


def refuse(verdict: Verdict, *, launching: bool, overrides: tuple[str, ...] = ()) -> None:
    """Raise ConfigRefused with all problems that prevent the plan, or its launch. `overrides`: as typed; the changes that are offered
    take them into account."""
    standing = [with_typed_hardware(problem, overrides) for problem in verdict.problems if launching or not problem.launch_only]
    if standing:
        heading = "this cannot work:" if len(standing) == 1 else f"this cannot work, for {len(standing)} reasons:"
        refuse_config("\n".join((heading, *map(str, standing))), (problem.key for problem in standing))


def train_spec(config: Config, local: LocalContext, *, run_id: str, overrides: tuple[str, ...] = ()) -> TrainSpec:
    """The trainer's spec. Paths become absolute: below `cluster.root` for the run, below `here` for paths that the user gives."""
    root = absolute(config.cluster.root, local.here)
    ranks = world_size(config)
    batch = divide(config, ranks)
    return TrainSpec(
        schema=SCHEMA,
        run_id=run_id,
        output=str(PurePosixPath(root) / RUNS_FOLDER / run_id),
        gradient_checkpointing=bool(config.strategy.gradient_checkpointing),
        model=model_spec(config, local),
        stage=stage_spec(config, local),
        precision=config.precision,
        evaluation=replace(config.run.evaluation, base=absolute_if_set(config.run.evaluation.base, local)),
        optimizer=config.stage.optimizer,
        batch=batch,
        data=data_spec(config, local, root),
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
        **{name: getattr(config.run, name) for name in RUN_KEYS},
    )


def count_threads(config: Config) -> int:
    """CPU threads of each rank; 0 = torch's default, which depends on the machine and is therefore not used by a deterministic run."""
    return config.hardware.threads or (FIXED_THREADS if config.run.deterministic else 0)


def names_trackers(config: Config, overrides: tuple[str, ...]) -> bool:
    """Whether the user named the trackers: a missing package is an error only for these, not for the default."""
    return config.run.trackers != Run.trackers or any(override.startswith("run.trackers") for override in overrides)


def divide(config: Config, ranks: int) -> Batch:
    """The one place where the global batch is divided; `check` has already verified that it divides."""
    micro = 1 if config.strategy.micro_batch is None else config.strategy.micro_batch
    return Batch(
        global_batch=config.stage.global_batch, micro_batch=micro, accumulation=max(1, config.stage.global_batch // (micro * ranks))
    )


def model_spec(config: Config, local: LocalContext) -> ModelSpec:
    model = config.model
    return ModelSpec(
        source=trainer_source(config, local),
        architecture=asdict(model.architecture),
        attention=config.hardware.capability.attention[0],
        **{name: getattr(model, name) for name in MODEL_KEYS},
    )


def trainer_source(config: Config, local: LocalContext) -> Source:
    """What the trainer knows of the source: a repository of ModelScope is a folder for it."""
    source = config.model.source
    path, kind = absolute_if_set(source.path, local), source.kind
    return Source(kind="path" if kind == "modelscope" else kind, id=source.id, revision=source.revision, path=path)


def stage_spec(config: Config, local: LocalContext) -> StageSpec:
    stage, inference, serving = config.stage, config.stage.inference, config.stage.serving
    context = resolve_context(config)  # what the memory is judged for is what the trainer accepts
    if inference is not None:
        image, questions = (absolute_if_set(path, local) for path in (inference.image, inference.input))
        inference = replace(inference, context=context, image=image, input=questions)
    if serving is not None:
        serving = replace(serving, context=context)
    return StageSpec(
        checkpoint=absolute_if_set(stage.checkpoint, local),
        base=absolute_if_set(stage.base, local),
        needs=tuple(group for group in stage.needs if group in config.model.groups),
        inference=inference,
        serving=serving,
        **{name: getattr(stage, name) for name in STAGE_KEYS},
    )


def data_spec(config: Config, local: LocalContext, root: str) -> DataSpec:
    data = config.data
    return DataSpec(
        root=str(PurePosixPath(root) / DATA_FOLDER),
        padding_free=leaves_padding_out(config),
        rows=data.rows if config.run.epochs is not None else 0,
        max_pixels=data.max_pixels or bound_of_questions(config),
        **{name: getattr(data, name) for name in DATA_KEYS},
        **spec_files(config, partial(absolute, here=local.here)),
    )


def absolute_if_set(path: str, local: LocalContext) -> str:
    return absolute(path, local.here) if path else ""


def absolute(path: str, here: Path) -> str:
    """An absolute POSIX path without `.` and `..`; `~` is refused, since it may be a different folder on each node."""
    if path.startswith("~"):
        raise ConfigRefused(f"the path {path!r} starts with '~', which may be a different folder on each node: write the whole path")
    parts: list[str] = []
    for part in (PurePosixPath(here.as_posix()) / path).parts:
        if part == "..":
            parts = parts[:-1] or parts
        else:
            parts.append(part)
    return str(PurePosixPath(*parts))


def to_plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data, with credentials in URLs masked: they are only kept in memory."""
    plain: dict[str, Any] = mask_credentials(asdict(plan))
    return plain


def plan_json(plan: Plan) -> str:
    return json.dumps(to_plain(plan), indent=2, ensure_ascii=False)


def encode_spec(spec: TrainSpec, *, like: Path | None) -> str:
    """The spec as JSON. With `like`, a spec that an older trainer wrote: without the keys that `like` lacks and that have their default value
    here, since a trainer refuses unknown keys."""
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
