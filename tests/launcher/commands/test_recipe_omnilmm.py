"""The tiny OmniLMM 3B and 12B on real digits: full training, the same on two ranks with ZeRO 3, the projector again, and LoRA."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.launcher.commands.recipe import changed_tensors, launch_all, record_of

pytestmark = pytest.mark.long  # eight times up to a minute on two quiet cores

RECIPE = {
    "whole": ("stage=full",),
    "apart": ("stage=full", "strategy=zero3", "cluster.devices_per_node=2", "hardware.threads=1"),
    "aligned": ("stage=projector", "stage.checkpoint=whole", "stage.reset=[projector]"),
    "adapted": ("stage=lora", "stage.checkpoint=whole", "data=digits_large"),
}
PROJECTOR = {"tiny_omnilmm_3b": r"resampler\.", "tiny_omnilmm_12b": r"model\.resampler\."}  # as the published files have it
TOWER = {"tiny_omnilmm_3b": "vpm", "tiny_omnilmm_12b": "vision_tower"}
LIMIT_S = 2400  # of one run, on a machine that has other things to do


@pytest.fixture(scope="module", params=PROJECTOR)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def root(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the four runs."""
    return launch_all(tmp_path_factory.mktemp(model), RECIPE, f"model={model}", limit_s=LIMIT_S)


@pytest.mark.parametrize("run_id", RECIPE)
def test_every_stage_learns_its_question(run_id: str, root: Path) -> None:
    evaluation = record_of(root, run_id).evaluation
    assert evaluation["count"] == 297 and evaluation["exact_match"] >= 0.85


def test_frozen_groups_are_bitwise_unchanged(model: str, root: Path) -> None:
    changed, names = changed_tensors(root, "whole", "aligned")
    fixed = {name for name in names if name.endswith("resampler.pos_embed")}  # sines, which nothing trains
    assert changed == {name for name in names if re.match(PROJECTOR[model], name)} - fixed
    adapter = root / "runs/adapted" / record_of(root, "adapted").checkpoint
    assert not (adapter / "model.safetensors").exists()
    assert not [name for name in load_file(adapter / "adapter_model.safetensors") if "resampler" in name or TOWER[model] in name]


def test_the_records_name_the_runs_that_they_started_from(root: Path) -> None:
    parent = record_of(root, "whole")
    for run_id in ("aligned", "adapted"):
        origin = record_of(root, run_id).origin
        assert (origin.run_id, origin.step, origin.weights_sha256) == ("whole", parent.steps, parent.weights_sha256)
