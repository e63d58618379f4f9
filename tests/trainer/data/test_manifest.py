"""The files that a run reads, their hashes, and the refusal of other inputs in a rerun."""

import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.conftest import make_spec
from trainer.contract import Expectation, InputRefused, Inputs, TrainSpec
from trainer.contract.listing import describe_changes
from trainer.data import manifest
from trainer.data.check import DataPaths, examine_data, paths_of, resolve
from trainer.data.manifest import HASHES_FILE, hash_weights_of, list_inputs, refuse_other_inputs
from trainer.programs.inputs import load_training_samples, prepare_data

INPUTS = Inputs(schema=1, data={}, weights={"model/a.safetensors": "1"})


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    """A spec that starts from a checkpoint."""
    folder = tmp_path / "step-000003"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "trainer_state.json", "omnilaunch_state.json", "notes.md"):
        (folder / name).write_text(name)
    made = make_spec(tmp_path / "run", tmp_path / "data")
    return replace(made, stage=replace(made.stage, checkpoint=str(folder)))


def test_weights_are_what_a_stage_reads(spec: TrainSpec) -> None:
    found = hash_weights_of(spec)
    assert set(found) == {"checkpoint/model.safetensors", "checkpoint/config.json"}, (
        "what says which run saved them is not part of the weights"
    )
    assert len(set(map(len, found.values()))) == 1


def test_weights_are_hashed_once(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hash_weights_of(spec)
    monkeypatch.setattr(manifest, "hash_file", lambda path: pytest.fail(f"{path} was hashed again"))
    assert hash_weights_of(spec) == first


def test_a_replaced_file_with_the_same_size_and_mtime_is_hashed_again(spec: TrainSpec) -> None:
    """As with cp --preserve or rsync -t."""
    path = Path(spec.stage.checkpoint) / "model.safetensors"
    before, stat = hash_weights_of(spec), path.stat()
    other = path.with_name("other")
    other.write_text("MODEL.safetensors")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert hash_weights_of(spec)["checkpoint/model.safetensors"] != before["checkpoint/model.safetensors"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": []}'])
def test_a_damaged_cache_of_hashes_is_ignored(spec: TrainSpec, damage: str) -> None:
    before = hash_weights_of(spec)
    path = Path(spec.data.root) / HASHES_FILE
    assert json.loads(path.read_text())
    path.write_text(damage)
    assert hash_weights_of(spec) == before


def test_the_base_of_an_adapter_is_included(spec: TrainSpec, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": spec.stage.checkpoint}))
    found = hash_weights_of(replace(spec, stage=replace(spec.stage, checkpoint=str(adapter))))
    assert {"checkpoint/adapter_config.json", "base/model.safetensors"} <= set(found)


def test_names_of_files_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", tmp_path / "data")
    paths = DataPaths(train=tmp_path / "rows/train.json", evaluation=None, images=tmp_path / "images")
    files = {tmp_path / "rows/train.json": "1", tmp_path / "images/a/b.png": "2", tmp_path / "data/digits/x.png": "3"}
    assert list_inputs(spec, paths, files).data == {"a/b.png": "2", "digits/x.png": "3", str(tmp_path / "rows/train.json"): "1"}


def test_embedded_images_are_named_below_media_in_the_check_and_the_ranks(digits: Path, tmp_path: Path) -> None:
    """A record that names a folder of one machine would differ on every other one."""
    png = next((digits / "digits").rglob("*.png"))
    code = base64.b64encode(png.read_bytes()).decode()
    turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "four"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": [code]}) + "\n")
    spec = make_spec(tmp_path / "run", tmp_path / "data")
    spec = replace(spec, data=replace(spec.data, builtin="", train=str(tmp_path / "rows.jsonl"), evaluation="", images=""))
    paths, (_, _, files) = prepare_data(spec), examine_data(spec)
    samples, _ = load_training_samples(spec, paths)
    assert sorted(list_inputs(spec, paths, files).data)[0].startswith("media/")
    assert samples[0].images[0] in files and paths == paths_of(spec)


def test_one_changed_pixel_is_one_changed_file(digits: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from PIL import Image

    copytree(digits / "digits", tmp_path / "mine")
    spec = make_spec(tmp_path / "run", tmp_path / "data")
    mine = {
        "train": str(tmp_path / "mine/train.json"),
        "evaluation": str(tmp_path / "mine/evaluation.json"),
        "images": str(tmp_path / "mine"),
    }
    spec = replace(spec, data=replace(spec.data, builtin="", **mine))  # a changed built-in set would be written again
    report, problems, files = examine_data(spec)
    before = list_inputs(spec, resolve(spec.data), files)
    assert not problems and len(before.data) == report.images + 2
    path = next(path for path in sorted(files) if path.suffix == ".png")
    with Image.open(path) as image:
        image.putpixel((0, 0), image.getpixel((0, 0)) ^ 1)  # type: ignore[operator]
        image.save(path)
    report, _, files = examine_data(spec)
    (line,) = describe_changes(before.data, list_inputs(spec, resolve(spec.data), files).data)
    assert path.name in line and "another file" in line


@pytest.mark.parametrize(
    ("expects", "message"),
    [
        (
            Expectation(run_id="R", data_sha256="d" * 64),
            r"the inputs differ from those of run R:\n  data: [0-9a-f]{12} instead of dddddddddddd",
        ),
        (Expectation(run_id="R", weights={"model/a.safetensors": "2"}), r"weights model/a\.safetensors: another file"),
        (Expectation(run_id="R", weights={**INPUTS.weights, "model/b": "2"}), r"weights model/b: missing"),
        (Expectation(run_id="R", weights={"model/b": "2"}), r"(?s)model/a\.safetensors: new.*model/b: missing"),
    ],
)
def test_other_inputs_are_refused_by_name(expects: Expectation, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        refuse_other_inputs(expects, INPUTS, "0" * 64)


@pytest.mark.parametrize("expects", [None, Expectation(run_id="R"), Expectation(run_id="R", data_sha256="0" * 64, weights=INPUTS.weights)])
def test_the_same_inputs_pass(expects: Expectation | None) -> None:
    refuse_other_inputs(expects, INPUTS, "0" * 64)
