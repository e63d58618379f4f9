"""`omnilaunch rerun`: makes a plan from a record. Nothing is composed from conf/ again, except what an override asks for.

The recorded spec is kept key by key: where this version of the launcher would derive another value, the recorded one is used. The spec
tells the ranks what they must find again (contract.Expectation), and they refuse to start if anything differs.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from packaging.utils import canonicalize_name

from launcher.bench.worktree import Tree, list_files
from launcher.config.compose import choose_runtime, compose_over
from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.config.credentials import give_credentials, without_masked
from launcher.config.defaults import EPOCHS, keys_of, with_short_warmup, without_keys
from launcher.config.schema import AXES, Config
from launcher.config.variable import describe_variables
from launcher.errors import ConfigRefused, suggest
from launcher.image.stack import Image, Stack, load_stacks
from launcher.plan.commands import FOLDER_VARIABLE, RUN_VARIABLE, node_commands
from launcher.plan.data.rows import find_rows, settle_rows
from launcher.plan.plan import LocalContext, Plan, carry_over, make_plan
from launcher.record.checkpoint.checkpoint_config import find_differences, find_runs
from launcher.record.checkpoint.checkpoint_record import read_checkpoint
from launcher.record.checkpoint_reference import KEYS, locate_checkpoint, resolve_base, use_checkpoint, with_full_ids
from launcher.record.record import OriginalRun
from launcher.record.recorded_run import RecordedRun
from launcher.weights.source import with_weights_folder
from trainer.contract import SPEC_FILE, Expectation, TrainSpec, decode, facts_of, kind_of

# Kinds of differences that --accept allows.
FACTS = ("python", "package", "toolkit", "driver", "firmware", "device", "accelerator", "threads", "world_size", "variable", "determinism")
KINDS = ("code", "data", "weights", "image", *FACTS)
OF_THE_MACHINE = ("device", "driver", "firmware", "accelerator", "threads", "world_size")
DURATION = frozenset(("run.steps", EPOCHS))  # only one of them
BATCH, MICRO_BATCH = "stage.global_batch", "strategy.micro_batch"
RANK_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")  # set by torchrun; the last one only where it is not set
# What this machine has for a config, added to its context: launcher.plan.local_context.context_for.
ContextFor = Callable[[Config, Mapping[str, Stack], Path], LocalContext]
OTHER_DEVICES = ("hardware", "cluster", "cluster.devices_per_node")
LOCKED = re.compile(r"^([A-Za-z0-9][\w.-]*)==", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """`project`: the folder with the code. `notes`: to be printed before it starts."""

    plan: Plan
    project: Path
    original: OriginalRun
    notes: tuple[str, ...]


def accepted_kinds(texts: Sequence[str], known: Sequence[str] = KINDS) -> tuple[str, ...]:
    """The values of --accept. `known`: the kinds of the verb. Raises ConfigRefused for another one."""
    kinds = tuple(dict.fromkeys(kind for text in texts for kind in text.split(",") if kind))
    wrong = [kind for kind in kinds if kind not in known]
    if wrong:
        raise ConfigRefused(f"--accept {wrong[0]}: {suggest(wrong[0], known)}")
    return kinds


def plan_rerun(
    recorded: RecordedRun,
    overrides: tuple[str, ...],
    accepted: tuple[str, ...],
    tree: Tree,
    place: LocalContext,
    environ: Mapping[str, str],
    *,
    conf: Path | ConfFolder,
    run_id: str,
    context_for: ContextFor | None = None,
) -> Rerun:
    """Raises ConfigRefused with everything that prevents the same run. `context_for`: asks this machine what the rerun needs, in place of
    `place`; without it, nothing is asked."""
    refuse_code(recorded, tree, accepted)
    before = recorded_config(recorded, environ)
    overrides = with_full_ids(overrides, *find_runs(before, place.here))
    config = config_again(before, recorded, overrides, place, environ, conf)
    stacks, place = load_stacks(tree.project / "images"), replace(place, project=tree.project)
    words = (*kept_overrides(recorded, overrides), *overrides)
    asked = replace(context_for(config, stacks, tree.project), project=tree.project) if context_for else place
    then, now = (make_plan(each, stacks, at, run_id=run_id, overrides=words) for each, at in ((before, place), (config, asked)))
    if tree.from_image and now.image.stack == recorded.plan.image.stack:
        now = with_image(now, recorded.plan.image, place)
    spec = carry_spec(recorded, then.spec, now.spec)
    plan = replace(now, spec=spec, rerun_of=recorded.record.run_id, accepted=accepted, image_id=expected_image(recorded, now, accepted))
    plan = with_recorded_files(keep_environment(recorded, plan, then), recorded.plan, overrides, conf)
    # A recorded trainer that is older than expectations would refuse a spec with them.
    older = tree.is_recorded and b'"expects"' not in (recorded.folder / SPEC_FILE).read_bytes()
    expects = None if older else expect(recorded, plan, accepted)
    notes = (*describe_tree(recorded, tree), *describe_batch(recorded.plan, plan), *describe_unknown(recorded, expects))
    return Rerun(
        plan=replace(plan, spec=replace(plan.spec, expects=expects)),
        project=tree.project,
        original=OriginalRun(folder=recorded.folder, older=tree.is_recorded),
        notes=(*notes, *describe_resumptions(recorded), *describe_variables(environ, plan.config, words)),
    )


def config_again(
    before: Config,
    recorded: RecordedRun,
    overrides: tuple[str, ...],
    place: LocalContext,
    environ: Mapping[str, str],
    conf: Path | ConfFolder,
) -> Config:
    """The recorded config with the overrides, with the runtime and the weights that they bring about."""
    config = change_config(before, recorded, overrides, place, conf) if overrides else before
    config = start_again(config, overrides, place.here)
    config = choose_runtime_again(config, recorded, overrides)
    if any(word.startswith("model") for word in overrides):  # otherwise the source is the recorded one
        config = with_weights_folder(config, environ)
    return config


def kept_overrides(recorded: RecordedRun, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The recorded overrides that no new one replaces."""
    given = keys_of(overrides)
    given |= DURATION if given & DURATION else frozenset()
    return without_keys(recorded.plan.overrides, given)


