"""The record of a real run (tests/golden/record/1: three steps on a CPU), copied and changed in one place; and real runs of a cloned tree."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.plan.plan import Plan, to_plain
from launcher.record.checksums import SEAL_FILE, make_seal
from launcher.record.record import RECORD_FILE
from trainer import contract
from trainer.contract import METRICS_FILE

PROJECT = Path(__file__).resolve().parents[2]
REAL = Path(__file__).resolve().parents[1] / "golden" / "record" / "1"

Change = Callable[[Path], None]


def copy_run(runs: Path, name: str, *changes: Change) -> Path:
    folder = runs / name
    shutil.copytree(REAL, folder)
    for change in changes:
        change(folder)
    return folder


def write_run(folder: Path, plan: Plan) -> Path:
    """The folder of a run that has not ended: its plan, and an empty logs/."""
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(to_plain(plan)), encoding="utf-8")
    return folder


def set_value(file: str, key: str, value: Any) -> Change:
    """`key` is dotted; a number in it is an index of a list."""

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
    """Change every row of the metrics, and the final loss in the record."""

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
    """The same run with more steps; loss and seconds are functions of the step."""

    def change(folder: Path) -> None:
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        write_rows(folder, [row | {"step": n, "steps": steps, "loss": loss(n), "seconds": seconds(n)} for n in range(1, steps + 1)])

    return change


# --------------------------------------------------------------------------------------------------------------- whole runs


def rows_of(folder: Path, name: str = "") -> list[dict[str, Any]]:
    """Of run `name` below the folder, or of the run that the folder is. Without what a clock or a memory gauge says."""
    rows = [json.loads(line) for line in (run_in(folder, name) / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_bytes")} for row in rows]


def result_of(folder: Path, name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_in(folder, name) / RECORD_FILE).read_text())
    return found


def run_in(folder: Path, name: str) -> Path:
    return folder / "runs" / name if name else folder


def clone_tree(project: Path) -> Path:
    """Copy this tree, with its uncommitted changes, as the first commit of a new repository."""
    for name in ("images", "trainer", "launcher", "conf"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(
        PROJECT / ".gitignore", project / ".gitignore"
    )  # otherwise the bytecode of the first run would be an uncommitted change
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "first")):
        subprocess.run(("git", *words), cwd=project, check=True)
    return project


def omnilaunch(project: Path, here: Path, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    here.mkdir(exist_ok=True)
    command = (sys.executable, "-m", "launcher.cli", *words)
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": str(project)}
    return subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, timeout=900)


def reseal(record: Path) -> None:
    contract.write(make_seal(record, "first", unwritten={}), record / SEAL_FILE)
