"""From the name of a run, as a user types it, to its folder: an id, a unique prefix of one, `last`, or the path of a run's folder.

Imports little, since shell completion calls it on every Tab.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import ConfigRefused, suggest
from trainer.contract.listing import list_some

PLAN_FILE = "plan.json"  # a folder without one is not a run
RECORD_FILE = "result.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a folder, a label and a part of a container's name
LAST = "last"
MOST_NAMES = 5
SHORT = 13  # characters of a shortened id, of one that was made from the time down to the minute: 20261121-0245


def find_run(name: str, *runs: Path) -> Path:
    """The folder of a run. `runs`: folders of runs; for an id that lies in several of them, the first counts.

    An id that is exactly `name` is taken before the ids that begin with it. Raises ConfigRefused: for a prefix of several ids with these ids,
    for an unknown name with the newest runs, for a path without a plan, and for `last` where a run has that id.
    """
    if "/" in name:
        return find_path(name)
    folders = list_folders(*runs)
    if name == LAST:
        return find_last(folders, runs)
    if name in folders:
        return folders[name]
    if name and has_plan(Path(name)):
        return find_path(name)
    matching = {run_id: folder for run_id, folder in folders.items() if name and run_id.startswith(name)}
    if len(matching) == 1:
        return next(iter(matching.values()))
    if matching:
        raise ConfigRefused(f"{name!r} is the beginning of {len(matching)} run ids: {list_newest(matching)}. Type more of the id")
    raise ConfigRefused(f"there is no run {name!r} in {join_paths(runs)}; {describe_runs(name, folders)}")


def find_path(name: str) -> Path:
    folder = Path(name)
    if not has_plan(folder):
        raise ConfigRefused(f"{name} is not the folder of a run: it has no {PLAN_FILE}. To list the runs of this folder: omnilaunch runs")
    return folder.resolve()


def find_last(folders: Mapping[str, Path], runs: tuple[Path, ...]) -> Path:
    if not folders:
        raise ConfigRefused(f"there are no runs in {join_paths(runs)}. To start one: omnilaunch launch")
    if LAST in folders:
        raise ConfigRefused(
            f"{LAST!r} means the newest run, and a run has that id: type {folders[LAST]} for it, or the id of the newest run"
        )
    return max(folders.values(), key=read_start)


def list_folders(*runs: Path) -> dict[str, Path]:
    """Run id -> its folder, of every run in these folders."""
    found: dict[str, Path] = {}
    for folder in runs:
        for path in folder.glob(f"*/{PLAN_FILE}"):
            if RUN_ID.fullmatch(path.parent.name):
                found.setdefault(path.parent.name, path.parent)
    return found


def shorten_ids(run_ids: Iterable[str]) -> dict[str, str]:
    """Run id -> its beginning that no other of them has, which names the run in every command. Ids that are short stay whole."""
    ordered = sorted(run_ids)
    short = {}
    for place, run_id in enumerate(ordered):
        near = (*ordered[max(0, place - 1) : place], *ordered[place + 1 : place + 2])
        shared = max((count_shared(run_id, other) for other in near), default=0)
        short[run_id] = run_id if len(run_id) <= SHORT + 3 else run_id[: max(SHORT, shared + 1)]
    return short


def count_shared(one: str, other: str) -> int:
    """The length of the beginning that both have."""
    return next((place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other)))


def read_start(folder: Path) -> tuple[datetime, str]:
    """When a run started, and its id: by its record; while it has none, by the time in its id, or else by when its plan was written."""
    try:
        started = datetime.fromisoformat(json.loads((folder / RECORD_FILE).read_bytes())["started_at"])
        return (started if started.tzinfo else started.replace(tzinfo=UTC)), folder.name
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        pass  # no record yet, or an unreadable one
    try:
        return datetime.strptime(folder.name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC), folder.name
    except ValueError:
        return datetime.fromtimestamp((folder / PLAN_FILE).stat().st_mtime, UTC), folder.name


def typed_name(folder: Path, runs: Path) -> str:
    """What names this run in a command that is typed here: its id, or its path where it is not in `runs`. Never `last`: another run may have
    begun before the command is typed."""
    return folder.name if folder.resolve().parent == runs.resolve() else str(folder)


def has_plan(folder: Path) -> bool:
    try:
        return (folder / PLAN_FILE).is_file()
    except (OSError, ValueError):  # too long for a name, a folder without permission, a NUL character
        return False


def describe_runs(name: str, folders: Mapping[str, Path]) -> str:
    """For an unknown name: the nearest id and the newest runs."""
    if not folders:
        return "there are no runs there. To start one: omnilaunch launch"
    near = suggest(name, folders).partition("valid are: ")[0]
    return f"{near}the newest are: {list_newest(folders)}. To list all: omnilaunch runs"


def list_newest(folders: Mapping[str, Path]) -> str:
    newest = sorted(folders, key=lambda run_id: read_start(folders[run_id]), reverse=True)
    return list_some(newest, MOST_NAMES)


def join_paths(runs: tuple[Path, ...]) -> str:
    """One folder, written in two ways, counts once."""
    return " or ".join({path.resolve(): str(path) for path in reversed(runs)}.values())
