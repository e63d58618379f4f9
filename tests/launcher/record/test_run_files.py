"""A damaged record is refused with every reason, and a replaced checkpoint is found."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused
from launcher.record import run_files
from launcher.record.comparison import Outcome
from launcher.record.run_files import read_run_files
from launcher.record.verdict import compare
from tests.launcher.planted import REAL, Change, copy_run, set_value
from trainer.contract.weight_files import hash_weights

NO_BANDS = Bands()


def held(tmp_path: Path, change: Change) -> None:
    """Compare the real run with a copy of it that has one change."""
    reference, other = copy_run(tmp_path, "before"), copy_run(tmp_path, "after", change)
    compare(read_run_files(reference), [read_run_files(other)], bands=NO_BANDS)


def cut(name: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def swap(folder: Path) -> None:
    checkpoint = folder / json.loads((folder / "result.json").read_text())["checkpoint"]
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"schema": 1, "weights_sha256": "b" * 64}))


BROKEN: dict[str, tuple[Change, str]] = {
    "metrics cut short": (cut("metrics.jsonl"), r"its last row is cut short"),
    "a row that is none": (lambda folder: (folder / "metrics.jsonl").write_text("{}\n"), "1 line cannot be read as whole rows"),
    "rows lost at the end": (lambda folder: cut_rows(folder, slice(0, 2)), r"ends with step 2, result\.json says that 3 were done"),
    "a row lost in between": (lambda folder: cut_rows(folder, slice(0, 3, 2)), r"the row before step 3 is missing"),
    "result cut short": (cut("result.json"), r"result\.json was cut short or edited"),
    "environment cut short": (cut("environment.json"), r"environment\.json was cut short or edited"),
    "environment missing": (drop("environment.json"), r"environment\.json is missing"),
    "metrics missing": (drop("metrics.jsonl"), r"metrics\.jsonl is missing"),
    "data missing": (drop("data.json"), r"data\.json is missing"),
    "another schema": (set_value("result.json", "schema", 99), r"schema 99"),
    "an edited loss": (
        set_value("result.json", "final_loss", 0.1),
        r"the final loss: result\.json says 0\.1, train_result\.json says 4\.8",
    ),
    "an edited hash": (set_value("result.json", "weights_sha256", "0"), r"the hash of the weights: "),
    "an edited data hash": (set_value("data.json", "sha256", "0"), r"the hash of the data: "),
    "a value of another type": (set_value("result.json", "steps", "three"), r"steps"),
    "an exchanged checkpoint": (swap, r"checkpoints/step-000003 holds the weights 'bbb"),
}


def test_weights_that_were_replaced_in_place_are_found(tmp_path: Path) -> None:
    """The checkpoint's own trainer_state.json still says what the record says."""
    run = copy_run(tmp_path, "run", save_weights(b"trained!"))
    assert read_run_files(run).problems == ()
    save = write_weights(b"swapped!")
    save(run / "checkpoints/step-000003")
    assert read_run_files(run).problems[0].startswith("checkpoints/step-000003 holds the weights ")
    (run / "checkpoints/step-000003/model.safetensors").write_bytes(b"half")
    assert "checkpoints/step-000003 is not whole: " in read_run_files(run).problems[0]


def test_large_weights_are_hashed_again_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "MAX_WEIGHT_BYTES", 7)
    run = copy_run(tmp_path, "run", save_weights(b"trained!"))
    write_weights(b"swapped!")(run / "checkpoints/step-000003")
    assert read_run_files(run).problems == () and len(read_run_files(run, every_weight=True).problems) == 1


def save_weights(values: bytes) -> Change:
    def change(folder: Path) -> None:
        checkpoint = folder / json.loads((folder / "result.json").read_text())["checkpoint"]
        write_weights(values)(checkpoint)
        found = hash_weights(checkpoint)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"schema": 1, "weights_sha256": found}))
        for file in ("result.json", "train_result.json"):
            set_value(file, "weights_sha256", found)(folder)

    return change


def write_weights(values: bytes) -> Change:
    """One tensor of float32, as safetensors lays it out."""

    def change(checkpoint: Path) -> None:
        header = json.dumps({"w": {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}}).encode()
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)

    return change


def cut_rows(folder: Path, part: slice) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[part]))


@pytest.mark.parametrize(("change", "named"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_record_is_not_compared(tmp_path: Path, change: Change, named: str) -> None:
    with pytest.raises(ConfigRefused, match=named):
        held(tmp_path, change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("plan.json"), r"is not the folder of a run"),
        (cut("plan.json"), r"plan\.json was cut short"),
        (drop("result.json"), r"has no result\.json"),
    ],
)
def test_a_folder_without_a_record_is_refused(tmp_path: Path, change: Callable[[Path], None], named: str) -> None:
    with pytest.raises(ConfigRefused, match=named):
        held(tmp_path, change)


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "plan.json", "data.json", "samples.jsonl"])
def test_a_sealed_record_that_was_edited_is_refused(tmp_path: Path, name: str) -> None:
    """By one character, so that no two files contradict each other."""
    sealed = REAL.with_name("2")
    for run in ("before", "after"):
        shutil.copytree(sealed, tmp_path / run)
    assert compare(read_run_files(tmp_path / "before"), [read_run_files(tmp_path / "after")], bands=NO_BANDS).outcome is Outcome.SAME
    content = (tmp_path / "after" / name).read_text()
    head, _, tail = content.rpartition("1")
    (tmp_path / "after" / name).write_text(f"{head}2{tail}")
    with pytest.raises(ConfigRefused, match=rf"{name} was edited"):
        compare(read_run_files(tmp_path / "before"), [read_run_files(tmp_path / "after")], bands=NO_BANDS)


def test_each_problem_is_reported_once(tmp_path: Path) -> None:
    """If the seal says that a file is missing, it is not reported a second time."""
    run = Path(shutil.copytree(REAL.with_name("2"), tmp_path / "run"))
    (run / "environment.json").unlink()
    assert "\n".join(read_run_files(run).problems).count("environment.json is missing") == 1
