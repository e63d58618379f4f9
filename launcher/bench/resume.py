"""`omnilaunch launch --resume`: the plan of another attempt, made from the recorded plan and the overrides, and what differs.

A table decides for each key of the config what a change of it does. The trainer compares the settings of the checkpoint once more.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.bench.paused_run import PausedRun
from launcher.bench.rerun import (
    FACTS,
    ContextFor,
    carry_spec,
    choose_strategy_again,
    describe_tree,
    expected_facts,
    keep_environment,
    kept_overrides,
    recorded_config,
    refuse_code,
    with_image,
    with_recorded_files,
)
from launcher.bench.worktree import Tree
from launcher.config.compose import compose_over
from launcher.config.conf_folder import ConfFolder
from launcher.config.defaults import EPOCHS, keys_of, without_keys
from launcher.config.schema import Config
from launcher.config.variable import describe_variables
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.data.rows import find_rows, with_steps
from launcher.plan.plan import LocalContext, Plan, make_plan
from launcher.plan.text import command_line
from launcher.record.description import command_from_weights
from launcher.record.record import ChangedSetting
from trainer.contract import SPEC_FILE, AcceptedChange, Expectation
from trainer.contract.checkpoint_files import ACCEPTABLE_KEYS, fixed_settings, flatten, newest_resumable

KINDS = ("steps", "data", "nodes", "strategy", "code", *FACTS)
CHANGES: tuple[AcceptedChange, ...] = ("steps", "data")
FREE, LEARNING, PLACE = "", "learning", "place"
# The first pattern that matches a key of the config decides: a kind that must be accepted; FREE: allowed; PLACE: the run cannot continue
# there. A key without a pattern is LEARNING: it would change what the run learns, and is refused.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("steps", ("run.steps",)),
    ("data", ("data.name", "data.builtin", "data.train", "data.evaluation", "data.images", "data.rows", "data.info", "data.mirror")),
    ("data", ("data.split_seed", "data.max_samples", "data.mixing", "data.mixing_stop")),
    (PLACE, ("cluster.runtime",)),
    ("variable", ("cluster.environment.*", "hardware.environment.*")),
    (
        FREE,
        (
            "run.epochs",  # what it asks for is in run.steps
            *("*.title", "*.notes", "data.workers", "run.*timeout_s", "run.save_every*", "run.keep_*", "run.checkpoint_background"),
            *("run.trackers", "run.profile.*", "run.restarts", "run.minimum_nodes", "run.force", "run.bands.*", "run.repeats"),
            *("run.evaluation.*", "cluster.name", "cluster.delivery.*", "cluster.*_s", "cluster.rendezvous_port", "cluster.shm_size"),
            *("cluster.ulimits.*", "cluster.mounts", "cluster.sync", "cluster.secrets", "cluster.user", "cluster.root", "cluster.shared"),
        ),
    ),
    ("nodes", ("cluster.*", "hardware.*")),
    ("strategy", ("strategy.*",)),
)


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """`project`: the folder with the code. `changes`: what the overrides change. `notes`: to be printed before it starts."""

    plan: Plan
    project: Path
    accepted: tuple[str, ...]
    changes: tuple[ChangedSetting, ...]
    notes: tuple[str, ...]


def plan_resume(
    paused: PausedRun,
    overrides: tuple[str, ...],
    accepted: tuple[str, ...],
    tree: Tree,
    local: LocalContext,
    environ: Mapping[str, str],
    *,
    conf: Path | ConfFolder,
    context_for: ContextFor | None = None,
) -> ResumePlan:
    """Raises ConfigRefused with every change that must be accepted, or that is refused. `context_for`: as for a rerun."""
    recorded = paused.recorded
    refuse_code(recorded, tree, accepted)
    before = with_folder(recorded_config(recorded, environ), paused.plan)
    config = compose_over(choose_strategy_again(before, recorded, overrides), overrides, conf) if overrides else before
    config = count_again(config, overrides, accepted, local.here)
    if config.cluster.is_local and paused.plan.is_local:
        config = with_folder(config, paused.plan)
    refuse_learning(paused, list_learning(find_changes(before, config)), overrides)
    stacks, local = load_stacks(tree.project / "images"), replace(local, project=tree.project)
    words = (*kept_overrides(recorded, overrides), *overrides)
    words = words if config.run.epochs is not None else without_keys(words, (EPOCHS,))
    asked = replace(context_for(config, stacks, tree.project), project=tree.project) if context_for else local
    local = replace(local, accepted=asked.accepted)  # of this user, whatever is planned
    again = partial(make_plan, stacks=stacks, run_id=paused.run_id, overrides=words, accepts=can_change)
    with naming_new_run(paused, overrides):
        then, now = again(before, local=local), again(config, local=asked)
    if tree.from_image and now.image.stack == paused.plan.image.stack:
        now = with_image(now, paused.plan.image, local)
    changes = tuple(find_changes(then.config, now.config))
    refuse_finished(paused, now)
    refuse_place(paused, then.config, now.config)
    refuse_learning(paused, compare_settings(then, now), overrides)
    refuse_unaccepted(paused, now, changes, overrides, accepted)
    plan = with_recorded_files(keep_run(paused, then, now, accepted, tree), paused.plan, overrides, conf)
    plan = replace(plan, spec=replace(plan.spec, expects=expect(paused, plan, (*accepted, *(change.kind for change in changes)), tree)))
    variables = describe_variables(environ, plan.config, words)
    notes = (*describe_tree(recorded, tree), *(describe_change(change, now.config) for change in changes), *variables)
    return ResumePlan(plan=plan, project=tree.project, accepted=accepted, changes=changes, notes=notes)


def count_again(config: Config, overrides: Sequence[str], accepted: Sequence[str], here: Path) -> Config:
    """The config with the rows of other data, and the steps of run.epochs where that was given. Without it the steps stay those of the record,
    and epochs of other data no longer say anything. The warm-up never changes."""
    typed, data = keys_of(overrides), config.data
    other = "data" in accepted or any(key == "data" or kind_of_change(key) == "data" for key in typed)
    if other and "data.rows" not in typed:
        data = replace(data, rows=0)
    epochs = config.run.epochs if EPOCHS in typed or not other else None
    config = replace(config, data=data, run=replace(config.run, epochs=epochs))
    if (other or EPOCHS in typed) and data.train and not data.builtin and (other or not data.rows):
        config = replace(config, data=replace(data, rows=find_rows(config, here)))
    return with_steps(config, here) if EPOCHS in typed else config


def keep_run(paused: PausedRun, then: Plan, now: Plan, accepted: tuple[str, ...], tree: Tree) -> Plan:
    """The plan of the overrides with what the run keeps: its folder, its spec key by key, its environment variables."""
    spec = replace(carry_spec(paused.recorded, then.spec, now.spec), accepted_changes=accepted_by_trainer(paused, accepted, tree))
    plan = replace(now, spec=spec, folder=str(paused.folder), rerun_of=paused.plan.rerun_of, accepted=paused.plan.accepted)
    return keep_environment(paused.recorded, plan, then)


def with_folder(config: Config, plan: Plan) -> Config:
    """A relative cluster.root was relative to the folder that the run was launched in."""
    return replace(config, cluster=replace(config.cluster, root=str(PurePosixPath(plan.spec.output).parents[1])))


def expect(paused: PausedRun, plan: Plan, accepted: tuple[str, ...], tree: Tree) -> Expectation | None:
    """The environment of the last attempt. None where the trainer is older than expectations, and would refuse a spec with them."""
    if not knows(paused, tree, "expects"):
        return None
    facts = expected_facts(paused.recorded, plan, accepted)
    of_the_rerun = paused.plan.spec.expects or Expectation(run_id=paused.run_id)
    data = "" if "data" in accepted else of_the_rerun.data_sha256
    return replace(of_the_rerun, run_id=paused.run_id if facts else of_the_rerun.run_id, facts=facts, data_sha256=data)


def knows(paused: PausedRun, tree: Tree, key: str) -> bool:
    """Whether the trainer that will run knows this key of the spec: that of the record may be an older one."""
    return not tree.is_recorded or f'"{key}"'.encode() in (paused.folder / SPEC_FILE).read_bytes()


# ---------------------------------------------------------------------------------------------------------------- changes


def find_changes(then: Config, now: Config) -> Iterator[ChangedSetting]:
    """Every key of the config that differs. The nodes are one value: a host may stand in another row of the list."""
    values = [dict(flatten(plain(config))) | {"cluster.nodes": hosts(config)} for config in (then, now)]
    for key in dict.fromkeys((*values[0], *values[1])):
        old, new = (None if side.get(key) == {} else side.get(key) for side in values)
        if old != new:
            yield ChangedSetting(key=key, old=as_text(old), new=as_text(new), kind=kind_of_change(key))


def plain(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return {**data, "cluster": {key: value for key, value in data["cluster"].items() if key != "nodes"}}


def hosts(config: Config) -> str:
    return ", ".join(f"{node.host}{f' {list(node.devices)}' if node.devices else ''}" for node in config.cluster.working)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def kind_of_change(key: str) -> str:
    return next((kind for kind, patterns in RULES if any(fnmatchcase(key, pattern) for pattern in patterns)), LEARNING)


def can_change(offered: str) -> bool:
    """Whether a resume can take an offered change, with what --accept allows. `axis=NAME` is as its name."""
    keys = (word.partition("=")[0] for word in shlex.split(offered))
    return all(kind_of_change(key if "." in key else f"{key}.name") not in (LEARNING, PLACE) for key in keys)


def describe_change(change: ChangedSetting, config: Config) -> str:
    text = f"{change.key}: {change.old or 'nothing'} → {change.new or 'nothing'}"
    optimizer = config.stage.optimizer
    if change.key == "run.steps":
        follows = "" if optimizer.schedule == "constant" and (optimizer.warmup >= 1 or not optimizer.warmup) else (
            f"; the learning rate of the remaining steps follows the {optimizer.schedule} schedule over {change.new} steps"
        )  # fmt: skip
        text += follows
    elif change.kind == "data":
        text += "; the remaining steps draw their rows from it in a new order"
    return text


def refuse_finished(paused: PausedRun, now: Plan) -> None:
    """A finished run can get more steps. Its last checkpoint has weights only, so it continues from the one before, where there is one. One
    that ended early would end at the same evaluation again, since run.early_stop cannot change."""
    early = paused.record.ended if paused.record else ""
    if not paused.is_finished or (now.spec.steps > paused.plan.spec.steps and not early):
        return
    done = paused.plan.spec.steps
    ways = [f"a new run starts from its weights: {command_from_weights(paused.plan)}"]
    if not early and (not paused.plan.is_local or newest_resumable(paused.folder, done + 1)):
        ways.insert(0, f"for more steps: {command_line('launch', '--resume', paused.run_id, f'run.steps={2 * done}', '--accept', 'steps')}")
    how = f"it ended early ({early}), and would end there again" if early else f"all {done} steps are done"
    raise ConfigRefused(f"run {paused.run_id} is finished: {how}, so there is nothing to resume; {'; '.join(ways)}")


def refuse_place(paused: PausedRun, then: Config, now: Config) -> None:
    """Checkpoints, rows and reports stay where they were written."""
    values: dict[str, tuple[str, str]] = {
        "cluster.runtime": (then.cluster.runtime, now.cluster.runtime),
        "cluster": (describe_place(then), describe_place(now)),
    }
    if lines := "\n".join(f"  {key}: {old} → {new}" for key, (old, new) in values.items() if old != new):
        raise ConfigRefused(
            f"run {paused.run_id} cannot move there:\n{lines}\nIts files stay where they are. Leave that out; or start a new run from its "
            f"weights: stage.checkpoint={paused.run_id}"
        )


def describe_place(config: Config) -> str:
    return "this machine" if config.cluster.is_local else "other machines"


def list_learning(changes: Iterable[ChangedSetting]) -> list[str]:
    return [f"{change.key}: {change.old} → {change.new}" for change in changes if change.kind == LEARNING]


def compare_settings(then: Plan, now: Plan) -> list[str]:
    """Settings that every checkpoint of the run must have in common, and that follow from another key, as the attention from the hardware."""
    allowed = {key for keys in ACCEPTABLE_KEYS.values() for key in keys}
    old, new = (fixed_settings(plan.spec) for plan in (then, now))
    return [f"{key} of the trainer: {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key] and key not in allowed]


@contextmanager
def naming_new_run(paused: PausedRun, overrides: Sequence[str]) -> Iterator[None]:
    """A refusal of what the overrides make of the run says where other settings can be given."""
    try:
        yield
    except ConfigRefused as error:
        if not overrides:
            raise
        raise type(error)(
            f"{error}\nA run that is resumed keeps its batch, its model and what else it learns with. Leave out or change the overrides; or "
            f"start a new run from its weights, with what else it needs: {new_run_command(paused, overrides)}"
        ) from error


def new_run_command(paused: PausedRun, overrides: Sequence[str]) -> str:
    words = [word for word in overrides if not word.startswith(("run.steps=", "run.epochs="))]
    stage = paused.plan.spec.stage.name  # a launch without it trains all weights
    return command_line("launch", *((f"stage={stage}",) if stage != "full" else ()), f"stage.checkpoint={paused.run_id}", *words)


def refuse_learning(paused: PausedRun, lines: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises ConfigRefused for what would change what the run learns, except its steps and its data."""
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigRefused(
            f"run {paused.run_id} cannot be resumed with settings that change what it learns:\n{shown}\nResume it without them; or start a "
            f"new run from its weights, with what else it needs: {new_run_command(paused, overrides)}"
        )


