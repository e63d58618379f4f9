import json
from pathlib import Path
from typing import Any

import pytest

from trainer.contract import InputRefused
from trainer.data.rows.request import Request, read_requests
from trainer.data.rows.sample import Message


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return file


def user(text: str) -> Message:
    return Message(role="user", content=text)


def test_all_formats_of_a_question(tmp_path: Path) -> None:
    blocks = [{"type": "text", "text": "Which? "}, {"type": "image", "image": "c.png"}]
    file = write(
        tmp_path,
        {"prompt": "Hello?"},
        {"prompt": "Which?", "image": "a.png", "id": "x"},
        "",
        {"prompt": "<image> or <image>?", "images": ["a.png", "/b.png"]},
        {"system": "Be short.", "messages": [{"role": "user", "content": "Which?"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": blocks}]},
        {"messages": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "C?"}]},
    )
    a, c = tmp_path / "a.png", tmp_path / "c.png"
    assert read_requests(file, tmp_path) == (
        Request(row=1, messages=(user("Hello?"),), images=()),
        Request(row=2, messages=(user("<image>\nWhich?"),), images=(a,), id="x"),
        Request(row=4, messages=(user("<image> or <image>?"),), images=(a, Path("/b.png"))),
        Request(row=5, messages=(Message(role="system", content="Be short."), user("<image>\nWhich?")), images=(a,)),
        Request(row=6, messages=(user("Which? <image>"),), images=(c,)),
        Request(row=7, messages=(user("A?"), Message(role="assistant", content="b"), user("C?")), images=()),
    )


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{not json}", "row 2: is not valid JSON"),
        ([1], "row 2: is a list, not an object"),
        ({}, "row 2: has neither prompt nor messages: its keys are none"),
        ({"question": "?"}, "its keys are 'question'"),
        ({"prompt": "?", "messages": []}, "has both prompt and messages"),
        ({"prompt": 7}, "key 'prompt': is a number, not a string"),
        ({"prompt": "  "}, "key 'prompt': empty user message"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "<image>?"}, "1 <image> marks for 0 images"),
        ({"prompt": "<image>?", "images": ["a", "b"]}, "1 <image> marks for 2 images"),
        ({"prompt": "?", "image": "https://example.org/a.png"}, "is not a file; images are not downloaded"),
        ({"prompt": "?", "image": 7}, "is a number, not a path"),
        ({"prompt": "?", "image": "a", "images": ["b"]}, "both image and images are given"),
        ({"prompt": "?", "video": "a.mp4"}, "only images are supported"),
        ({"messages": []}, "is empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "with a question first and last"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the roles are tool"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown role 'narrator'"),
        ({"prompt": "?", "tools": [{"name": "zoom"}]}, "tools are not supported in questions"),
        ({"messages": [{"role": "system", "content": "<image>"}, {"role": "user", "content": "a"}]}, "mark in a system message"),
    ],
)
def test_invalid_rows_are_listed_before_anything_is_answered(row: Any, text: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Hello?"}, row)
    with pytest.raises(InputRefused) as refused:
        read_requests(file, tmp_path)
    assert text in str(refused.value) and str(file) in str(refused.value)
    assert "stage.inference.input: " in str(refused.value)


@pytest.mark.parametrize(("content", "text"), [("", "is empty"), ("\n \n", "is empty"), ("[]", "is")])
def test_an_empty_file_is_refused(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputRefused, match=text):
        read_requests(tmp_path / "rows.jsonl", tmp_path)
    with pytest.raises(InputRefused, match="cannot be read: No such file"):
        read_requests(tmp_path / "none.jsonl", tmp_path)


def test_many_problems_of_one_cause_are_one_entry(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"50 problem(?s:.*)50 rows \(1, 2, 3, \.\.\.\), key 'prompt': empty"):
        read_requests(write(tmp_path, *({"prompt": ""} for _ in range(50))), tmp_path)
