import json
from pathlib import Path

import pytest

from trainer.contract import DataProblem
from trainer.data.containers import annotation, json_text
from trainer.data.containers.annotation import read_rows, stream_rows

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


LISTS = [
    "[]",
    " \n[1, 12345, -1.5e-3, true, null]\n ",
    '[{"a": "]},{", "b": [[], {}]}, "é\u2028\\u00e9", [1, [2]]]',
    '[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]',
    "[1,]",
    "[1 2]",
    "[1, 2",
    "[1] 2",
    "[,1]",
    '[{"a": 1}, {"b": nothing}]',
    "[1.2.3]",
]


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("size", [1, 2, 5, 2**20])
def test_a_list_is_read_in_parts(text: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same rows, and the same message with line and column, wherever a part ends."""
    monkeypatch.setattr(json_text, "LIST_BYTES", size)
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    try:
        expected, problem = tuple(enumerate(json.loads(text), start=1)), "" if text != "[]" else "is an empty list"
    except ValueError as error:
        expected, problem = (), annotation.describe(error)
    rows, problems = read_rows(file)
    assert rows == expected and [found.problem for found in problems] == ([problem] if problem else [])


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A bad line far behind does not keep the rows before it from being read, and is reported at its place."""
    file, position = tmp_path / "rows.jsonl", annotation.Position()
    file.write_text('{"a": 1}\n' * 20_000 + "{bad\n" + '{"a": 2}\n', encoding="utf-8")
    stream = stream_rows(file, position)
    assert next(stream) == (1, {"a": 1})
    assert 0 < position.bytes_read < file.stat().st_size == position.size
    rest = list(stream)
    assert isinstance(rest[-2], DataProblem) and rest[-2].row == 20_001 and rest[-1] == (20_002, {"a": 2})
    assert position.bytes_read == position.size


def test_text_that_is_not_utf_8_after_many_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' * 20_000 + b"\xff\n")
    assert read_rows(file)[0] == () and "not UTF-8 text: invalid start byte at byte 180000" in read_rows(file)[1][0].problem
