"""Removes old runs by a rule. A run that another run refers to is never removed."""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.errors import ConfigRefused, RunEnded
from launcher.record.index import RunEntry
from launcher.record.lock import is_locked
from launcher.record.reader import read_bytes, read_json
from launcher.record.record import PLAN_FILE, RECORD_FILE, SOURCE_FILE, attempt_files
from trainer.contract.wording import plural

AGE = re.compile(r"(\d{1,6})([hdw])")
HOURS = {"h": 1, "d": 24, "w": 24 * 7}
REMOVING = ".removing-"  # prefix of a folder that is being removed
REFERRING = (PLAN_FILE, SOURCE_FILE, RECORD_FILE)  # files of a run that may name another run
# Keys whose value is the id of a run, or a path with an id anywhere in it. Every other text counts only as a path in the folder of the runs,
# so that a run with the name of a model is not taken for a reference.
NAMING = ("stage.checkpoint", "evaluation.base", "origin.base", "origin.path", "origin.run_id", "rerun_of")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`keep`: that many of the newest runs are kept. `older_than`: only runs that ended longer ago are removed. None: no such rule."""

    keep: int | None = None
    older_than: timedelta | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`removed`: what the rule removes. `kept`: run -> why it is kept although the rule would remove it."""

    removed: tuple[RunEntry, ...]
    kept: dict[str, str]


def parse_age(text: str) -> timedelta:
    """36h, 30d or 8w. Raises ConfigRefused."""
    match = AGE.fullmatch(text)
    if not match:
        raise ConfigRefused(f"--older-than {text}: give hours, days or weeks, such as 36h, 30d or 8w")
    return timedelta(hours=int(match[1]) * HOURS[match[2]])


def choose(every: Sequence[RunEntry], matching: Sequence[RunEntry], rule: Rule, now: datetime) -> Selection:
    """Apply the rule to the `matching` runs. `every`: all runs of the folder, since any of them may need one of these."""
    newest = sorted(matching, key=lambda entry: entry.ended_at, reverse=True)
    taken = newest[rule.keep or 0 :]
    taken = [entry for entry in taken if rule.older_than is None or now - entry.ended_at > rule.older_than]
    users = find_references(every)
    kept = {entry.run_id: why for entry in taken if (why := reason_to_keep(entry, users.get(entry.run_id, [])))}
    return Selection(removed=tuple(entry for entry in taken if entry.run_id not in kept), kept=kept)


def reason_to_keep(entry: RunEntry, users: Sequence[str]) -> str:
    """'' if it can be removed. `users`: the runs that need it."""
    if users:
        return f"needed by {', '.join(users[:3])}{' and others' if len(users) > 3 else ''}"
    if entry.tags:
        return f"tagged {', '.join(entry.tags)}"
    if entry.folder.is_symlink():
        return "its folder is a symbolic link"
    if entry.problem:
        return f"{RECORD_FILE} cannot be read"
    if entry.record is None:
        return "it has no record: it may still be running on its nodes (omnilaunch stop, or attach)"
    if is_locked(entry.folder):
        return "a launcher supervises it"
    return ""


def find_references(every: Sequence[RunEntry]) -> dict[str, list[str]]:
    """Run -> the other runs that need it. A file that cannot be parsed needs every run whose name stands in it."""
    names = {entry.run_id for entry in every}
    users: dict[str, list[str]] = {}
    for entry in every:
        for name in sorted(names_in(entry.folder, names) - {entry.run_id}):
            users.setdefault(name, []).append(entry.run_id)
    return users


def names_in(folder: Path, names: set[str]) -> set[str]:
    found: set[str] = set()
    for path in (*(folder / name for name in REFERRING), *attempt_files(folder, PLAN_FILE)):
        problems: list[str] = []
        data = read_json(path, problems)
        if problems:
            text = read_bytes(path).decode(errors="replace")
            found |= {name for name in names if name in text}
        for key, value in find_texts(data, ""):
            parts = re.split(r"[/:\\,=\s]+", value)
            in_runs = (after for before, after in pairwise(parts) if before == folder.parent.name)
            found |= names & {*(parts if key.endswith(NAMING) else in_runs)}
    return found


def find_texts(data: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in JSON data."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from find_texts(value, f"{key}.{name}")
    elif isinstance(data, list):
        for value in data:
            yield from find_texts(value, key)


def remove_runs(entries: Sequence[RunEntry]) -> Iterator[str]:
    """Yields the name of each run that was removed. A folder is renamed first, so that no run ever exists with half of its files. Raises
    RunEnded after all were tried, with those that could not be removed."""
    failures = []
    for entry in entries:
        aside = entry.folder.with_name(f"{REMOVING}{entry.run_id}")
        try:
            if aside.exists():
                shutil.rmtree(aside)
            entry.folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            failures.append(f"  {error.filename or aside}: {error.strerror}")
            continue
        yield entry.run_id
    if failures:
        lines = "\n".join(failures)
        raise RunEnded(
            f"{plural(len(failures), 'run')} could not be removed; what is left is unchanged, or has a name that begins with {REMOVING!r}:\n{lines}"
        )
