"""Several runs on this machine, one after the other, that find each other's results by run id."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import load_file

from launcher.record.record import RECORD_FILE, Record
from trainer import contract

PROJECT = Path(__file__).resolve().parents[3]


def launch_all(root: Path, recipe: Mapping[str, tuple[str, ...]], *words: str, limit_s: float) -> Path:
    """`recipe`: run id -> its overrides; `words`: of all runs; `limit_s`: of one run, on a machine that has other things to do."""
    for run_id, own in recipe.items():
        command = (sys.executable, "-m", "launcher.cli", "launch", f"cluster.root={root}", *words, *own, "--run-id", run_id)
        done = subprocess.run(command, cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, timeout=limit_s)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def record_of(root: Path, run_id: str) -> Record:
    record: Record = contract.read(Record, root / "runs" / run_id / RECORD_FILE)
    return record


def changed_tensors(root: Path, first: str, second: str) -> tuple[set[str], set[str]]:
    """(the tensors of two runs that differ in a bit, all tensors)"""
    before, after = (load_file(root / "runs" / run / record_of(root, run).checkpoint / "model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}, set(before)
