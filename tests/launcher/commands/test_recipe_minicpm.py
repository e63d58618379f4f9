"""The tiny MiniCPM-V 2.6 and o 2.6 on real digits, with the recipes of conf/tune: full training, the same on two ranks with ZeRO 3, the
projector again, and LoRA."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.launcher.commands.recipe import changed_tensors, launch_all, record_of

pytestmark = pytest.mark.long  # five times a minute on two quiet cores

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
    return launch_all(tmp_path_factory.mktemp("recipe"), RECIPE, limit_s=LIMIT_S)


@pytest.mark.parametrize("run_id", RECIPE)
def test_every_stage_learns_the_digits(run_id: str, root: Path) -> None:
    evaluation = record_of(root, run_id).evaluation
    assert evaluation["count"] == 297 and evaluation["exact_match"] >= 0.85


def test_frozen_groups_are_bitwise_unchanged(root: Path) -> None:
    changed, names = changed_tensors(root, "whole", "aligned")
    assert changed == {name for name in names if name.startswith("resampler.")}


def test_adapters_are_only_in_the_decoder(root: Path) -> None:
    checkpoint = root / "runs/adapted" / record_of(root, "adapted").checkpoint
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    assert not (checkpoint / "model.safetensors").exists()
    assert adapters and all(re.search(r"\.llm\.model\.layers\.\d+\.(self_attn|mlp)\.", name) for name in adapters)