def with_recorded_files(plan: Plan, before: Plan, overrides: Sequence[str], conf: Path | ConfFolder) -> Plan:
    """The plan with the files that its config was composed from: those of the record, except for an axis that an override chooses again. The
    user's own folder is that of `conf`, or the recorded one if it is on this machine."""
    folder = as_conf_folder(conf)
    chosen = {axis: name for axis, _, name in (word.partition("=") for word in overrides) if axis in AXES}
    kept = (file for file in before.files if Path(file).parent.name not in chosen)
    own = str(folder.own) if folder.own else before.conf if os.access(before.conf, os.R_OK) else ""
    return replace(plan, conf=own, files=(*kept, *(folder.describe(axis, name) for axis, name in chosen.items())))


def with_image(plan: Plan, image: Image, place: LocalContext) -> Plan:
    """The plan with the recorded image in place of the one that this tree makes."""
    user = plan.config.cluster.user or place.user
    commands = node_commands(plan.config, image, plan.spec, interpreter=place.interpreter, user=user)
    return replace(plan, image=image, commands=commands)


def refuse_code(recorded: RecordedRun, tree: Tree, accepted: tuple[str, ...]) -> None:
    if tree.differs and "code" not in accepted:
        raise ConfigRefused(
            f"run {recorded.record.run_id} cannot be started as it was:\n"
            f"  code: this tree differs in {list_files(tree.differs)}\n  {tree.why}\n"
            "Check out the recorded code; or run this code, which makes it another run: --accept code"
        )


def recorded_config(recorded: RecordedRun, environ: Mapping[str, str]) -> Config:
    """The recorded config with absolute paths, since relative ones were given in another folder. cluster.root is relative to this folder."""
    config, spec = recorded.plan.config, recorded.plan.spec
    named = {key: getattr(spec.data, key) for key in ("train", "evaluation", "images") if getattr(config.data, key)}
    delivery = without_masked(give_credentials(config.cluster.delivery, environ))
    licence = recorded.plan.licence
    if licence and licence.is_stored:  # of the user who made the record; the one of this user is looked up
        delivery = replace(delivery, accept_licence=False)
    cluster = replace(config.cluster, delivery=delivery)
    return replace(
        config,
        cluster=cluster,
        data=replace(config.data, **named),
        stage=replace(config.stage, checkpoint=spec.stage.checkpoint, base=spec.stage.base),
        model=replace(config.model, source=replace(config.model.source, path=spec.model.source.path)),
    )


def change_config(
    before: Config, recorded: RecordedRun, overrides: tuple[str, ...], place: LocalContext, conf: Path | ConfFolder
) -> Config:
    """The recorded config with the overrides. The steps stay those of the record, whatever the batch and the data are now; run.epochs that
    was not given again no longer says anything."""
    typed = keys_of(overrides)
    config = compose_over(choose_strategy_again(before, recorded, overrides), overrides, conf)
    named = typed | keys_of(recorded.plan.overrides)
    if "run.steps" in typed:
        config = with_short_warmup(config, named)
    if EPOCHS in typed:
        return settle_rows(replace(config, data=replace(config.data, rows=rows_again(config, typed))), named, place.here)
    other = any(key.partition(".")[0] == "data" for key in typed)
    if config.stage.global_batch == before.stage.global_batch and not other:
        return config
    config = replace(config, run=replace(config.run, epochs=None))
    return with_rows(replace(config, data=replace(config.data, rows=rows_again(config, typed))), place.here) if other else config


