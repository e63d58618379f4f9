"""`omnilaunch rerun`: a plan from a record alone. Nothing of it is composed from conf/ again, but for what an override asks for.

The recorded spec stays as it is, key by key; where today's launcher would derive another value, the recorded one is taken. The ranks get
told what they must find again (contract.Expectation) and refuse anything else by its name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.bench.worktree import Tree, describe_files
from launcher.config.compose import compose_over
from launcher.config.credentials import give_credentials, without_masked
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest
from launcher.image.stack import Image, load_stacks
from launcher.plan.commands import FOLDER_VARIABLE, RUN_VARIABLE, node_commands
from launcher.plan.plan import LocalContext, Plan, carry_over, make_plan
from launcher.record.reader import Archive
from launcher.record.record import Precedent
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
    precedent: Precedent
    notes: tuple[str, ...]


def accepted_kinds(texts: Sequence[str]) -> tuple[str, ...]:
    """Raises ConfigRefused for what is no kind of difference."""
    kinds = tuple(dict.fromkeys(kind for text in texts for kind in text.split(",") if kind))
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise ConfigRefused(f"--accept {wrong[0]}: {suggest(wrong[0], KINDS)}")
    return kinds


def plan_rerun(
    archive: Archive,
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
    refuse_code(archive, tree, accepted)
    before = recall(archive, environ)
    config = compose_over(choose_anew(before, archive, overrides), overrides, conf) if overrides else before
    stacks, place = load_stacks(tree.project / "images"), replace(place, project=tree.project)
    words = typed(archive, overrides)
    then, now = (make_plan(each, stacks, place, run_id=run_id, overrides=words) for each in (before, config))
    if tree.image_stands_in and now.image.stack == archive.plan.image.stack:
        now = with_image(now, archive.plan.image, place)
    spec = carry_spec(archive, then.spec, now.spec)
    plan = replace(now, spec=spec, rerun_of=archive.record.run_id, accepted=accepted, image_id=expected_image(archive, now, accepted))
    plan = keep_environment(archive, plan, then)
    expects = None if cannot_expect(archive, tree) else expect(archive, plan, accepted)
    return Rerun(
        plan=replace(plan, spec=replace(plan.spec, expects=expects)),
        project=tree.project,
        precedent=Precedent(folder=archive.folder, older=tree.is_recorded),
        notes=(*describe_tree(archive, tree), *describe_unknown(archive, expects)),
    )


def with_image(plan: Plan, image: Image, place: LocalContext) -> Plan:
    """The plan with an image that is there already, in place of the one that this tree makes."""
    user = plan.config.cluster.user or place.user
    commands = node_commands(plan.config, image, plan.spec, interpreter=place.interpreter, user=user)
    return replace(plan, image=image, commands=commands)


def refuse_code(archive: Archive, tree: Tree, accepted: tuple[str, ...]) -> None:
    if tree.differs and "code" not in accepted:
        raise ConfigRefused(
            f"run {archive.record.run_id} cannot be started as it was:\n"
            f"  code: this tree differs in {describe_files(tree.differs)}\n  {tree.why}\n"
            "Bring the recorded code here; or take what is here, as another run: --accept code"
        )


def recall(archive: Archive, environ: Mapping[str, str]) -> Config:
    """The recorded config, with what its paths stood for: they were given as seen from another folder. cluster.root alone starts here."""
    config, spec = archive.plan.config, archive.plan.spec
    named = {key: getattr(spec.data, key) for key in ("train", "evaluation", "images") if getattr(config.data, key)}
    cluster = replace(config.cluster, delivery=without_masked(give_credentials(config.cluster.delivery, environ)))
    return replace(
        config,
        cluster=cluster,
        data=replace(config.data, **named),
        stage=replace(config.stage, checkpoint=spec.stage.checkpoint),
        model=replace(config.model, source=replace(config.model.source, path=spec.model.source.path)),
    )


def typed(archive: Archive, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The words that would launch it: those of the recorded run, and over them those of now."""
    named = {word.partition("=")[0] for word in overrides}
    return (*(word for word in archive.plan.overrides if word.partition("=")[0] not in named), *overrides)


def choose_anew(config: Config, archive: Archive, overrides: tuple[str, ...]) -> Config:
    """For other devices the strategy is chosen anew, where nobody named one; the global batch stays what it was."""
    named = [word.partition("=")[0] for word in (*archive.plan.overrides, *overrides)]
    other = any(key in OTHER_DEVICES or key.startswith("cluster.nodes") for key in (word.partition("=")[0] for word in overrides))
    if not other or any(key.partition(".")[0] == "strategy" for key in named):
        return config
    return replace(config, strategy=replace(config.strategy, name="auto", micro_batch=None))


def carry_spec(archive: Archive, then: TrainSpec, now: TrainSpec) -> TrainSpec:
    """The recorded spec with what the overrides change, in the place of the new run."""
    kept = carry_over(asdict(archive.plan.spec), asdict(then), asdict(now))
    spec: TrainSpec = decode(TrainSpec, kept)
    return replace(spec, run_id=now.run_id, output=now.output, data=replace(spec.data, root=now.data.root), expects=None)


