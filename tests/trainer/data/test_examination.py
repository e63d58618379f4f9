"""One pass over all rows: what is counted once, what as often as a file says, and how far it says it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.conftest import conversation, with_data
from trainer.contract import TrainSpec
from trainer.data import examination
from trainer.data.check import examine_data, examine_files, resolve
from trainer.data.rows.sample import read_samples


@pytest.fixture(autouse=True)
def local_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


def meta(folder: Path, **times: float) -> None:
    entries = {
        f"{name}-{place}": {"root": "", "annotation": f"{name}.json", "repeat_time": value}
        for place, (name, value) in enumerate(times.items())
    }
    (folder / "meta.json").write_text(json.dumps(entries))


def test_repeated_rows_are_counted_as_often_and_examined_once(spec: TrainSpec, write_data: Callable[..., Path], tmp_path: Path) -> None:
    write_data(10, "a.json")
    (tmp_path / "b.json").write_text(json.dumps([conversation(f"{index}.png", 100 + index) for index in range(6)]))
    meta(tmp_path, a=3, b=0.5)
    report, problems, hashes = examine_data(with_data(spec, train="meta.json"))
    samples, _ = read_samples(tmp_path / "meta.json", tmp_path)
    assert problems == () and report.train_rows == len(samples) == 33
    assert (report.summary.rows, report.images, report.learning.answers, report.learning.distinct) == (13, 10, 33, 13)
    assert report.learning.repeated_rows == 20
    assert {path.name for path in hashes} >= {"meta.json", "a.json", "b.json"}


def test_a_file_that_two_sets_list(spec: TrainSpec, write_data: Callable[..., Path], tmp_path: Path) -> None:
    write_data(4, "a.json")
    entries = {name: {"root": "", "annotation": "a.json"} for name in ("one", "two")}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    report, _, _ = examine_data(with_data(spec, train="meta.json", evaluation="a.json"))
    assert (report.train_rows, report.evaluation_rows, report.summary.rows, report.images) == (8, 4, 4, 4)
    assert (report.learning.repeated_rows, report.learning.shared_rows, report.learning.shared_images) == (4, 4, 4)


def test_the_same_file_for_training_and_evaluation(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    file = write_data(5)
    rows = json.loads(file.read_text())
    rows[2]["conversations"][1]["value"] = ""
    file.write_text(json.dumps(rows))
    report, problems, _ = examine_data(with_data(spec, evaluation="train.json"))
    assert [problem.row for problem in problems] == [3], "reported once"
    assert (report.train_rows, report.evaluation_rows, report.summary.rows, report.learning.shared_rows) == (4, 4, 4, 4)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_result_does_not_depend_on_the_parts(
    spec: TrainSpec, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    file = write_data(11)
    rows = json.loads(file.read_text())
    rows[4]["image"], rows[9]["conversations"][1]["value"] = "absent.png", "</s> again"
    file.write_text(json.dumps(rows))
    alone = replace(spec, batch=replace(spec.batch, global_batch=1))
    paths = resolve(alone.data)
    whole = examine_files(alone, paths, (file,), print)
    monkeypatch.setattr(examination, "CHUNK", chunk)
    assert examine_files(alone, paths, (file,), print) == whole and [problem.row for problem in whole.problems] == [5, 10]


def test_a_long_check_says_how_far_it_is(spec: TrainSpec, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "REPORT_S", 0.0)
    monkeypatch.setattr(examination, "CHUNK", 4)
    file, said = write_data(10), list[str]()
    examine_files(spec, resolve(spec.data), (file,), said.append)
    assert said[-1] == "data: 10 rows checked, 100 % of the files" and len(said) == 3
