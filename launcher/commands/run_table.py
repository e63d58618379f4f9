"""The runs of a folder as a table of 80 columns for a terminal, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from launcher.plan.text import figure, measure, shorten, size
from launcher.record.index import OPEN, RunEntry, size_bytes
from launcher.record.reader import nested
from launcher.record.record import RECORD_FILE
from launcher.redact import printable

COLUMNS = 80
LONG_ID = 16  # a longer name gets a line of its own
RIGHT = ("when", "steps", "loss", "score", "size")
# What is shortened where a table is too wide, in this order, and to how many columns.
SHORTENED = (("tags", 6), ("model", 10), ("hardware", 7), ("stage", 6), ("model", 5), ("tags", 1), ("hardware", 4), ("stage", 4))


@dataclass(frozen=True, kw_only=True)
class TableStyle:
    """`width`: of the terminal, at least COLUMNS. `names`: run id -> a shorter name that finds the run. `disk`: the size of each in place of
    its results."""

    width: int = COLUMNS
    names: dict[str, str]
    disk: bool = False


def describe_entries(entries: Sequence[RunEntry], style: TableStyle, now: datetime) -> str:
    """A header, a row for each run, and below them what the rows cannot hold."""
    sizes = {entry.run_id: size_bytes(entry.folder) for entry in entries} if style.disk else {}
    rows = [cells_of(entry, style, now, sizes.get(entry.run_id)) for entry in entries]
    lines = lay_out(rows, max(style.width, COLUMNS))
    lines += [printable(f"{style.names[entry.run_id]}: {RECORD_FILE} {entry.problem}") for entry in entries if entry.problem]
    if any(entry.status == OPEN for entry in entries):
        lines.append("open: no record and no launcher: it runs in the background, or was killed. To see which: omnilaunch status ID")
    others = {entry.score[0] for entry in entries if entry.score} - {"exact_match"}
    if others:
        lines.append(f"score: exact match, or where another metric was asked for, that one ({', '.join(sorted(others))})")
    if sizes:
        lines.append(f"{count_runs(len(entries))}, {size(sum(sizes.values()))} on this machine; other nodes keep their own checkpoints")
    return "\n".join(lines)


def cells_of(entry: RunEntry, style: TableStyle, now: datetime, size_on_disk: int | None) -> dict[str, str]:
    axes = {axis: printable(str(nested(entry.config, axis, "name") or "")) for axis in ("model", "stage", "hardware")}
    results = {
        "steps": f"{entry.steps:,}" if entry.steps else "",
        "loss": figure(entry.loss) if entry.loss is not None else "",
        "score": figure(entry.score[1]) if entry.score else "",
    }
    return {
        "id": printable(style.names[entry.run_id]),
        "when": describe_age((now - entry.started_at).total_seconds()),
        **axes,
        "state": entry.status,
        **(results if size_on_disk is None else {"size": size(size_on_disk)}),
        "tags": printable(" ".join(f"#{tag}" for tag in entry.tags)),
    }


def describe_age(seconds: float) -> str:
    """In one unit: `40s`, `59min`, `23h`, `364d`."""
    if seconds < 60:
        return f"{int(max(0, seconds))}s"
    for unit, length, limit in (("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds // 86400:.0f}d"


def lay_out(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """The lines of a table that is as wide as its cells, or `width`. A name that is too long for its column gets a line of its own."""
    names = [name for name in rows[0] if name in ("id", "state") or any(row[name] for row in rows)]
    table = [{name: name for name in names}, *rows]
    widths = {name: max(measure(row[name]) for row in table if name != "id" or measure(row[name]) <= LONG_ID) for name in names}
    gap = 2 if sum(widths.values()) + 2 * (len(names) - 1) <= width else 1
    for name, least in SHORTENED:
        excess = sum(widths.values()) + gap * (len(names) - 1) - width
        if name in widths and excess > 0:
            widths[name] = max(min(widths[name], least), widths[name] - excess)
    lines = []
    for row in table:
        cells = {name: row[name] if name == "id" else shorten(row[name], widths[name]) for name in names}
        if measure(row["id"]) > LONG_ID:
            lines.append(row["id"])
            cells["id"] = ""
        lines.append((" " * gap).join(pad(cells[name], widths[name], right=name in RIGHT) for name in names).rstrip())
    return lines


def pad(text: str, width: int, *, right: bool) -> str:
    blank = " " * (width - measure(text))
    return f"{blank}{text}" if right else f"{text}{blank}"


def count_runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


def entries_json(entries: Sequence[RunEntry], *, disk: bool = False) -> str:
    return json.dumps([plain_entry(entry, disk=disk) for entry in entries], indent=2, ensure_ascii=False)


def plain_entry(entry: RunEntry, *, disk: bool) -> dict[str, Any]:
    axes = {axis: nested(entry.config, axis, "name") for axis in ("model", "stage", "hardware")}
    return {
        "run_id": entry.run_id,
        "started_at": entry.started_at.isoformat(timespec="seconds"),
        **axes,
        "status": entry.status,
        "steps": entry.steps,
        "loss": entry.loss,
        "score": dict([entry.score]) if entry.score else None,
        "problem": entry.problem,
        "tags": list(entry.tags),
        "record": asdict(entry.record) if entry.record else None,
        **({"disk_bytes": size_bytes(entry.folder)} if disk else {}),
    }
