"""Rows that are left out: the check, files that are read whole and by index, and repeated sets agree on what remains."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.data.conftest import with_data
from trainer.contract import InputRefused, LeftOutRow, TrainSpec
from trainer.data import examination
from trainer.data.check import REUSED, check_data, resolve
from trainer.data.left_out import hash_left_out, leave_out, read_left_out, rows_left_out, write_left_out
from trainer.data.rows import indexed_samples
from trainer.data.rows.indexed_samples import IndexedSamples
from trainer.data.rows.sample import Samples
from trainer.programs.inputs import load_training_samples

BAD = (3, 5, 8, 11)  # rows of `write_bad`


@pytest.fixture(autouse=True)
def local_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


@pytest.fixture
def skipping(spec: TrainSpec) -> TrainSpec:
    return with_data(spec, bad_rows="skip")


def write_bad(write_data: Callable[..., Path], *, lines: bool = False) -> Path:
    """12 rows, of which BAD have a missing image, an empty answer, an end mark of the template, and a half image."""
    file = write_data(12)
    rows = json.loads(file.read_text())
    rows[2]["image"] = "absent.png"
    rows[4]["conversations"][1]["value"] = ""
    rows[7]["conversations"][0]["value"] += "</s>"
    rows[10]["image"] = "half.png"
    whole = (file.parent / "1.png").read_bytes()
    (file.parent / "half.png").write_bytes(whole[: len(whole) // 2])
    if lines:
        file = file.with_suffix(".jsonl")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:11]) + "{not JSON\n" + json.dumps(rows[11]) + "\n")
    else:
        file.write_text(json.dumps(rows))
    return file


def numbers(samples: Samples) -> list[int]:
    """The number in each answer."""
    return [int(samples[place].messages[-1].content.split()[-1]) for place in range(len(samples))]


def load(spec: TrainSpec) -> Samples:
    """As a rank does after the check."""
    found = check_data(spec)
    assert found.problems == ()
    samples, _ = load_training_samples(spec, resolve(spec.data), rows_left_out(found.left_out, "train"))
    assert len(samples) == found.report.train_rows
    return samples


def test_bad_rows_are_left_out_and_listed(skipping: TrainSpec, write_data: Callable[..., Path]) -> None:
    write_bad(write_data)
    found = check_data(skipping)
    assert [(row.row, row.done, row.use) for row in sorted(found.left_out, key=lambda row: row.row)] == [
        (row, "left out", "train") for row in BAD
    ]
    reasons = {row.row: row.reason for row in found.left_out}
    assert "no image file at" in reasons[3] and reasons[5] == "empty answer" and "end mark" in reasons[8] and "half.png" in reasons[11]
    assert found.report.left_out == {"train left out": 4} and found.report.train_rows == found.report.summary.rows == 8
    assert found.report.learning.answers == 8
    assert numbers(load(skipping)) == [0, 1, 3, 5, 6, 8, 9, 11]


def test_refusing_stays_the_default(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    write_bad(write_data)
    found = check_data(spec)
    assert sorted(problem.row for problem in found.problems) == list(BAD) and found.left_out == () and found.report.left_out == {}
    with pytest.raises(InputRefused, match="empty answer"):
        load_training_samples(spec, resolve(spec.data))


def test_options_that_find_nothing_change_no_hash(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    write_data(6)
    options = {"bad_rows": "skip", "too_long": "cut", "turns": "join", "unmarked": "first", "learn": "last"}
    assert check_data(spec).report == check_data(with_data(spec, **options)).report


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_by_index_the_same_rows_remain(
    skipping: TrainSpec, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lines: bool
) -> None:
    file = write_bad(write_data, lines=lines)
    spec = with_data(skipping, train=file.name)
    whole = load(spec)
    assert isinstance(whole, tuple)
    monkeypatch.setattr(indexed_samples, "LARGE_BYTES", 0)
    indexed = load(spec)
    assert not isinstance(indexed, tuple) and [indexed[number] for number in range(len(indexed))] == list(whole)


@pytest.mark.parametrize("times", [1, 3, 0.5, 0.75])
def test_repeated_sets_and_parts_of_a_set(
    skipping: TrainSpec, write_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    write_bad(write_data)
    entries = {name: {"root": "", "annotation": "train.json", "repeat_time": value} for name, value in (("one", times), ("two", 1))}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    spec = with_data(skipping, train="meta.json")
    good = [number for number in range(12) if number + 1 not in BAD]
    first = good * int(times) if times >= 1 else [number for number in good if number < 12 * times]
    assert numbers(load(spec)) == first + good, "a part is the first part of the file, and its bad rows are not replaced"
    monkeypatch.setattr(indexed_samples, "LARGE_BYTES", 0)
    assert numbers(load(spec)) == first + good


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_a_row_of_several_conversations_is_left_out_as_a_whole(
    skipping: TrainSpec, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(examination, "CHUNK", chunk)
    file = write_data(8)
    rows = json.loads(file.read_text())
    rows[2]["image"] = "half.png"
    (file.parent / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file.write_text(json.dumps([rows[0], rows[1:3], *rows[3:]]))
    assert numbers(load(skipping)) == [0, 3, 4, 5, 6, 7]
    monkeypatch.setattr(indexed_samples, "LARGE_BYTES", 0)
    assert numbers(load(skipping)) == [0, 3, 4, 5, 6, 7]


def test_too_long_rows(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    file = write_data(8)
    rows = json.loads(file.read_text())
    rows[1]["conversations"][1]["value"] += " and more" * 40
    rows[4]["conversations"][0]["value"] += " and more" * 40
    file.write_text(json.dumps(rows))
    limit = {"max_length": 60, "evaluation": ""}
    refused = check_data(with_data(spec, **limit)).problems
    assert [problem.row for problem in refused] == [2, 5] and all("data.too_long=skip or cut" in problem.fix for problem in refused)
    skipped = check_data(with_data(spec, too_long="skip", **limit))
    assert (skipped.problems, skipped.report.left_out, skipped.report.train_rows) == ((), {"train left out": 2}, 6)
    cut = check_data(with_data(spec, too_long="cut", **limit))
    assert [problem.row for problem in cut.problems] == [5] and "cannot be cut: no trained token" in cut.problems[0].problem
    both = check_data(with_data(spec, too_long="cut", bad_rows="skip", **limit))
    assert both.problems == () and both.report.left_out == {"train cut": 1, "train left out": 1}
    assert (both.report.train_rows, both.report.summary.length_max) == (7, 60)
    assert len({skipped.report.sha256, both.report.sha256}) == 2


def test_a_file_that_is_trained_on_and_held_out(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    """What is cut for training has no whole answer to compare with."""
    file = write_data(8)
    rows = json.loads(file.read_text())
    rows[1]["conversations"][1]["value"] += " and more" * 40
    rows[6]["image"] = "absent.png"
    file.write_text(json.dumps(rows))
    options = {"too_long": "cut", "bad_rows": "skip", "max_length": 60}
    found = check_data(with_data(spec, evaluation="train.json", **options))
    assert found.problems == () and (found.report.train_rows, found.report.evaluation_rows) == (7, 6)
    assert rows_left_out(found.left_out, "train") == {str(file): frozenset({7})}
    assert rows_left_out(found.left_out, "evaluation") == {str(file): frozenset({2, 7})}
    (file.parent / "held.json").write_text(file.read_text())
    other = check_data(with_data(spec, evaluation="held.json", **options))
    assert (other.report.train_rows, other.report.evaluation_rows) == (7, 6)


@pytest.mark.parametrize(("rows", "problem"), [(3, "has 3 rows without the 4 that are left out, fewer than"), (0, "has 0 rows without")])
def test_less_than_a_batch_is_refused(skipping: TrainSpec, write_data: Callable[..., Path], rows: int, problem: str) -> None:
    file = write_bad(write_data)
    kept = json.loads(file.read_text())
    bad = [kept[row - 1] for row in BAD]
    file.write_text(json.dumps([*kept[:2], kept[3]][:rows] + bad))
    (found,) = check_data(skipping).problems
    assert problem in found.problem and found.row == 0


def test_a_problem_of_the_file_is_never_left_out(skipping: TrainSpec, write_data: Callable[..., Path]) -> None:
    file = write_data(6)
    file.write_text(file.read_text()[:-1])
    assert "is not valid JSON" in check_data(skipping).problems[0].problem


def test_a_row_that_became_bad_after_the_check_is_refused(skipping: TrainSpec, write_data: Callable[..., Path]) -> None:
    file = write_bad(write_data)
    left_out = rows_left_out(check_data(skipping).left_out, "train")
    rows = json.loads(file.read_text())
    rows[0]["conversations"][1]["value"] = ""
    file.write_text(json.dumps(rows))
    with pytest.raises(InputRefused, match=r"row 1, key .*empty answer[\s\S]*has changed since the data check"):
        load_training_samples(skipping, resolve(skipping.data), left_out)


def test_the_kept_result_ends_with_the_image_that_was_missing(skipping: TrainSpec, write_data: Callable[..., Path], tmp_path: Path) -> None:
    write_bad(write_data)
    said: list[str] = []
    first = check_data(skipping, said.append)
    again = check_data(skipping, said.append)
    assert REUSED in said and again == first
    Image.new("RGB", (8, 8)).save(tmp_path / "absent.png")
    said.clear()
    found = check_data(skipping, said.append)
    assert REUSED not in said and found.report.left_out == {"train left out": 3}
    assert found.report.sha256 != first.report.sha256


def test_the_file_of_rows(tmp_path: Path) -> None:
    rows = tuple(LeftOutRow(use="train", file="a.json", row=row, key="", reason="…", done="left out") for row in (2, 5))
    write_left_out(rows, tmp_path, expected=True)
    assert read_left_out(tmp_path) == rows
    write_left_out((), tmp_path, expected=True)
    assert read_left_out(tmp_path) == ()
    write_left_out((), tmp_path, expected=False)
    with pytest.raises(InputRefused, match=r"data_left_out\.jsonl cannot be read [\s\S]*python -m trainer data"):
        read_left_out(tmp_path)
    (tmp_path / "data_left_out.jsonl").write_text('{"use": "other"}\n')
    with pytest.raises(InputRefused, match="is damaged"):
        read_left_out(tmp_path)


def test_the_hash_does_not_depend_on_folders() -> None:
    here, there = (
        [LeftOutRow(use="train", file=file, row=2, key="", reason=file, done="left out")] for file in ("/a/rows.json", "/b/rows.json")
    )
    assert hash_left_out(here) == hash_left_out(there) != hash_left_out([replace(here[0], row=3)]) and hash_left_out([]) == ""


def test_rows_of_a_repeated_index(tmp_path: Path, write_data: Callable[..., Path]) -> None:
    file = write_data(5)
    entries = {"one": {"root": "", "annotation": "train.json", "repeat_time": 2}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    samples = indexed_samples.index_samples(tmp_path / "meta.json", tmp_path, tmp_path)
    assert isinstance(samples, IndexedSamples)
    assert samples.find_numbers({str(file): {2, 5}}).tolist() == [1, 4, 6, 9]
    remaining = leave_out(samples, {str(file): frozenset({2, 5})})
    assert numbers(remaining) == [0, 2, 3, 0, 2, 3]
    with pytest.raises(IndexError):
        remaining[6]
    assert leave_out(samples, {}) is samples


def test_adjusted_rows_are_listed(spec: TrainSpec, tmp_path: Path, write_data: Callable[..., Path]) -> None:
    file = write_data(6)
    rows = json.loads(file.read_text())
    rows[1]["conversations"].append({"from": "human", "value": "Thanks!"})
    rows[2]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    rows[3]["conversations"].insert(1, {"from": "human", "value": "Tell me."})
    file.write_text(json.dumps(rows))
    found = check_data(with_data(spec, turns="join"))
    assert found.problems == () and found.report.left_out == {"train joined": 1, "train trimmed": 2}
    assert [(row.row, row.done) for row in found.left_out] == [(2, "trimmed"), (3, "trimmed"), (4, "joined")]
