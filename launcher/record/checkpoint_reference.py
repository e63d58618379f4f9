"""What stands in `stage.checkpoint`, as the folder that the nodes of a run will find: a run id, a run's folder, a checkpoint's folder, or
HOST:FOLDER for one that lies on a node.

A checkpoint lies where the run's first node wrote it. One on this machine is brought to nodes elsewhere by cluster.sync, and what an
adapter stands on is brought and mounted with it.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from launcher.config.schema import Config, Node
from launcher.errors import ConfigRefused, suggest
from launcher.record.record import PLAN_FILE, RECORD_FILE, attempt_files, bracketed
from trainer.contract.checkpoint_files import broken_checkpoints, newest_checkpoint

ON_NODE = re.compile(r"(?:[^/:@]+@)?(?P<host>[^/:@]+|\[[0-9A-Fa-f:]+\]):(?P<path>/.*)")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """`host`: the node that has the folder; '' = this machine. `shared`: all nodes of its cluster see it. `needs`: further folders there,
    which an adapter stands on."""

    path: str
    host: str = ""
    shared: bool = False
    needs: tuple[str, ...] = ()


def resolve_checkpoint(config: Config, *runs: Path) -> Config:
    """The config with a folder in stage.checkpoint. `runs`: folders of runs on this machine, of which the first that knows a run id counts.

    Raises ConfigRefused for a run that saved no whole checkpoint or has not ended, for what is neither a run nor a folder, and for a
    folder on a node that the nodes of this run do not see.
    """
    text = config.stage.checkpoint
    if not text or text.startswith("~"):
        return config
    found = find_checkpoint(text, runs, local=config.cluster.is_local)
    return place_checkpoint(config, found, text) if found else config


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
    """None for a path that only the nodes can judge."""
    if match := ON_NODE.fullmatch(text):
        return FoundCheckpoint(path=match["path"], host=match["host"].strip("[]"))
    known = next((folder / text for folder in runs if "/" not in text and is_there(folder / text / PLAN_FILE)), None)
    if known is not None:
        return of_run(known, text)
    folder = Path(text)
    if local and is_there(folder / PLAN_FILE):
        return of_run(folder.resolve(), text)
    if is_there(folder):
        return FoundCheckpoint(path=text, needs=tuple(bases_of(folder))) if local else None
    if local:
        names = sorted({path.parent.name for place in runs for path in place.glob(f"*/{PLAN_FILE}")})
        hint = suggest(text, names) if names else "there are none yet"
        places = " or ".join(map(str, runs))
        raise ConfigRefused(f"stage.checkpoint={text}: neither a run of {places} ({hint}) nor a folder. See: omnilaunch runs")
    return None


# ------------------------------------------------------------------------------------------------------------------ of a run


def of_run(folder: Path, text: str) -> FoundCheckpoint:
    """The newest whole checkpoint of the run that has `folder` on this machine."""
    if state := newest_checkpoint(folder):
        return FoundCheckpoint(path=str(folder / state.path), needs=tuple(bases_of(folder / state.path)))
    plan = read_newest(folder)
    return on_first_node(folder, plan, text) if lies_elsewhere(folder, plan) else refuse_run(folder, text)


def lies_elsewhere(folder: Path, plan: dict[str, Any]) -> bool:
    nodes = plan.get("commands", ())
    return bool(nodes) and plan["spec"]["output"] != str(folder.resolve()) and not is_here(str(nodes[0]["host"]))


def on_first_node(folder: Path, plan: dict[str, Any], text: str) -> FoundCheckpoint:
    record = read_plain(folder / RECORD_FILE)
    host, output = str(plan["commands"][0]["host"]), str(plan["spec"]["output"])
    if not record:
        raise ConfigRefused(f"stage.checkpoint={text}: that run has not ended, or its launcher was killed. Next: omnilaunch attach {text}")
    if not record.get("checkpoint"):
        refuse_run(folder, text)
    stage = plan["spec"]["stage"]
    needs = (str(stage["checkpoint"]),) if stage.get("lora") and stage["checkpoint"] else ()
    shared = bool(plan["config"]["cluster"].get("shared"))
    return FoundCheckpoint(path=f"{output}/{record['checkpoint']}", host=host, shared=shared, needs=needs)


def refuse_run(folder: Path, text: str) -> NoReturn:
    broken = "; ".join(f"{path.name}: {reason}" for path, reason in broken_checkpoints(folder).items())
    what = f"no checkpoint of that run is whole: {broken}" if broken else "that run saved no checkpoint"
    raise ConfigRefused(f"stage.checkpoint={text}: {what}. See {folder / RECORD_FILE}")


def bases_of(folder: Path) -> Iterator[str]:
    """The folder of the weights that an adapter stands on; nothing of whole weights."""
    base = str(read_plain(folder / ADAPTER_CONFIG).get("base_model_name_or_path", ""))
    if base.startswith("/"):
        yield base


# ------------------------------------------------------------------------------------------------------------- for the nodes


def place_checkpoint(config: Config, found: FoundCheckpoint, text: str) -> Config:
    if found.host and not is_here(found.host):
        refuse_unseen(config, found, text)
    paths = (found.path, *found.needs)
    cluster = config.cluster
    if not found.host and not cluster.is_local:
        cluster = replace(cluster, sync=tuple(dict.fromkeys((*cluster.sync, *map(absolute_here, paths)))))
    if cluster.runtime == "docker":
        cluster = replace(cluster, mounts=tuple(dict.fromkeys((*cluster.mounts, *found.needs))))
    return replace(config, cluster=cluster, stage=replace(config.stage, checkpoint=found.path))


def refuse_unseen(config: Config, found: FoundCheckpoint, text: str) -> None:
    """Raises ConfigRefused unless the nodes of the run see a folder that lies on `found.host`."""
    nodes, there = config.cluster.working, shlex.quote(f"{bracketed(found.host)}:{found.path}")
    own = [node for node in nodes if found.host in (node.host, node.address)]
    others = [node.host for node in nodes if node not in own]
    if own and (not others or found.shared or config.cluster.shared):
        return
    lacking = ", ".join(others) if own else "no node of this run is that one"
    what = (
        f"it lies on {found.host} alone, and the other nodes have it not: {lacking}" if own else f"it lies on {found.host}, and {lacking}"
    )
    raise ConfigRefused(
        f"stage.checkpoint={text}: {what}. Bring it to this machine, from where cluster.sync spreads it: "
        f"scp -r {there} FOLDER, then stage.checkpoint=/PATH/FOLDER; or set cluster.shared=true where the nodes share that folder"
    )


def is_here(host: str) -> bool:
    return Node(host=host).is_local


def absolute_here(path: str) -> str:
    return str(Path(path).absolute())


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for one, or a folder that may not be looked into
        return False


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def read_newest(folder: Path) -> dict[str, Any]:
    """The plan of the run's newest attempt."""
    return read_plain((folder / PLAN_FILE, *attempt_files(folder, PLAN_FILE))[-1])
