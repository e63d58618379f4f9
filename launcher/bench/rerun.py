"""`omnilaunch rerun`: a plan from a record alone. Nothing of it is composed from conf/ again, but for what an override asks for.

The recorded spec stays as it is, key by key; where today's launcher would derive another value, the recorded one is taken. The ranks get
told what they must find again (contract.Expectation) and refuse anything else by its name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.bench.worktree import Tree, list_files
from launcher.config.compose import compose_over
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest
from launcher.image.stack import Image, load_stacks
from launcher.plan.commands import FOLDER_VARIABLE, RUN_VARIABLE, node_commands
from launcher.plan.plan import LocalContext, Plan, carry_over, make_plan
from launcher.record.record import OriginalRun
from launcher.record.recorded_run import RecordedRun
from launcher.redact import give_credentials, without_masked
from trainer.contract import SPEC_FILE, Expectation, TrainSpec, decode, facts_of, kind_of

# What a rerun may be said to differ in: --accept KIND.
FACTS = ("python", "package", "toolkit", "driver", "firmware", "device", "accelerator", "threads", "world_size", "variable", "determinism")
KINDS = ("code", "data", "weights", "image", *FACTS)
OF_THE_MACHINE = ("device", "driver", "firmware", "accelerator", "threads", "world_size")
OTHER_DEVICES = ("hardware", "cluster", "cluster.devices_per_node")
LOCKED = re.compile(r"^([A-Za-z0-9][\w.-]*)==", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """`project`: where the code lies. `notes`: what is worth saying before it starts."""

    plan: Plan
    project: Path
    original: OriginalRun
    notes: tuple[str, ...]


def accepted_kinds(texts: Sequence[str]) -> tuple[str, ...]:
    """Raises ConfigRefused for what is no kind of difference."""
    kinds = tuple(dict.fromkeys(kind for text in texts for kind in text.split(",") if kind))
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise ConfigRefused(f"--accept {wrong[0]}: {suggest(wrong[0], KINDS)}")
    return kinds


def plan_rerun(
    recorded: RecordedRun,
    overrides: tuple[str, ...],
    accepted: tuple[str, ...],
    tree: Tree,
    place: LocalContext,
    environ: Mapping[str, str],
    *,
    conf: Path,
    run_id: str,
) -> Rerun:
    """Raises ConfigRefused with all that stands in the way of the same run."""
    refuse_code(recorded, tree, accepted)
    before = recall(recorded, environ)
    config = compose_over(choose_anew(before, recorded, overrides), overrides, conf) if overrides else before
    stacks, place = load_stacks(tree.project / "images"), replace(place, project=tree.project)
    words = typed(recorded, overrides)
    then, now = (make_plan(each, stacks, place, run_id=run_id, overrides=words) for each in (before, config))
    if tree.from_image and now.image.stack == recorded.plan.image.stack:
        now = with_image(now, recorded.plan.image, place)
    spec = carry_spec(recorded, then.spec, now.spec)
    plan = replace(now, spec=spec, rerun_of=recorded.record.run_id, accepted=accepted, image_id=expected_image(recorded, now, accepted))
    plan = keep_environment(recorded, plan, then)
    expects = None if cannot_expect(recorded, tree) else expect(recorded, plan, accepted)
    return Rerun(
        plan=replace(plan, spec=replace(plan.spec, expects=expects)),
        project=tree.project,
        original=OriginalRun(folder=recorded.folder, older=tree.is_recorded),
        notes=(*describe_tree(recorded, tree), *describe_unknown(recorded, expects)),
    )


def with_image(plan: Plan, image: Image, place: LocalContext) -> Plan:
    """The plan with an image that is there already, in place of the one that this tree makes."""
    user = plan.config.cluster.user or place.user
    commands = node_commands(plan.config, image, plan.spec, interpreter=place.interpreter, user=user)
    return replace(plan, image=image, commands=commands)


def refuse_code(recorded: RecordedRun, tree: Tree, accepted: tuple[str, ...]) -> None:
    if tree.differs and "code" not in accepted:
        raise ConfigRefused(
            f"run {recorded.record.run_id} cannot be started as it was:\n"
            f"  code: this tree differs in {list_files(tree.differs)}\n  {tree.why}\n"
            "Bring the recorded code here; or take what is here, as another run: --accept code"
        )


def recall(recorded: RecordedRun, environ: Mapping[str, str]) -> Config:
    """The recorded config, with what its paths stood for: they were given as seen from another folder. cluster.root alone starts here."""
    config, spec = recorded.plan.config, recorded.plan.spec
    named = {key: getattr(spec.data, key) for key in ("train", "evaluation", "images") if getattr(config.data, key)}
    cluster = replace(config.cluster, delivery=without_masked(give_credentials(config.cluster.delivery, environ)))
    return replace(
        config,
        cluster=cluster,
        data=replace(config.data, **named),
        stage=replace(config.stage, checkpoint=spec.stage.checkpoint),
        model=replace(config.model, source=replace(config.model.source, path=spec.model.source.path)),
    )


def typed(recorded: RecordedRun, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The words that would launch it: those of the recorded run, and over them those of now."""
    named = {word.partition("=")[0] for word in overrides}
    return (*(word for word in recorded.plan.overrides if word.partition("=")[0] not in named), *overrides)


def choose_anew(config: Config, recorded: RecordedRun, overrides: tuple[str, ...]) -> Config:
    """For other devices the strategy is chosen anew, where nobody named one; the global batch stays what it was."""
    named = [word.partition("=")[0] for word in (*recorded.plan.overrides, *overrides)]
    other = any(key in OTHER_DEVICES or key.startswith("cluster.nodes") for key in (word.partition("=")[0] for word in overrides))
    if not other or any(key.partition(".")[0] == "strategy" for key in named):
        return config
    return replace(config, strategy=replace(config.strategy, name="auto", micro_batch=None))


