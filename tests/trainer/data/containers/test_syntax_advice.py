"""The usual errors of files that were written by hand, and what is said about them, which is followed."""

import ast
import json
from pathlib import Path

import pytest

from trainer.data.containers.annotation import read_rows
from trainer.data.containers.syntax_advice import advise

ROWS = [{"query": "Say 'one', ]", "response": "一"}]
# name -> (text, a part of the advice)
TEXTS = {
    "a comma before the bracket": ('[{"query": "a", "response": "b"},\n]', "remove the comma before the closing bracket in line 1"),
    "single quotes": (str(ROWS), "it is a list as Python writes it"),
    "full-width brackets": ('【{"query": "a", "response": "b"}]', "【 in line 1 is a full-width character: write [ in its place"),
    "a full-width bracket at the end": (
        '[{"query": "a", "response": "b"}\n】',
        "】 in line 2 is a full-width character: write ] in its place",
    ),
    "several commas, some of them in texts": ('[{"query": "a, ]", "response": "b", "loss": true},]', "python -m json.tool"),
    "anything": ('[{"query" "a"}]', "python -m json.tool"),
    "too large to look at": ('[{"query": "a"},]', "python -m json.tool"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, advice = TEXTS[name]
    monkeypatch.setattr("trainer.data.containers.syntax_advice.MOST_BYTES", 5 if "large" in name else 10**6)
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    assert advice in advise(file)


def test_following_the_advice(tmp_path: Path) -> None:
    """The line of the comma is the one that it is in; Python's list, written with json.dump, has the same rows."""
    file = tmp_path / "rows.json"
    file.write_text('[\n{"query": "a", "response": "b"},\n\n]')
    (problem,) = read_rows(file)[1]
    lines = file.read_text().split("\n")
    place = int(problem.fix.rpartition(" ")[2]) - 1
    lines[place] = lines[place].rstrip(",")
    file.write_text("\n".join(lines))
    assert read_rows(file) == (((1, {"query": "a", "response": "b"}),), ())
    file.write_text(str(ROWS))
    assert "json.dump" in read_rows(file)[1][0].fix
    file.write_text(json.dumps(ast.literal_eval(file.read_text())))
    assert read_rows(file) == (((1, ROWS[0]),), ())
