"""The tiny MiniCPM-V 2.6 and o 2.6 on real digits, with the recipes of conf/tune: full training, the same on two ranks with ZeRO 3, the
projector again, and LoRA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from launcher.record.record import RECORD_FILE, Record
from trainer import contract

pytestmark = pytest.mark.long  # five times a minute on two quiet cores

PROJECT = Path(__file__).resolve().parents[3]
VISION = "model=tiny_minicpm_v_2_6"
RECIPE = {
    "whole": (VISION, "stage=full"),
    "apart": (VISION, "stage=full", "strategy=zero3", "cluster.devices_per_node=2", "hardware.threads=1"),
    "aligned": (VISION, "stage=projector", "stage.checkpoint=whole", "stage.reset=[projector]"),
    "adapted": (VISION, "stage=lora", "stage.checkpoint=whole", "data=digits_large"),
    "omni": ("model=tiny_minicpm_o_2_6", "stage=full"),
}
LIMIT_S = 2400  # of one run, on a machine that has other things to do


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs."""
    root = tmp_path_factory.mktemp("recipe")
    for run_id, words in RECIPE.items():
        command = (sys.executable, "-m", "launcher.cli", "launch", f"cluster.root={root}", *words, "--run-id", run_id)
        done = subprocess.run(command, cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def record_of(root: Path, run_id: str) -> Record:
    record: Record = contract.read(Record, root / "runs" / run_id / RECORD_FILE)
    return record


@pytest.mark.parametrize("run_id", RECIPE)
def test_every_stage_learns_the_digits(run_id: str, root: Path) -> None:
    evaluation = record_of(root, run_id).evaluation
    assert evaluation["count"] == 297 and evaluation["exact_match"] >= 0.85


def test_frozen_groups_are_bitwise_unchanged(root: Path) -> None:
    before, after = (load_file(root / "runs" / run / record_of(root, run).checkpoint / "model.safetensors") for run in ("whole", "aligned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if name.startswith("resampler.")}


def test_adapters_are_only_in_the_decoder(root: Path) -> None:
    checkpoint = root / "runs/adapted" / record_of(root, "adapted").checkpoint
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    assert not (checkpoint / "model.safetensors").exists()
    assert adapters and all(re.search(r"\.llm\.model\.layers\.\d+\.(self_attn|mlp)\.", name) for name in adapters)
