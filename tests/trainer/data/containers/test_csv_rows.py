"""csv and tsv: the rows of a table, by the line that each begins on."""

from pathlib import Path

import pytest

from launcher.plan.data.row_count import count_rows
from trainer.data.containers.annotation import read_rows

GOOD = {
    "commas": ("a.csv", "query,response\na,b\nc,d\n", [(2, {"query": "a", "response": "b"}), (3, {"query": "c", "response": "d"})]),
    "no line feed at the end": ("a.csv", "query,response\na,b", [(2, {"query": "a", "response": "b"})]),
    "quotes, and line feeds in a cell": (
        "a.csv", 'query,response\n"He said ""yes"", twice",b\n"a\nb",c\nd,e\n',
        [(2, {"query": 'He said "yes", twice', "response": "b"}), (3, {"query": "a\nb", "response": "c"}), (5, {"query": "d", "response": "e"})],
    ),
    "a byte order mark, and lines of Windows": ("a.csv", "\ufeffquery,response\r\na,b\r\n", [(2, {"query": "a", "response": "b"})]),
    "semicolons": ("a.csv", "query;response\na, or b;c\n", [(2, {"query": "a, or b", "response": "c"})]),
    "tabs": ("a.tsv", "query\tresponse\na, b\tc\n", [(2, {"query": "a, b", "response": "c"})]),
    "empty cells and blank lines": ("a.csv", "image,query,response\n\n,a,b\n", [(3, {"query": "a", "response": "b"})]),
    "the index of pandas": ("a.csv", ",query,response\n0,a,b\n", [(2, {"query": "a", "response": "b"})]),
    "lists in JSON": ("a.csv", 'images,query\n"[""a.png""]",[b]\n', [(2, {"images": ["a.png"], "query": "[b]"})]),
    "lists as Python prints them": ("a.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", [(2, {"messages": [{"role": "user", "content": "a"}]})]),
    "a name in brackets": ("a.csv", "image,query\n[1].png,b\n", [(2, {"image": "[1].png", "query": "b"})]),
    "one column": ("a.csv", "text\na\n", [(2, {"text": "a"})]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_rows(tmp_path: Path, name: str) -> None:
    file, text, rows = GOOD[name]
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    assert read_rows(tmp_path / file) == (tuple(rows), ())
    assert count_rows(tmp_path / file) == len(rows)


BAD = {
    "nothing": ("a.csv", "", 0, "is empty", "the names of the keys"),
    "a header alone": ("a.csv", "query,response\n", 0, "a header and no rows", "the names of the keys"),
    "a quote that is not closed": ("a.csv", 'query,response\n"a,b\nc,d\n', 0, "not a valid table: unexpected end of data at line 3", "in quotes"),
    "text after a quote": ("a.csv", 'query,response\n"a"b,c\n', 0, "at line 2", "in quotes"),
    "a cell too many": ("a.csv", "query,response\na,b,c\n", 2, "has 3 cells, but the first line names 2 columns", "in quotes"),
    "a cell too few": ("a.csv", "query,response\na\n", 2, "has 1 cells", "an empty cell"),
    "two columns of a name": ("a.csv", "query,query\na,b\n", 0, "two columns with the name 'query'", "a name of its own"),
    "a column without a name": ("a.csv", "query,\na,b\n", 0, "no name for column 2", "names of the keys"),
    "commas and semicolons": ("a.csv", "a,b;c\n1,2;3\n", 0, "commas and semicolons", "in quotes"),
    "tabs in .csv": ("a.csv", "query\tresponse\na\tb\n", 0, "separated by tabs", "name it .tsv"),
    "commas in .tsv": ("a.tsv", "query,response\na,b\n", 0, "has no tab", "name it .csv"),
    "lines that end with a carriage return alone": ("a.csv", "query,response\ra,b\r", 0, "a carriage return alone", "line feeds"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_with_place_and_fix(tmp_path: Path, name: str) -> None:
    file, text, row, expected, fix = BAD[name]
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    rows, (problem,) = read_rows(tmp_path / file)
    assert rows == () and problem.row == row and expected in problem.problem and fix in problem.fix


def test_the_other_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,response\na,b\nc\nd,e\n")
    rows, problems = read_rows(tmp_path / "a.csv")
    assert [number for number, _ in rows] == [2, 4] and [problem.row for problem in problems] == [3]
