"""Resolves `stage.checkpoint` and `run.evaluation.base` to the folder that the nodes of a run will read. The value is a run (its id, a unique prefix
of it, or `last`), one step of a run (RUN/300), the folder of a run or of a checkpoint, or HOST:FOLDER for one on a node.

A checkpoint is on the first node of the run that wrote it. One that is on this machine is copied to other nodes by cluster.sync; the base
weights of an adapter are copied, and mounted, with it.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from launcher.config.schema import Config, Node
from launcher.errors import ConfigRefused
from launcher.record.reader import read_object
from launcher.record.record import PLAN_FILE, RECORD_FILE, attempt_files, bracketed
from launcher.record.run_name import LAST, describe_runs, find_run, join_paths, list_folders
from trainer.contract import CHECKPOINTS
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, broken_checkpoints, newest_checkpoint

ON_NODE = re.compile(r"(?:[^/:@]+@)?(?P<host>[^/:@]+|\[[0-9A-Fa-f:]+\]):(?P<path>/.*)")
STEP = re.compile(r"(?:step-)?(\d{1,12})")
KEYS = ("stage.checkpoint", "stage.base", "run.evaluation.base")
ADAPTER_CONFIG = "adapter_config.json"


class MissingRefused(ConfigRefused):
    """There is no run and no folder of the name; the run may be still to come."""


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """`host`: the node that has the folder, '' for this machine. `shared`: all nodes of its cluster can read it. `bases`: folders on the same
    machine with the base weights of an adapter. `run`: the folder on this machine of the run that wrote it; None for one of no run of ours."""

    path: str
    run: Path | None = None
    host: str = ""
    shared: bool = False
    bases: tuple[str, ...] = ()


def resolve_checkpoint(config: Config, *runs: Path) -> Config:
    """The config with a folder in stage.checkpoint. `runs`: folders of runs on this machine; the first that has a run id is used.

    Raises ConfigRefused for a run that saved no complete checkpoint or has not ended, for a text that is neither a run nor a folder, and for
    a folder on a node that the nodes of this run cannot read.
    """
    text, found = locate_checkpoint(config, *runs)
    return use_checkpoint(config, found, text) if found else config


def locate_checkpoint(config: Config, *runs: Path) -> tuple[str, FoundCheckpoint | None]:
    """stage.checkpoint with the full id of the run, and where it is; None where none is given, or one that exists on the nodes only."""
    text = config.stage.checkpoint
    if not text or text.startswith("~"):
        return text, None
    try:
        text = full_name(text, runs)
    except ConfigRefused as error:
        raise ConfigRefused(f"stage.checkpoint={text}: {error}") from error
    return text, find_checkpoint(text, runs, local=config.cluster.is_local)


def with_full_ids(overrides: Sequence[str], *runs: Path) -> tuple[str, ...]:
    """The overrides as they are recorded: with the full id of a run that is named by a prefix or by `last`."""
    pairs = [(word, *word.partition("=")[::2]) for word in overrides]
    return tuple(
        word if key not in KEYS or (full := full_name(text.strip("'\""), runs)) == text.strip("'\"") else f"{key}={full}"
        for word, key, text in pairs
    )


def full_name(text: str, runs: Sequence[Path]) -> str:
    """RUN or RUN/STEP with the full id of the run; any other text as it is. A folder that exists is taken before a prefix of an id."""
    name, slash, step = text.partition("/")
    if not name or (slash and not STEP.fullmatch(step)) or exists(Path(text)):
        return text
    folders = list_folders(*runs)
    if name == LAST or (name not in folders and any(run_id.startswith(name) for run_id in folders)):
        return f"{find_run(name, *runs).name}{slash}{step}"
    return text


def resolve_base(config: Config, *runs: Path) -> Config:
    """The same for run.evaluation.base."""
    evaluation = config.run.evaluation
    if not evaluation.base:
        return config
    try:
        found = resolve_checkpoint(replace(config, stage=replace(config.stage, checkpoint=evaluation.base)), *runs)
    except ConfigRefused as error:
        raise ConfigRefused(str(error).replace("stage.checkpoint=", "run.evaluation.base=")) from error
    base = replace(evaluation, base=found.stage.checkpoint)
    return replace(config, cluster=found.cluster, run=replace(config.run, evaluation=base))


def find_checkpoint(text: str, runs: tuple[Path, ...], *, local: bool) -> FoundCheckpoint | None:
    """None for a path that exists on the nodes only."""
    if match := ON_NODE.fullmatch(text):
        return FoundCheckpoint(path=match["path"], host=match["host"].strip("[]"))
    name, _, step = text.partition("/")
    known = list_folders(*runs).get(name)
    if known is not None and (not step or STEP.fullmatch(step)):
        return checkpoint_of_step(known, text, int(step.removeprefix("step-"))) if step else checkpoint_of_run(known, text)
    folder = Path(text)
    if local and exists(folder / PLAN_FILE):
        return checkpoint_of_run(folder.resolve(), text)
    if local and folder.name == CHECKPOINTS and exists(folder.parent / PLAN_FILE):
        return checkpoint_of_run(folder.resolve().parent, text)
    if exists(folder):
        return FoundCheckpoint(path=text, bases=bases_of(folder), run=run_of(folder)) if local else None
    if local or is_run_name(text):
        there = "" if local else ". A folder that only the nodes have is given with its whole path, /PATH/FOLDER"
        raise MissingRefused(
            f"stage.checkpoint={text}: there is no folder and no run of this name in {join_paths(runs)}; "
            f"{describe_runs(name, list_folders(*runs))}{there}"
        )
    return None


def is_run_name(text: str) -> bool:
    """Whether it is RUN or RUN/STEP, and not a path: runs are known on this machine, whatever the cluster is."""
    name, slash, step = text.partition("/")
    return bool(name) and name not in (".", "..") and (not slash or STEP.fullmatch(step) is not None)


def checkpoint_of_run(folder: Path, text: str) -> FoundCheckpoint:
    """The newest complete checkpoint of the run whose folder on this machine is `folder`."""
    if state := newest_checkpoint(folder):
        return FoundCheckpoint(path=str(folder / state.path), bases=bases_of(folder / state.path), run=folder)
    plan = plan_elsewhere(folder)
    return checkpoint_on_node(folder, plan, text) if plan else refuse_run(folder, text)


def checkpoint_of_step(folder: Path, text: str, step: int) -> FoundCheckpoint:
    """The checkpoint of one step of the run whose folder on this machine is `folder`."""
    relative = f"{CHECKPOINTS}/{CHECKPOINT_NAME.format(step=step)}"
    checkpoint = folder / relative
    if not exists(checkpoint):
        if plan := plan_elsewhere(folder):
            return replace(checkpoint_on_node(folder, plan, text), path=f"{plan['spec']['output']}/{relative}")
        saved = ", ".join(sorted(path.name for path in (folder / CHECKPOINTS).glob("step-*"))) or "none"
        raise ConfigRefused(f"stage.checkpoint={text}: that run has no checkpoint of step {step}; it has: {saved}")
    if reason := broken_checkpoints(folder).get(checkpoint):
        raise ConfigRefused(f"stage.checkpoint={text}: the checkpoint is incomplete: {reason}")
    return FoundCheckpoint(path=str(checkpoint), bases=bases_of(checkpoint), run=folder)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, RUN/checkpoints/step-N."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.resolve().parent.name == CHECKPOINTS and exists(run / PLAN_FILE) else None


def plan_elsewhere(folder: Path) -> dict[str, Any]:
    """The plan of the newest attempt, if it wrote its checkpoints on another machine; else, or if it cannot be read, {}."""
    plan = read_object((folder / PLAN_FILE, *attempt_files(folder, PLAN_FILE))[-1], [])
    nodes = plan.get("commands", ())
    is_here = not nodes or plan["spec"]["output"] == str(folder.resolve()) or Node(host=str(nodes[0]["host"])).is_local
    return {} if is_here else plan


def checkpoint_on_node(folder: Path, plan: dict[str, Any], text: str) -> FoundCheckpoint:
    record = read_object(folder / RECORD_FILE, [])
    if not record:
        raise ConfigRefused(f"stage.checkpoint={text}: that run has not ended, or its launcher was killed. Next: omnilaunch attach {text}")
    if not record.get("checkpoint"):
        refuse_run(folder, text)
    stage = plan["spec"]["stage"]
    return FoundCheckpoint(
        path=f"{plan['spec']['output']}/{record['checkpoint']}",
        host=str(plan["commands"][0]["host"]),
        run=folder,
        shared=bool(plan["config"]["cluster"].get("shared")),
        bases=(str(stage["checkpoint"]),) if stage.get("lora") and stage["checkpoint"] else (),
    )


def refuse_run(folder: Path, text: str) -> NoReturn:
    broken = "; ".join(f"{path.name}: {reason}" for path, reason in broken_checkpoints(folder).items())
    what = f"no checkpoint of that run is complete: {broken}" if broken else "that run saved no checkpoint"
    raise ConfigRefused(f"stage.checkpoint={text}: {what}. See {folder / RECORD_FILE}")


def bases_of(folder: Path) -> tuple[str, ...]:
    """The folder with the base weights, if the checkpoint is an adapter that names one."""
    base = str(read_object(folder / ADAPTER_CONFIG, []).get("base_model_name_or_path", ""))
    return (base,) if base.startswith("/") else ()


# ------------------------------------------------------------------------------------------------------------- for the nodes


def use_checkpoint(config: Config, found: FoundCheckpoint, text: str) -> Config:
    """The config with the checkpoint's folder, synced to the nodes and mounted where that is necessary."""
    if found.host and not Node(host=found.host).is_local:
        refuse_unreadable(config, found, text)
    cluster = config.cluster
    if not found.host and not cluster.is_local:
        folders = (str(Path(path).absolute()) for path in (found.path, *found.bases))
        cluster = replace(cluster, sync=tuple(dict.fromkeys((*cluster.sync, *folders))))
    if cluster.runtime == "docker":
        cluster = replace(cluster, mounts=tuple(dict.fromkeys((*cluster.mounts, *found.bases))))
    return replace(config, cluster=cluster, stage=replace(config.stage, checkpoint=found.path))


def refuse_unreadable(config: Config, found: FoundCheckpoint, text: str) -> None:
    """Raises ConfigRefused unless all nodes of the run can read a folder on `found.host`."""
    own = [node for node in config.cluster.working if found.host in (node.host, node.address)]
    others = [node.host for node in config.cluster.working if node not in own]
    if own and (not others or found.shared or config.cluster.shared):
        return
    why = f"only, and these nodes of the run do not have it: {', '.join(others)}" if own else "which is not a node of this run"
    source = shlex.quote(f"{bracketed(found.host)}:{found.path}")
    raise ConfigRefused(
        f"stage.checkpoint={text}: the checkpoint is on {found.host}{' ' if own else ', '}{why}. Copy it to this machine, from where cluster.sync copies it to "
        f"the nodes: scp -r {source} FOLDER, then stage.checkpoint=/PATH/FOLDER; or set cluster.shared=true if the nodes share that folder"
    )


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, or the folder above may not be read
        return False
