"""A real run's record (tests/golden/record/1: three steps on a CPU) to be copied and to be changed in one thing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

REAL = Path(__file__).resolve().parents[1] / "golden" / "record" / "1"

Change = Callable[[Path], None]


def copy_run(runs: Path, name: str, *changes: Change) -> Path:
    folder = runs / name
    shutil.copytree(REAL, folder)
    for change in changes:
        change(folder)
    return folder


def set_value(file: str, key: str, value: Any) -> Change:
    """`key` is dotted; a number in it is a place in a list."""

    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        *way, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        inner = data
        for part in way:
            inner = inner[part]
        inner[last] = value
        (folder / file).write_text(json.dumps(data))

    return change


def set_rows(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """Every row of the metrics, and the final loss that the record says of them."""

    def change(folder: Path) -> None:
        rows = [edit(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        write_rows(folder, rows)

    return change


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in ("result.json", "train_result.json"):
        set_value(file, "final_loss", rows[-1]["loss"])(folder)
        set_value(file, "steps", len(rows))(folder)


def stretch(steps: int, *, loss: Callable[[int], float], seconds: Callable[[int], float]) -> Change:
    """The same run with more steps, of rows that a function tells."""

    def change(folder: Path) -> None:
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        write_rows(folder, [row | {"step": n, "steps": steps, "loss": loss(n), "seconds": seconds(n)} for n in range(1, steps + 1)])

    return change