def carry_spec(recorded: RecordedRun, then: TrainSpec, now: TrainSpec) -> TrainSpec:
    """The recorded spec with what the overrides change, in the place of the new run."""
    kept = carry_over(asdict(recorded.plan.spec), asdict(then), asdict(now))
    spec: TrainSpec = decode(TrainSpec, kept)
    return replace(spec, run_id=now.run_id, output=now.output, data=replace(spec.data, root=now.data.root), expects=None)


def keep_environment(recorded: RecordedRun, plan: Plan, then: Plan) -> Plan:
    """Variables that today's launcher sets otherwise than the recorded one did are set as they were, where no override asks for more."""
    variables_then, derived, now = (each.commands[0].environment for each in (recorded.plan, then, plan))
    of_the_place = {RUN_VARIABLE, FOLDER_VARIABLE} | {name for name, value in variables_then.items() if recorded.plan.spec.output in value}
    moved = {
        name: value
        for name, value in variables_then.items()
        if name not in of_the_place and derived.get(name) != value and now.get(name) == derived.get(name)
    }
    if not moved:
        return plan
    commands = tuple(replace(command, environment=dict(sorted({**command.environment, **moved}.items()))) for command in plan.commands)
    cluster = plan.config.cluster
    config = replace(plan.config, cluster=replace(cluster, environment={**cluster.environment, **moved}))
    return replace(plan, commands=commands, config=config)


def expected_image(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> str:
    """Where the same files make the same tag, the very image; '' where it is another one by intent."""
    same = plan.config.cluster.runtime == "docker" and plan.image.fingerprint == recorded.plan.image.fingerprint
    return recorded.record.image_id if same and "image" not in accepted else ""


# --------------------------------------------------------------------------------------------------------- what must be found


def cannot_expect(recorded: RecordedRun, tree: Tree) -> bool:
    """Whether the trainer is of before there were expectations, and would refuse to read them."""
    return tree.is_recorded and b'"expects"' not in (recorded.folder / SPEC_FILE).read_bytes()


def expect(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> Expectation:
    before, now = recorded.plan.spec, plan.spec
    same_data = without_root(before) == without_root(now) and before.stage.kind == now.stage.kind
    same_weights = (before.model.source, before.stage.checkpoint) == (now.model.source, now.stage.checkpoint)
    weights = recorded.inputs.weights if recorded.inputs and same_weights and "weights" not in accepted else {}
    return Expectation(
        run_id=recorded.record.run_id,
        data_sha256=recorded.record.data_sha256 if same_data and "data" not in accepted else "",
        weights=weights,
        facts=expected_facts(recorded, plan, accepted),
        free=tuple(f"variable {name}" for name in asked_variables(recorded, plan)),
    )


def without_root(spec: TrainSpec) -> object:
    return replace(spec.data, root="") if not spec.data.builtin else (spec.data.builtin, spec.data.train, spec.data.evaluation)


def expected_facts(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> dict[str, str]:
    """None on another kind of hardware or in another runtime, where all of them are others."""
    before, now = recorded.plan.config, plan.config
    if recorded.environment is None or before.hardware.name != now.hardware.name or before.cluster.runtime != now.cluster.runtime:
        return {}
    left_out = {*accepted, *(OF_THE_MACHINE if recorded.plan.spec.device != plan.spec.device or moved(recorded, plan) else ())}
    left_out |= {"determinism"} if recorded.plan.spec.deterministic != plan.spec.deterministic else set()
    locked = {normal(name) for name in LOCKED.findall(recorded.lock)} | {"torch"} if recorded.lock else None
    return {
        key: value
        for key, value in facts_of(recorded.environment).items()
        if kind_of(key) in FACTS
        and kind_of(key) not in left_out
        and (kind_of(key) != "package" or locked is None or normal(key.partition(" ")[2]) in locked)
    }


def moved(recorded: RecordedRun, plan: Plan) -> bool:
    """Whether other nodes were asked for."""
    nodes = [[node.host for node in config.cluster.working] for config in (recorded.plan.config, plan.config)]
    return nodes[0] != nodes[1]


def normal(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_variables(recorded: RecordedRun, plan: Plan) -> tuple[str, ...]:
    before, now = recorded.plan.commands[0].environment, plan.commands[0].environment
    return tuple(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


# ---------------------------------------------------------------------------------------------------------------- words


def describe_tree(recorded: RecordedRun, tree: Tree) -> tuple[str, ...]:
    if tree.is_recorded and tree.from_image:
        return (f"code: {tree.why}; used is the image of the record, {recorded.plan.image.tag}, which is still here",)
    if tree.is_recorded:
        return (f"code: {tree.why}; used is commit {recorded.source.commit[:12]}, in {tree.project}",)
    if tree.differs:
        return (f"code: accepted, this tree differs in {list_files(tree.differs)}; {tree.why}",)
    return ()


def describe_unknown(recorded: RecordedRun, expects: Expectation | None) -> tuple[str, ...]:
    """What nobody will look at, because the record or the code is of before it was."""
    if expects is None:
        return ("the recorded trainer does not check what it finds: hold the two runs against each other when it has ended",)
    named = recorded.plan.spec.stage.checkpoint or recorded.plan.spec.model.source.path
    return (f"the record has no hashes of the weights in {named}",) if named and recorded.inputs is None else ()