def keep_environment(archive: Archive, plan: Plan, then: Plan) -> Plan:
    """Variables that today's launcher sets otherwise than the recorded one did are set as they were, where no override asks for more."""
    recorded, derived, now = (each.commands[0].environment for each in (archive.plan, then, plan))
    of_the_place = {RUN_VARIABLE, FOLDER_VARIABLE} | {name for name, value in recorded.items() if archive.plan.spec.output in value}
    moved = {
        name: value
        for name, value in recorded.items()
        if name not in of_the_place and derived.get(name) != value and now.get(name) == derived.get(name)
    }
    if not moved:
        return plan
    commands = tuple(replace(command, environment=dict(sorted({**command.environment, **moved}.items()))) for command in plan.commands)
    cluster = plan.config.cluster
    config = replace(plan.config, cluster=replace(cluster, environment={**cluster.environment, **moved}))
    return replace(plan, commands=commands, config=config)


def expected_image(archive: Archive, plan: Plan, accepted: tuple[str, ...]) -> str:
    """Where the same files make the same tag, the very image; '' where it is another one by intent."""
    same = plan.config.cluster.runtime == "docker" and plan.image.fingerprint == archive.plan.image.fingerprint
    return archive.record.image_id if same and "image" not in accepted else ""


# --------------------------------------------------------------------------------------------------------- what must be found


def cannot_expect(archive: Archive, tree: Tree) -> bool:
    """Whether the trainer is of before there were expectations, and would refuse to read them."""
    return tree.is_recorded and b'"expects"' not in (archive.folder / SPEC_FILE).read_bytes()


def expect(archive: Archive, plan: Plan, accepted: tuple[str, ...]) -> Expectation:
    before, now = archive.plan.spec, plan.spec
    same_data = without_root(before) == without_root(now) and before.stage.kind == now.stage.kind
    same_weights = (before.model.source, before.stage.checkpoint) == (now.model.source, now.stage.checkpoint)
    weights = archive.inputs.weights if archive.inputs and same_weights and "weights" not in accepted else {}
    return Expectation(
        run_id=archive.record.run_id,
        data_sha256=archive.record.data_sha256 if same_data and "data" not in accepted else "",
        weights=weights,
        facts=expected_facts(archive, plan, accepted),
        free=tuple(f"variable {name}" for name in asked_variables(archive, plan)),
    )


def without_root(spec: TrainSpec) -> object:
    return replace(spec.data, root="") if not spec.data.builtin else (spec.data.builtin, spec.data.train, spec.data.evaluation)


def expected_facts(archive: Archive, plan: Plan, accepted: tuple[str, ...]) -> dict[str, str]:
    """None on another kind of hardware or in another runtime, where all of them are others."""
    before, now = archive.plan.config, plan.config
    if archive.environment is None or before.hardware.name != now.hardware.name or before.cluster.runtime != now.cluster.runtime:
        return {}
    left_out = {*accepted, *(OF_THE_MACHINE if archive.plan.spec.device != plan.spec.device or moved(archive, plan) else ())}
    left_out |= {"determinism"} if archive.plan.spec.deterministic != plan.spec.deterministic else set()
    locked = {normal(name) for name in LOCKED.findall(archive.lock)} | {"torch"} if archive.lock else None
    return {
        key: value
        for key, value in facts_of(archive.environment).items()
        if kind_of(key) in FACTS
        and kind_of(key) not in left_out
        and (kind_of(key) != "package" or locked is None or normal(key.partition(" ")[2]) in locked)
    }


def moved(archive: Archive, plan: Plan) -> bool:
    """Whether other nodes were asked for."""
    nodes = [[node.host for node in config.cluster.working] for config in (archive.plan.config, plan.config)]
    return nodes[0] != nodes[1]


def normal(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_variables(archive: Archive, plan: Plan) -> tuple[str, ...]:
    before, now = archive.plan.commands[0].environment, plan.commands[0].environment
    return tuple(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


# ---------------------------------------------------------------------------------------------------------------- words


def describe_tree(archive: Archive, tree: Tree) -> tuple[str, ...]:
    if tree.is_recorded and tree.image_stands_in:
        return (f"code: {tree.why}; used is the image of the record, {archive.plan.image.tag}, which is still here",)
    if tree.is_recorded:
        return (f"code: {tree.why}; used is commit {archive.source.commit[:12]}, in {tree.project}",)
    if tree.differs:
        return (f"code: accepted, this tree differs in {describe_files(tree.differs)}; {tree.why}",)
    return ()


def describe_unknown(archive: Archive, expects: Expectation | None) -> tuple[str, ...]:
    """What nobody will look at, because the record or the code is of before it was."""
    if expects is None:
        return ("the recorded trainer does not check what it finds: hold the two runs against each other when it has ended",)
    named = archive.plan.spec.stage.checkpoint or archive.plan.spec.model.source.path
    return (f"the record has no hashes of the weights in {named}",) if named and archive.inputs is None else ()
