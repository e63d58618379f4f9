"""Complete runs of tiny MiniCPM 2.6 models from a folder like the published ones, and refusals before the first step."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import Made
from tests.trainer.mortal import expect, run_ranks
from trainer.__main__ import main
from trainer.contract import DATA_FILE, SPEC_FILE, DataReport, Evaluation, Exit, FailureReport, Source, TrainResult, TrainSpec, read, write

pytestmark = pytest.mark.usefixtures("one_thread")
Start = Callable[..., TrainSpec]


@pytest.fixture
def start_from(tiny_spec: Callable[..., TrainSpec]) -> Start:
    """The spec of one step on the digits, from the checkpoint in a folder."""

    def make(made: Made, folder: Path, **changes: Any) -> TrainSpec:
        spec = tiny_spec(changes={"steps": 1, "evaluation": Evaluation(enabled=False)}, **changes)
        return replace(spec, model=replace(made.spec.model, source=Source(kind="path", path=str(folder))))

    return make


def publish_pickled(made: Made, folder: Path, carried: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Writes its weights and `carried` as two pytorch_model*.bin with an index, without safetensors."""
    shutil.copytree(made.folder, folder)
    weights = {**load_file(folder / "model.safetensors"), **carried}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {f"pytorch_model-0000{place}-of-00002.bin": names[place - 1 :: 2] for place in (1, 2)}
    for file, own in parts.items():
        torch.save({name: weights[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return weights


# -------------------------------------------------------------------------------------------------------------- whole runs


SOUND = {
    "apm.conv1.weight": torch.ones(4, 3).bfloat16(),
    "audio_projection_layer.linear1.bias": torch.ones(4),
    "tts.dvae.coef": torch.ones(1),
}


@pytest.mark.parametrize(("name", "carried"), [("tiny_minicpm_v_2_6", {}), ("tiny_minicpm_o_2_6", SOUND)])
def test_a_run_from_pickled_files_saves_safetensors(
    name: str, carried: dict[str, torch.Tensor], make_tiny: Callable[[str], Made], start_from: Start, tmp_path: Path
) -> None:
    made = make_tiny(name)
    before = publish_pickled(made, tmp_path / "published", carried)
    spec = start_from(made, tmp_path / "published")
    expect(run_ranks(spec), 0)
    saved = Path(spec.output) / read(TrainResult, Path(spec.output) / "train_result.json").checkpoint
    after = load_file(saved / "model.safetensors")
    assert not [*saved.glob("*.bin")]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in carried.items())
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in moved} == {"llm", "vpm", "resampler"}
    # One step of Adam changes no element by more than the learning rate, so the run started with the values of the folder.
    assert max(float((before[key] - after[key]).abs().max()) for key in before) <= 1.01 * spec.optimizer.lr


# --------------------------------------------------------------------------------------------------------------- bad input


def test_a_run_from_another_revision_lists_the_tensors(make_tiny: Callable[[str], Made], start_from: Start, tmp_path: Path) -> None:
    made = make_tiny("tiny_minicpm_v_2_6")
    shutil.copytree(made.folder, tmp_path / "published")
    weights = load_file(made.folder / "model.safetensors")
    weights["resampler.pos_embed"] = weights.pop("resampler.ln_q.bias")
    save_file(weights, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    spec = start_from(made, tmp_path / "published")
    gone = expect(run_ranks(spec), Exit.USAGE)
    assert "missing: resampler.ln_q.bias\n" in gone.text and "unexpected: resampler.pos_embed" in gone.text
    assert read(FailureReport, Path(spec.output) / "failure-rank0.json").kind == "InputRefused"
    assert not (Path(spec.output) / "metrics.jsonl").exists()


def test_the_data_check_reports_a_narrow_image_and_one_with_too_many_slices(
    make_tiny: Callable[[str], Made], start_from: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both together, with file and row, before any rank starts. An overview and four slices are 94 tokens here."""
    made = make_tiny("tiny_minicpm_v_2_6")
    for name, size in {"strip": (3000, 2), "large": (64, 64), "small": (8, 8)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    rows = [{"image": f"{name}.png", "conversations": turns} for name in ("small", "strip", "large")]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    spec = start_from(made, made.folder)
    data = replace(spec.data, builtin="", train=str(tmp_path / "rows.json"), images=str(tmp_path), max_length=100)
    spec = replace(spec, data=data)
    write(spec, Path(spec.output) / SPEC_FILE)
    assert main(["data", str(Path(spec.output) / SPEC_FILE)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "rows.json row 2" in said and "3000x2 pixels: one side is more than 200 times the other" in said
    assert "rows.json row 3" in said and "(94 of them for images) are more than data.max_length=100" in said
    assert "row 1" not in said
    assert len(read(DataReport, Path(spec.output) / DATA_FILE).problems) == 2
