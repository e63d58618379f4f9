"""The result of a check is used again while files and rules are what they were, and only then."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.data.conftest import conversation, with_data
from trainer.contract import TrainSpec
from trainer.data import kept_check
from trainer.data.check import REUSED, examine_data
from trainer.data.kept_folder import kept_folder


@pytest.fixture(autouse=True)
def local_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


@pytest.fixture
def checked(spec: TrainSpec, write_data: Callable[..., Path], tmp_path: Path) -> TrainSpec:
    write_data(6)
    assert examine_data(spec)[1] == () and reused(spec)
    return spec


def reused(spec: TrainSpec) -> bool:
    said: list[str] = []
    examine_data(spec, said.append)
    return REUSED in said


def test_an_unchanged_set_is_not_read_again(checked: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = examine_data(checked)
    monkeypatch.setattr("trainer.data.check.DataExamination", lambda *_: pytest.fail("read again"))
    again, problems, hashes = examine_data(replace(checked, seed=9, output="/other", steps=99))
    assert (again, problems, hashes) == (first[0], (), first[2])
    assert again.train_rows == 6 and len(hashes) == 7


def test_the_number_of_rows_is_judged_anew(checked: TrainSpec) -> None:
    few = replace(checked, batch=replace(checked.batch, global_batch=8))
    report, (problem,), _ = examine_data(few)
    assert reused(few) and "has 6 rows, fewer than stage.global_batch=8" in problem.problem and report.problem_count == 1


def change_row(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps([conversation(f"{index}.png", 9) for index in range(6)]))


def change_image(folder: Path) -> None:
    """Same size and mtime."""
    stat = (folder / "3.png").stat()
    Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "3.png")
    os.utime(folder / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove_image(folder: Path) -> None:
    (folder / "3.png").unlink()


def add_columns(folder: Path) -> None:
    info = {"set": {"file_name": "train.json", "columns": {"messages": "conversations"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def damage(folder: Path) -> None:
    (kept,) = (folder / "checks").glob("*.json")
    kept.write_text(kept.read_text()[:-30])


@pytest.mark.parametrize("change", [change_row, change_image, remove_image, add_columns, damage])
def test_changed_files_are_read_again(checked: TrainSpec, tmp_path: Path, change: Callable[[Path], None]) -> None:
    assert reused(checked)
    change(tmp_path)
    assert not reused(checked)


def test_other_options_and_other_rules_are_read_again(checked: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reused(with_data(checked, max_length=99))
    assert not reused(replace(checked, model=replace(checked.model, template=replace(checked.model.template, system="Be brief. "))))
    assert reused(with_data(checked, workers=3))
    monkeypatch.setattr(kept_check, "rules", lambda: "those of another version")
    assert not reused(checked)


def test_problems_and_rows_that_could_not_be_measured_are_not_kept(
    spec: TrainSpec, write_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(6)
    tight = with_data(spec, max_length=8)
    assert examine_data(tight)[1] and examine_data(tight)[1]
    away = replace(spec, model=replace(spec.model, source=replace(spec.model.source, kind="hub", id="example/none")))

    def missing(_: Any) -> Any:
        raise OSError("not here")

    monkeypatch.setattr("trainer.data.length.open_processor", missing)
    assert examine_data(away)[0].summary.unmeasured and not reused(away)
    assert not list((tmp_path / "checks").glob("*"))


def test_a_file_that_changes_during_the_check_is_not_kept(checked: TrainSpec, tmp_path: Path) -> None:
    report, _, hashes = examine_data(checked)
    kept_check.keep_check(checked.data, "late", report, hashes, began_ns=0)
    assert not (tmp_path / "checks/late.json").exists()


def test_a_folder_that_cannot_be_written_is_replaced(spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("trainer.data.kept_folder.tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    found = kept_folder(replace(spec.data, root=str(tmp_path / "file")), "index")
    assert found.is_relative_to(tmp_path / "tmp") and found.is_dir() and found.parent.stat().st_mode & 0o077 == 0
