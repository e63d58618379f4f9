import json
from pathlib import Path

import pytest

from trainer.data.rows.annotation import read_rows

GOOD = {
    "a list": ('[{"a": 1}, {"a": 2}]', ((1, {"a": 1}), (2, {"a": 2}))),
    "lines": ('{"a": 1}\n{"a": 2}\n', ((1, {"a": 1}), (2, {"a": 2}))),
    "lines, one of them blank: row numbers are line numbers": ('{"a": 1}\n\n{"a": 2}', ((1, {"a": 1}), (3, {"a": 2}))),
    "one line": ('{"a": 1}', ((1, {"a": 1}),)),
    "a byte order mark": ('\ufeff[{"a": 1}]', ((1, {"a": 1}),)),
    "a line separator inside a string": ('{"a": "x\u2028y"}\n{"a": 2}', ((1, {"a": "x\u2028y"}), (2, {"a": 2}))),
}
BAD = {
    "nothing": ("", 0, "is empty"),
    "an empty list": ("[]", 0, "empty list"),
    "single quotes": ("[\n {'a': 1}]", 0, "line 2 column 3"),
    "a trailing comma": ('[{"a": 1},]', 0, "line 1 column 1"),
    "one object on one line": ('{"data": [{"messages": [{"role": "user", "content": "a"}]}]}', 0, "of rows: they are under its key 'data'"),
    "one object over several lines": ('{\n"data": []\n}', 0, "a single JSON object, not a list"),
    "a broken line": ('{"a": 1}\n{"a": }\n', 2, "line 1 column 7"),
    "brackets a million deep": ("[" * 1_000_000, 0, "nested too deeply"),
}


@pytest.mark.parametrize("name", GOOD)
def test_lists_and_lines(tmp_path: Path, name: str) -> None:
    text, rows = GOOD[name]
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    assert read_rows(file) == (rows, ())


@pytest.mark.parametrize("name", BAD)
def test_invalid_json_is_reported_with_its_position(tmp_path: Path, name: str) -> None:
    text, row, expected = BAD[name]
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    _, (problem,) = read_rows(file)
    assert (problem.file, problem.row) == (str(file), row)
    assert expected in problem.problem
    assert problem.fix


@pytest.mark.parametrize("row", [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"conversation": [{"human": "a"}]}])
def test_a_single_row_is_not_taken_for_a_wrapper(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_rows(tmp_path / "rows.jsonl") == (((1, row),), ())


def test_the_other_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\nnot json\n{"a": 3}\n', encoding="utf-8")
    rows, problems = read_rows(file)
    assert rows == ((1, {"a": 1}), (3, {"a": 3}))
    assert [problem.row for problem in problems] == [2]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    assert "not UTF-8 text: invalid continuation byte at byte 5" in read_rows(tmp_path / "latin.json")[1][0].problem
    assert "No such file" in read_rows(tmp_path / "absent.json")[1][0].problem
    assert "Is a directory" in read_rows(tmp_path)[1][0].problem
