"""The two-stage recipe on real digits, and then LoRA: four runs that find each other's results by run id."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.launcher.commands.recipe import changed_tensors, launch_all, record_of

pytestmark = pytest.mark.long  # four times half a minute on two quiet cores

RECIPE = {
    "tower": ("stage=full",),
    "aligned": ("stage=projector", "stage.checkpoint=tower", "stage.reset=[projector]"),
    "tuned": ("stage=lm", "stage.checkpoint=aligned", "data=digits_even"),
    "adapted": ("stage=lora", "stage.checkpoint=tuned", "data=digits_large"),
}
GROUPS = {"vision": r"^vision_tower\.", "projector": r"^multi_modal_projector\.", "lm": r"^language_model\."}  # as LLaVA is saved
LIMIT_S = 1200  # of one run, on a machine that has other things to do


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the four runs."""
    return launch_all(tmp_path_factory.mktemp("recipe"), RECIPE, limit_s=LIMIT_S)


def changed(root: Path, first: str, second: str) -> set[str]:
    """Groups with at least one tensor that differs."""
    names, _ = changed_tensors(root, first, second)
    return {next((group for group, regex in GROUPS.items() if re.match(regex, name)), name) for name in names}


@pytest.mark.parametrize(("run_id", "least"), [("tower", 0.93), ("aligned", 0.85), ("tuned", 0.9), ("adapted", 0.85)])
def test_every_stage_learns_its_question(run_id: str, least: float, root: Path) -> None:
    evaluation = record_of(root, run_id).evaluation
    assert evaluation["count"] == 297 and evaluation["exact_match"] >= least


def test_frozen_groups_are_bitwise_unchanged(root: Path) -> None:
    assert changed(root, "tower", "aligned") == {"projector"}
    assert changed(root, "aligned", "tuned") == {"projector", "lm"}
    adapter = root / "runs/adapted" / record_of(root, "adapted").checkpoint
    assert not (adapter / "model.safetensors").exists()
    assert all(".language_model." in name for name in load_file(adapter / "adapter_model.safetensors"))


def test_the_records_name_the_runs_that_they_started_from(root: Path) -> None:
    for before, after in zip(RECIPE, list(RECIPE)[1:], strict=False):
        origin, parent = record_of(root, after).origin, record_of(root, before)
        assert (origin.run_id, origin.step, origin.weights_sha256) == (before, parent.steps, parent.weights_sha256)
    assert record_of(root, "tower").origin.run_id == ""
