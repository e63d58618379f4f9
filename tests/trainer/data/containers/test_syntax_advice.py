"""The usual errors of files that were written by hand, and the commands that correct them, which are run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.data.containers.annotation import read_rows
from trainer.data.containers.syntax_advice import advise

ROWS = [{"query": "Say 'one', ]", "response": "一"}]
# name -> (text, a part of the advice)
TEXTS = {
    "a comma before the bracket": ('[{"query": "a", "response": "b"},\n]', "a comma stands before a closing bracket"),
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


@pytest.mark.parametrize("name", ["a comma before the bracket", "single quotes"])
def test_the_command_writes_a_file_that_is_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / "my rows.json"
    file.write_text(TEXTS[name][0], encoding="utf-8")
    (problem,) = read_rows(file)[1]
    argv = shlex.split(problem.fix.partition("run: ")[2])
    subprocess.run([sys.executable, *argv[1:]], check=True)
    rows, problems = read_rows(Path(argv[-1]))
    assert problems == () and rows[0][1] == (ROWS[0] if name == "single quotes" else {"query": "a", "response": "b"})
    assert json.loads(Path(argv[-1]).read_text())
