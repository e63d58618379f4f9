"""A model that was trained on the digits still answers after int8 quantization, with the real command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.record.record import RECORD_FILE, Record
from trainer import contract

pytestmark = pytest.mark.long  # a full run of half a minute on two quiet cores, and a minute for the rest

PROJECT = Path(__file__).resolve().parents[3]
LIMIT_S = 1200  # of one run, on a machine that has other things to do
STEPS = {
    "tower": ("stage=full",),
    "int8": ("stage=quantize", "stage.checkpoint=tower", "stage.quantization.calibration=32"),
    "again": ("stage=evaluate", "stage.checkpoint=int8"),
}


def test_int8_loses_at_most_one_percent_of_the_digits(tmp_path: Path) -> None:
    found: dict[str, dict[str, float]] = {}
    for run_id, words in STEPS.items():
        command = (sys.executable, "-m", "launcher.cli", "launch", f"cluster.root={tmp_path}", *words, "--run-id", run_id)
        done = subprocess.run(command, cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        record: Record = contract.read(Record, tmp_path / "runs" / run_id / RECORD_FILE)
        found[run_id] = record.evaluation
    assert found["tower"]["exact_match"] >= 0.93
    assert found["int8"]["exact_match_before"] == found["tower"]["exact_match"]
    assert found["int8"]["exact_match"] == found["again"]["exact_match"] >= found["tower"]["exact_match"] - 0.01
