"""InternVL's meta files, which list annotation files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.sample import read_samples
from trainer.data.sources.source import find_sources, hash_sources


def row(number: int, image: str = "") -> dict[str, Any]:
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": f"{mark}{number}?"}, {"from": "gpt", "value": f"{number}!"}]
    return {"id": number, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    (tmp_path / "pictures" / "deep" / "b.png").write_bytes(b"")
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row(number, "a.png")) for number in range(3)))
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(row(number, "b.png")) for number in range(5)))
    content = {
        "first": {"root": "pictures", "annotation": "one.jsonl", "repeat_time": 2, "data_augment": False, "length": 3},
        "second": {"root": str(tmp_path / "pictures" / "deep"), "annotation": str(tmp_path / "two.jsonl"), "repeat_time": 0.5},
    }
    (tmp_path / "meta.json").write_text(json.dumps(content, indent=2))
    return tmp_path / "meta.json"


def test_a_meta_file_is_read_as_the_files_that_it_lists(meta: Path) -> None:
    samples, problems = read_samples(meta, meta.parent)
    assert problems == ()
    assert [sample.id for sample in samples] == ["0", "1", "2", "0", "1", "2", "0", "1"], (
        "the first file twice, then half of the five rows of the second"
    )
    assert {Path(sample.file).name for sample in samples} == {"one.jsonl", "two.jsonl"}
    assert samples[0].images == (meta.parent / "pictures" / "a.png",)
    assert samples[-1].images == (meta.parent / "pictures" / "deep" / "b.png",)


def test_the_hash_covers_all_files(meta: Path) -> None:
    before = hash_sources(meta, meta.parent)
    two = meta.parent / "two.jsonl"
    assert hash_sources(two, meta.parent) == hashlib.sha256(two.read_bytes()).hexdigest()
    two.write_text(two.read_text().replace("4!", "5!"))
    assert hash_sources(meta, meta.parent) != before


def test_rows_are_not_a_meta_file(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl", json.dumps(row(1))), ("list.json", json.dumps([row(1)])), ("broken.json", "{'a': 1}")):
        (tmp_path / name).write_text(content)
    for name in ("rows.jsonl", "list.json", "broken.json", "absent.json", "."):
        (source,), problems = find_sources(tmp_path / name, tmp_path)
        assert (source.file, source.images, source.repeat, source.columns, problems) == (tmp_path / name, tmp_path, 1.0, None, ())


# entry -> (field, problem)
BAD: dict[str, tuple[Any, str, str]] = {
    "not an object": ("one.jsonl", "bad", "is a string, not an object"),
    "no annotation": ({"root": "pictures"}, "bad", "has no annotation file; its keys are 'root'"),
    "root not a path": ({"annotation": "one.jsonl", "root": 3}, "bad.root", "is a number, not a path"),
    "never": ({"annotation": "one.jsonl", "repeat_time": 0}, "bad.repeat_time", "is 0"),
    "one and a half times": ({"annotation": "one.jsonl", "repeat_time": 1.5}, "bad.repeat_time", "is 1.5"),
    "a word": ({"annotation": "one.jsonl", "repeat_time": "often"}, "bad.repeat_time", "is 'often'"),
    "augmented": ({"annotation": "one.jsonl", "data_augment": True}, "bad.data_augment", "True: its images change at random"),
    "tiles of its own": (
        {"annotation": "one.jsonl", "max_dynamic_patch": 12},
        "bad.max_dynamic_patch",
        "12: the most tiles of an image are an option of the run",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_entries(meta: Path, name: str) -> None:
    entry, field, text = BAD[name]
    good = json.loads(meta.read_text())["first"] | {"repeat_time": 1}
    meta.write_text(json.dumps({"good": good, "bad": entry}))
    samples, (problem,) = read_samples(meta, meta.parent)
    assert len(samples) == 3, "the other data set is read"
    assert (problem.file, problem.row, problem.field) == (str(meta), 0, field)
    assert text in problem.problem
    assert problem.fix


def test_a_missing_annotation_file(meta: Path) -> None:
    meta.write_text(json.dumps({"gone": {"annotation": "gone.jsonl"}}))
    samples, (problem,) = read_samples(meta, meta.parent)
    assert samples == ()
    assert problem.file == str(meta.parent / "gone.jsonl")
    assert "No such file" in problem.problem