def with_rows(config: Config, here: Path) -> Config:
    """The config with the rows of other data, against which its batch is judged; 0 where they are not known here."""
    if config.stage.kind != "train" or config.data.builtin or not config.data.train:
        return config
    return replace(config, data=replace(config.data, rows=find_rows(config, here)))


def start_again(config: Config, overrides: Sequence[str], here: Path) -> Config:
    """The config with folders in place of runs, where an override names another checkpoint; the model stays that of the record, and a
    checkpoint of another one is refused. Raises ConfigRefused."""
    if not keys_of(overrides) & {*KEYS}:
        return config
    runs = find_runs(config, here)
    text, found = locate_checkpoint(config, *runs)
    if found is not None and (record := read_checkpoint(found, text)):
        weights = replace(record.weights, differences=find_differences(config.model, record))
        config = replace(config, stage=replace(config.stage, recorded=weights))
    return resolve_base(use_checkpoint(config, found, text) if found else config, *runs)


def rows_again(config: Config, typed: Set[str]) -> int:
    """The recorded number of rows holds for the recorded file."""
    return config.data.rows if "data.rows" in typed or not any(key.partition(".")[0] == "data" for key in typed) else 0


def choose_strategy_again(config: Config, recorded: RecordedRun, overrides: tuple[str, ...]) -> Config:
    """For other devices the strategy is chosen again unless one was given, and for another batch the micro-batch. The global batch stays the
    same unless it was given."""
    named = keys_of((*recorded.plan.overrides, *overrides))
    other = any(key in OTHER_DEVICES or key.startswith("cluster.nodes") for key in keys_of(overrides))
    if other and not any(key.partition(".")[0] == "strategy" for key in named):
        return replace(config, strategy=replace(config.strategy, name="auto", micro_batch=None))
    if (other or BATCH in keys_of(overrides)) and not {MICRO_BATCH, "experiment"} & named:
        return replace(config, strategy=replace(config.strategy, micro_batch=None))
    return config


def choose_runtime_again(config: Config, recorded: RecordedRun, overrides: tuple[str, ...]) -> Config:
    """On an accelerator a run that was a process of the CPU starts in the image, unless the runtime was given."""
    named = keys_of((*recorded.plan.overrides, *overrides))
    same = recorded.plan.config.hardware.accelerator == config.hardware.accelerator
    if same or config.cluster.runtime != "process" or "cluster.runtime" in named:
        return config
    return choose_runtime(replace(config, cluster=replace(config.cluster, runtime="auto")))


def carry_spec(recorded: RecordedRun, then: TrainSpec, now: TrainSpec) -> TrainSpec:
    """The recorded spec with the changes of the overrides, and the run id and folders of the new run."""
    kept = carry_over(asdict(recorded.plan.spec), asdict(then), asdict(now))
    spec: TrainSpec = decode(TrainSpec, kept)
    return replace(spec, run_id=now.run_id, output=now.output, data=replace(spec.data, root=now.data.root), expects=None)


def keep_environment(recorded: RecordedRun, plan: Plan, then: Plan) -> Plan:
    """Environment variables to which this version would give another value keep the recorded one, unless an override changes them."""
    before, derived, now = (each.commands[0].environment for each in (recorded.plan, then, plan))
    own = {RUN_VARIABLE, FOLDER_VARIABLE} | {name for name, value in before.items() if recorded.plan.spec.output in value}
    kept = {
        name: value
        for name, value in before.items()
        if name not in own and derived.get(name) != value and now.get(name) == derived.get(name)
    }
    if not kept:
        return plan
    commands = tuple(replace(command, environment=dict(sorted({**command.environment, **kept}.items()))) for command in plan.commands)
    cluster = plan.config.cluster
    config = replace(plan.config, cluster=replace(cluster, environment={**cluster.environment, **kept}))
    return replace(plan, commands=commands, config=config)