def refuse_unaccepted(
    paused: PausedRun, now: Plan, changes: Sequence[ChangedSetting], overrides: Sequence[str], accepted: tuple[str, ...]
) -> None:
    """Raises ConfigRefused with each change whose kind was not accepted, and the command that accepts them."""
    chosen = any(key.partition(".")[0] == "strategy" for key in keys_of(overrides))
    moved = any(change.kind == "nodes" for change in changes)
    follows = {"strategy"} if moved and not chosen else set()  # the strategy is chosen again for other nodes
    standing = [change for change in changes if change.kind and change.kind not in {*accepted, *follows}]
    if standing:
        lines = "\n".join(f"  {change.kind}: {describe_change(change, now.config)}" for change in standing)
        kinds = ",".join(dict.fromkeys((*accepted, *(change.kind for change in standing))))
        command = command_line("launch", "--resume", paused.run_id, *overrides, "--accept", kinds)
        raise ConfigRefused(f"run {paused.run_id} would not continue as it was:\n{lines}\nTo accept this: {command}")


def accepted_by_trainer(paused: PausedRun, accepted: tuple[str, ...], tree: Tree) -> tuple[AcceptedChange, ...]:
    """What the checkpoint may differ in. What was accepted earlier stays: the newest checkpoint may be from before it."""
    earlier = paused.plan.spec.accepted_changes
    kinds: tuple[AcceptedChange, ...] = tuple(kind for kind in CHANGES if kind in earlier or kind in accepted)
    if kinds and not knows(paused, tree, "accepted_changes"):
        raise ConfigRefused(
            f"run {paused.run_id} uses the trainer of {paused.recorded.source.commit[:12]}, which cannot resume with other "
            f"{' or '.join(kinds)}. Resume it without that; or start a new run from its weights: stage.checkpoint={paused.run_id}"
        )
    return kinds
