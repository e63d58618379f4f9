"""The runs of a folder: find, filter, tag and measure them."""

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
from launcher.record.reader import nested, read_as, read_object
from launcher.record.record import CONFIG_FILE, RECORD_FILE, Record
from trainer import contract
from trainer.contract import SCHEMA

TAGS_FILE = "tags.json"  # not a part of the record
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,49}")
OPEN = "open"  # a run without a record: it is still running, or its launcher was killed
STATUSES = ("finished", "stopped", "failed", "refused", OPEN)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run of the folder. `record` None: there is none, or it cannot be read for the reason in `problem`."""

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


# ------------------------------------------------------------------------------------------------------------------- text


def describe_entries(entries: Sequence[RunEntry], *, disk: bool = False) -> str:
    """One line for each run, the newest last; with `disk` its size, and a line with the sum."""
    sizes = [size_bytes(entry.folder) for entry in entries] if disk else []
    lines = [
        "  ".join(part for part in (f"{entry.run_id:50}", in_mb(sizes[place]) if disk else "", describe_entry(entry)) if part).rstrip()
        for place, entry in enumerate(entries)
    ]
    if disk:
        lines.append(f"{f'{len(entries)} run(s)':50}  {in_mb(sum(sizes))}  on this machine; other nodes keep their own checkpoints")
    return "\n".join(lines)


def in_mb(size: int) -> str:
    return f"{size / 1e6:10,.1f} MB"


def describe_entry(entry: RunEntry) -> str:
    record = entry.record
    if record is None:
        return f"{RECORD_FILE} cannot be read: {entry.problem}" if entry.problem else "no record: still running, or its launcher was killed"
    figures = "  ".join(f"{name} {figure(value)}" for name, value in record.evaluation.items() if name != "count")
    loss = f"loss {record.final_loss:.4f}" if record.final_loss is not None else ""
    tags = " ".join(f"#{tag}" for tag in entry.tags)
    steps = f"{record.steps:6} steps" if record.steps or record.status != "finished" else " " * 12  # a stage without training has none
    return f"{record.status:9} {steps}  {loss}  {figures}  {tags}".rstrip()


def figure(value: float) -> str:
    """Integers without a fraction, small numbers with an exponent."""
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