def expected_image(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> str:
    """The recorded image if it is made of the same files; '' if another one was chosen."""
    same = plan.config.cluster.runtime == "docker" and plan.image.fingerprint == recorded.plan.image.fingerprint
    return recorded.record.image_id if same and "image" not in accepted else ""


# ----------------------------------------------------------------------------------------------------------- expectations


def expect(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> Expectation:
    before, now = recorded.plan.spec, plan.spec
    same_data = without_root(before) == without_root(now) and before.stage.kind == now.stage.kind
    same_weights = (before.model.source, before.stage.checkpoint) == (now.model.source, now.stage.checkpoint)
    weights = recorded.inputs.weights if recorded.inputs and same_weights and "weights" not in accepted else {}
    variables = (recorded.plan.commands[0].environment, plan.commands[0].environment)
    changed = (name for name in sorted({*variables[0], *variables[1]}) if variables[0].get(name) != variables[1].get(name))
    return Expectation(
        run_id=recorded.record.run_id,
        data_sha256=recorded.record.data_sha256 if same_data and "data" not in accepted else "",
        weights=weights,
        facts=expected_facts(recorded, plan, accepted),
        free=tuple(f"variable {name}" for name in dict.fromkeys((*changed, *(RANK_VARIABLES if before.device != now.device else ())))),
    )


def without_root(spec: TrainSpec) -> object:
    return replace(spec.data, root="") if not spec.data.builtin else (spec.data.builtin, spec.data.train, spec.data.evaluation)


def expected_facts(recorded: RecordedRun, plan: Plan, accepted: tuple[str, ...]) -> dict[str, str]:
    """{} on other hardware or in another runtime, where all facts differ."""
    before, now = recorded.plan.config, plan.config
    if recorded.environment is None or before.hardware.name != now.hardware.name or before.cluster.runtime != now.cluster.runtime:
        return {}
    left_out = {*accepted, *(OF_THE_MACHINE if recorded.plan.spec.device != plan.spec.device or moved(recorded, plan) else ())}
    left_out |= {"determinism"} if recorded.plan.spec.deterministic != plan.spec.deterministic else set()
    locked = {canonicalize_name(name) for name in LOCKED.findall(recorded.lock)} | {"torch"} if recorded.lock else None
    return {
        key: value
        for key, value in facts_of(recorded.environment).items()
        if kind_of(key) in FACTS
        and kind_of(key) not in left_out
        and (kind_of(key) != "package" or locked is None or canonicalize_name(key.partition(" ")[2]) in locked)
    }


def moved(recorded: RecordedRun, plan: Plan) -> bool:
    """Whether other nodes were chosen."""
    nodes = [[node.host for node in config.cluster.working] for config in (recorded.plan.config, plan.config)]
    return nodes[0] != nodes[1]


# ----------------------------------------------------------------------------------------------------------------- notes


def describe_batch(recorded: Plan, plan: Plan) -> Iterator[str]:
    """How the batch is divided now, and what a step trains on."""
    if plan.spec.stage.kind != "train":
        return
    before, now = recorded.spec.batch, plan.spec.batch
    ranks = (recorded.spec.device.world_size, plan.spec.device.world_size)
    pairs = {"micro-batch": (before.micro_batch, now.micro_batch), "accumulation": (before.accumulation, now.accumulation), "ranks": ranks}
    divided = ", ".join(f"{name} {was} -> {new}" for name, (was, new) in pairs.items() if was != new)
    if before.global_batch == now.global_batch:
        if divided:
            yield f"batch: {divided}; stage.global_batch stays {now.global_batch}, so each step trains on the same samples"
        return
    yield f"batch: stage.global_batch {before.global_batch} -> {now.global_batch}{f', {divided}' if divided else ''}: each step trains on other samples"
    if recorded.spec.steps == plan.spec.steps:
        samples = [plan.spec.steps * batch.global_batch for batch in (before, now)]
        yield f"run.steps stays {plan.spec.steps:,}: {samples[1]:,} samples in all, the recorded run had {samples[0]:,}"


def describe_tree(recorded: RecordedRun, tree: Tree) -> tuple[str, ...]:
    if tree.is_recorded and tree.from_image:
        return (f"code: {tree.why}; the recorded image {recorded.plan.image.tag} is used, which is still on this machine",)
    if tree.is_recorded:
        return (f"code: {tree.why}; commit {recorded.source.commit[:12]} is used, in {tree.project}",)
    if tree.differs:
        return (f"code (accepted): this tree differs in {list_files(tree.differs)}; {tree.why}",)
    return ()


def describe_resumptions(recorded: RecordedRun) -> tuple[str, ...]:
    """A rerun does what the first attempt was planned to do."""
    changes = (change for resumption in recorded.record.resumptions for change in resumption.changes if change.kind)
    lines = [f"{change.key} {change.old} → {change.new}" for change in changes]
    kinds = dict.fromkeys(kind for resumption in recorded.record.resumptions for kind in resumption.accepted)
    if not lines and not kinds:
        return ()
    said = "; ".join(lines) or f"accepted: {', '.join(kinds)}"
    return (f"run {recorded.record.run_id} was resumed with changes ({said}): this is a rerun of its first plan, and will end differently",)


def describe_unknown(recorded: RecordedRun, expects: Expectation | None) -> tuple[str, ...]:
    """What cannot be checked, because the record or its code is too old."""
    if expects is None:
        return ("the recorded trainer does not check what it finds: when the run has ended, compare the two runs with omnilaunch compare",)
    named = recorded.plan.spec.stage.checkpoint or recorded.plan.spec.model.source.path
    return (f"the record has no hashes of the weights in {named}",) if named and recorded.inputs is None else ()
