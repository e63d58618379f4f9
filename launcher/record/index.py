"""The runs of a folder: find, filter, sort, tag and measure them. `launcher.commands.run_table` shows them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.config.schema import AXES
from launcher.errors import ConfigRefused, suggest
from launcher.record.lock import is_locked
from launcher.record.metrics import TAIL_BYTES, parse_row
from launcher.record.reader import nested, read_as, read_object
from launcher.record.record import CONFIG_FILE, PLAN_FILE, RECORD_FILE, Record
from launcher.record.run_name import read_start
from trainer import contract
from trainer.contract import METRICS_FILE, SCHEMA

TAGS_FILE = "tags.json"  # not a part of the record
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,49}")
RUNNING = "running"  # a launcher supervises it
OPEN = "open"  # a run without a record and without a launcher: it runs in the background, or its launcher was killed
UNREADABLE = "unreadable"  # its record cannot be read
STATUSES = ("finished", "stopped", "failed", "refused", RUNNING, OPEN, UNREADABLE)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run of the folder. `record` None: there is none, or it cannot be read for the reason in `problem`."""

    folder: Path
    record: Record | None
    problem: str = ""

    @property
    def run_id(self) -> str:
        return self.folder.name

    @cached_property
    def status(self) -> str:
        if self.record or self.problem:
            return self.record.status if self.record else UNREADABLE
        with suppress(OSError):  # the run of another user
            return RUNNING if is_locked(self.folder) else OPEN
        return OPEN

    @property
    def is_run(self) -> bool:
        """Not any other folder that lies among the runs."""
        return (self.folder / PLAN_FILE).exists() or (self.folder / RECORD_FILE).exists()

    @cached_property
    def started_at(self) -> datetime:
        """As `last` goes by it; for a folder without a plan, its last change."""
        try:
            return read_start(self.folder)[0]
        except OSError:
            return datetime.fromtimestamp(self.folder.stat().st_mtime, UTC)

    @cached_property
    def last_row(self) -> dict[str, Any]:
        """The newest whole row of metrics.jsonl; {} if there is none."""
        try:
            with (self.folder / METRICS_FILE).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return {}
        return next((row for line in reversed(lines[:-1]) if (row := parse_row(line))), {})

    @property
    def steps(self) -> int:
        """The steps that were done; 0 for a stage without training."""
        return self.record.steps if self.record else int(self.last_row.get("step", 0))

    @property
    def loss(self) -> float | None:
        return self.record.final_loss if self.record else self.last_row.get("loss")

    @property
    def score(self) -> tuple[str, float] | None:
        """(name, value) of the first metric of the evaluation that was asked for; None if there are no scores."""
        scores = self.record.evaluation if self.record else {}
        asked = nested(self.config, "run", "evaluation", "metrics")
        names = (*(asked if isinstance(asked, list) else ()), "exact_match")
        return next(((name, scores[name]) for name in names if name in scores), None)

    @property
    def ended_at(self) -> datetime:
        """For a run without a record, the last change of its folder."""
        try:
            ended = datetime.fromisoformat(self.record.ended_at) if self.record else None
        except ValueError:
            ended = None
        return ended if ended and ended.tzinfo else datetime.fromtimestamp(self.folder.stat().st_mtime, UTC)

    @cached_property
    def config(self) -> dict[str, Any]:
        """{} if it cannot be read."""
        return read_object(self.folder / CONFIG_FILE, [])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        tags = read_object(self.folder / TAGS_FILE, []).get("tags")
        return tuple(map(str, tags)) if isinstance(tags, list) else ()


@dataclass(frozen=True, kw_only=True)
class Filter:
    """`keys`: (an axis or a dotted key of the config, value as text)."""

    status: str = ""
    tag: str = ""
    keys: tuple[tuple[str, str], ...] = ()

    def takes(self, entry: RunEntry) -> bool:
        if (self.status and entry.status != self.status) or (self.tag and self.tag not in entry.tags):
            return False
        return all(value_of(entry.config, key) == value for key, value in self.keys)


def list_entries(runs: Path) -> tuple[RunEntry, ...]:
    """Sorted by name, which begins with the time unless --run-id was given. Raises ConfigRefused if `runs` is a file."""
    if runs.is_file():
        raise ConfigRefused(
            f"{runs} is a file, but must be the folder of the runs: rename it, or choose another folder with cluster.root=FOLDER"
        )
    folders = sorted(Path(entry.path) for entry in os.scandir(runs) if entry.is_dir()) if runs.is_dir() else []
    return tuple(read_entry(folder) for folder in folders if not folder.name.startswith("."))


def read_entry(folder: Path) -> RunEntry:
    problems: list[str] = []
    record = read_as(Record, folder / RECORD_FILE, problems)
    return RunEntry(folder=folder, record=record, problem="; ".join(problems).removeprefix(f"{RECORD_FILE} "))


def parse_filter(words: Sequence[str], *, status: str, model: str, tag: str) -> Filter:
    """Raises ConfigRefused for a word that is not KEY=VALUE, and for an unknown status."""
    if status and status not in STATUSES:
        raise ConfigRefused(f"--status {status}: {suggest(status, STATUSES)}")
    keys = [("model", model)] if model else []
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ConfigRefused(
                f"{word!r} is not KEY=VALUE: give an axis (stage=lora), a key of the config (run.seed=1), or one of tag, prune"
            )
        keys.append((key, value))
    return Filter(status=status, tag=tag, keys=tuple(keys))


def value_of(config: dict[str, Any], key: str) -> str | None:
    """As it is written in an override; None if there is no such key."""
    value = nested(config, *((key, "name") if key in AXES else key.split(".")))
    return value if value is None or isinstance(value, str) else json.dumps(value)


def require_key(entries: Sequence[RunEntry], chosen: Filter) -> None:
    """Raises ConfigRefused for a key that no run has: an empty list would not show why."""
    for key, _ in chosen.keys:
        if entries and all(value_of(entry.config, key) is None for entry in entries):
            raise ConfigRefused(
                f"the config of no run has the key {key!r}, or it is null in all of them. See config.json in a run's folder"
            )


def tag_run(entry: RunEntry, tags: Sequence[str], *, remove: bool) -> tuple[str, ...]:
    """The run's tags afterwards. Raises ConfigRefused for a text that cannot be a tag."""
    wrong = next((tag for tag in tags if not TAG.fullmatch(tag)), None)
    if wrong is not None:
        raise ConfigRefused(f"tag {wrong!r}: a tag is 1 to 50 letters, digits, '_', '.' and '-', and begins with a letter or digit")
    kept = [tag for tag in entry.tags if tag not in tags]
    after = tuple(kept if remove else sorted({*kept, *tags}))
    contract.write_text(json.dumps({"schema": SCHEMA, "tags": after}, indent=2) + "\n", entry.folder / TAGS_FILE)
    return after


def size_bytes(folder: Path) -> int:
    """The disk space of the files below. A link counts as itself; a folder that cannot be read counts as 0."""
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in walk(folder))


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
