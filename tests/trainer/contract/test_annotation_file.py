"""What a file of rows is, by its first letter and its name; and meta files."""

import json
from pathlib import Path

import pytest

from trainer.contract import annotation_file
from trainer.contract.annotation_file import count_repeated, first_letter, is_list, read_meta

META = {"one": {"annotation": "a.jsonl"}, "two": {"annotation": "b.json", "repeat_time": 2}}


@pytest.mark.parametrize(
    ("name", "text", "letter", "listed"),
    [
        ("a.json", "[1]", "[", True),
        ("a.jsonl", "[1]\n[2]", "[", False),
        ("a.json", '{"a": 1}\n', "{", False),
        ("a.json", "\ufeff" + "\n" * 500 + " [1]", "[", True),
        ("a.json", " \n", "", False),
    ],
)
def test_a_list_begins_with_a_bracket(tmp_path: Path, name: str, text: str, letter: str, listed: bool) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert first_letter(file) == letter and is_list(file, letter) == listed


def test_a_meta_file_is_read_and_rows_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    assert read_meta(file) is None
    for text, found in ((" " * 100 + json.dumps(META), META), ('{"messages": []}', None), ("{", None), (json.dumps([META]), None)):
        file.write_text(text, encoding="utf-8")
        assert read_meta(file) == found
    file.write_bytes(b"{\xff")
    assert read_meta(file) is None
    file.write_text(json.dumps(META), encoding="utf-8")
    monkeypatch.setattr(annotation_file, "META_BYTES", 10)
    assert read_meta(file) is None, "a large file has rows"


@pytest.mark.parametrize(("rows", "repeat", "used"), [(7, 1, 7), (7, 3, 21), (7, 0.5, 3), (1, 0.5, 0), (0, 4, 0)])
def test_rows_are_repeated_or_cut(rows: int, repeat: float, used: int) -> None:
    assert count_repeated(rows, repeat) == used
