"""The runs of a folder: found, filtered, tagged, measured."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.config.schema import AXES
from launcher.errors import ConfigRefused, suggest
from launcher.record.reader import read_as, read_object
from launcher.record.record import CONFIG_FILE, RECORD_FILE, Record
from trainer import contract
from trainer.contract import SCHEMA

TAGS_FILE = "tags.json"  # beside the record, and no part of it
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,49}")
OPEN = "open"  # of a run without a record: under way, or its launcher was killed
STATUSES = ("finished", "stopped", "failed", "refused", OPEN)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One folder. `problem`: why its record cannot be read, '' where it can or where there is none."""

    folder: Path
    record: Record | None
    problem: str = ""

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        return self.record.status if self.record else "unreadable" if self.problem else OPEN

    @property
    def age_of(self) -> datetime:
        """When it ended, or when something was last written to its folder."""
        try:
            ended = datetime.fromisoformat(self.record.ended_at) if self.record else None
        except ValueError:
            ended = None
        if ended is None or ended.tzinfo is None:
            return datetime.fromtimestamp(self.folder.stat().st_mtime, UTC)
        return ended

    @cached_property
    def config(self) -> dict[str, Any]:
        """As it was composed; {} where it cannot be read."""
        return read_object(self.folder / CONFIG_FILE, [])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        tags = read_object(self.folder / TAGS_FILE, []).get("tags")
        return tuple(map(str, tags)) if isinstance(tags, list) else ()


@dataclass(frozen=True, kw_only=True)
class Filter:
    """`keys`: (dotted key of the config, or an axis; value as text)."""

    status: str = ""
    model: str = ""
    tag: str = ""
    keys: tuple[tuple[str, str], ...] = ()

    def takes(self, entry: RunEntry) -> bool:
        if self.status and entry.status != self.status:
            return False
        if self.tag and self.tag not in entry.tags:
            return False
        keys = (*self.keys, *((("model", self.model),) if self.model else ()))
        return all(value_of(entry.config, key) == value for key, value in keys)


def list_entries(runs: Path) -> tuple[RunEntry, ...]:
    """By name, which is by time where nobody chose it. Raises ConfigRefused where the folder of the runs is a file."""
    if runs.is_file():
        raise ConfigRefused(
            f"{runs} is a file, and runs lie in a folder of that name: rename it, or name another place with cluster.root=FOLDER"
        )
    folders = sorted(Path(entry.path) for entry in os.scandir(runs) if entry.is_dir()) if runs.is_dir() else []
    return tuple(read_entry(folder) for folder in folders if not folder.name.startswith("."))


def read_entry(folder: Path) -> RunEntry:
    problems: list[str] = []
    record = read_as(Record, folder / RECORD_FILE, problems)
    return RunEntry(folder=folder, record=record, problem="; ".join(problems).removeprefix(f"{RECORD_FILE} "))


def parse_filter(words: Sequence[str], *, status: str, model: str, tag: str) -> Filter:
    """Raises ConfigRefused for a word that is no KEY=VALUE, and for a status that no run can have."""
    if status and status not in STATUSES:
        raise ConfigRefused(f"--status {status}: {suggest(status, STATUSES)}")
    pairs = [word.partition("=") for word in words]
    wrong = next((word for word, (key, equals, _) in zip(words, pairs, strict=True) if not key or not equals), None)
    if wrong is not None:
        raise ConfigRefused(f"{wrong!r} is no KEY=VALUE; write an axis (stage=lora) or a key of the config (run.seed=1), or: tag, prune")
    return Filter(status=status, model=model, tag=tag, keys=tuple((key, value) for key, _, value in pairs))


def value_of(config: dict[str, Any], key: str) -> str | None:
    """As it is written in an override; None where there is no such key."""
    data: Any = config
    for part in (key, "name") if key in AXES else key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    if data is None or isinstance(data, str):
        return data
    return json.dumps(data)


def require_key(entries: Sequence[RunEntry], chosen: Filter) -> None:
    """Raises ConfigRefused for a key that the config of no run has: no run would be listed, and nobody would know why."""
    for key, _ in chosen.keys:
        if entries and all(value_of(entry.config, key) is None for entry in entries):
            raise ConfigRefused(f"the config of no run has {key!r}, or it is null in all of them; config.json of a run shows the keys")


# ------------------------------------------------------------------------------------------------------------------- tags


def tag_run(entry: RunEntry, tags: Sequence[str], *, remove: bool) -> tuple[str, ...]:
    """The run's tags afterwards. Raises ConfigRefused for what can be no tag."""
    wrong = next((tag for tag in tags if not TAG.fullmatch(tag)), None)
    if wrong is not None:
        raise ConfigRefused(f"tag {wrong!r}: a tag is 1 to 50 letters, digits, '_', '.' and '-', and begins with a letter or digit")
    kept = [tag for tag in entry.tags if tag not in tags]
    after = tuple(kept if remove else sorted({*kept, *tags}))
    contract.write_text(json.dumps({"schema": SCHEMA, "tags": after}, indent=2) + "\n", entry.folder / TAGS_FILE)
    return after


# ------------------------------------------------------------------------------------------------------------------- room


def size_bytes(folder: Path) -> int:
    """What the files below take on this machine's disk; links count as links. What cannot be looked into counts as nothing."""
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


# ------------------------------------------------------------------------------------------------------------------- text


def describe_entries(entries: Sequence[RunEntry], *, disk: bool = False) -> str:
    """One line a run, newest last; with `disk` what it takes, and a line for all."""
    sizes = [size_bytes(entry.folder) for entry in entries] if disk else []
    lines = [
        "  ".join(part for part in (f"{entry.run_id:50}", in_mb(sizes[place]) if disk else "", describe_entry(entry)) if part).rstrip()
        for place, entry in enumerate(entries)
    ]
    if disk:
        lines.append(f"{f'{len(entries)} run(s)':50}  {in_mb(sum(sizes))}  on this machine; nodes elsewhere hold checkpoints of their own")
    return "\n".join(lines)


def in_mb(size: int) -> str:
    return f"{size / 1e6:10,.1f} MB"


def describe_entry(entry: RunEntry) -> str:
    record = entry.record
    if record is None:
        return f"{RECORD_FILE} cannot be read: {entry.problem}" if entry.problem else "no record: under way, or its launcher was killed"
    figures = "  ".join(f"{name} {figure(value)}" for name, value in record.evaluation.items() if name != "count")
    loss = f"loss {record.final_loss:.4f}" if record.final_loss is not None else ""
    tags = " ".join(f"#{tag}" for tag in entry.tags)
    steps = f"{record.steps:6} steps" if record.steps or record.status != "finished" else " " * 12  # what follows training has none
    return f"{record.status:9} {steps}  {loss}  {figures}  {tags}".rstrip()


def figure(value: float) -> str:
    """Whole numbers whole, small ones by their powers."""
    if math.isfinite(value) and value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2e}"


def entries_json(entries: Sequence[RunEntry], *, disk: bool = False) -> str:
    plain = [
        {"run_id": entry.run_id, "status": entry.status, "problem": entry.problem, "tags": list(entry.tags)}
        | {"record": asdict(entry.record) if entry.record else None}
        | ({"disk_bytes": size_bytes(entry.folder)} if disk else {})
        for entry in entries
    ]
    return json.dumps(plain, indent=2, ensure_ascii=False)
