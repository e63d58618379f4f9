"""Reasoning beside the text of an answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.message.reasoning import STRIPPED
from trainer.data.rows.row_rules import RowRules
from trainer.data.rows.sample import read_samples

ASK = {"role": "user", "content": "1+1?"}


def read(folder: Path, *messages: dict[str, Any], **options: Any) -> Any:
    (folder / "rows.json").write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder, **options)


def answer(content: Any = "2", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


# answer -> (text, reasoning)
READ: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "DeepSeek and Qwen3": (answer(reasoning_content="One and one."), ("2", "One and one.")),
    "OpenRouter": (answer(reasoning="One and one."), ("2", "One and one.")),
    "vLLM, under both": (answer(reasoning="One.", reasoning_content="One."), ("2", "One.")),
    "xtuner": (answer(thinking="One and one."), ("2", "One and one.")),
    "none": (answer(reasoning_content=None, thinking=""), ("2", "")),
    "a block": (answer([{"type": "thinking", "thinking": "One."}, {"type": "text", "text": "2"}]), ("2", "One.")),
    "a block of another name": (answer([{"type": "reasoning", "text": "One."}, {"type": "text", "text": "2"}]), ("2", "One.")),
    "marks in the text stay": (answer("<think>One.</think>2"), ("<think>One.</think>2", "")),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    item, expected = READ[name]
    (sample,), problems = read(tmp_path, ASK, item)
    assert problems == () and (sample.messages[1].content, sample.messages[1].reasoning) == expected and sample.adjustments == ()


def test_it_is_left_out_by_option_and_counted(tmp_path: Path) -> None:
    for item in (answer(reasoning_content="One."), answer("<think>One.</think>2")):
        (sample,), _ = read(tmp_path, ASK, item, rules=RowRules(reasoning="strip"))
        assert sample.messages[1].reasoning == "" and sample.messages[1].content == item["content"]
        assert sample.adjustments == ((STRIPPED,) if "reasoning_content" in item else ())


REFUSED: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "of a question": ([ASK | {"reasoning_content": "x"}, answer()], "messages[0].reasoning_content", "only answers can have reasoning"),
    "not a text": ([ASK, answer(reasoning=["x"])], "messages[1].reasoning", "is a list, not a string"),
    "twice": ([ASK, answer(reasoning="x", thinking="y")], "messages[1]", "reasoning and thinking have different texts"),
    "twice, in the text": ([ASK, answer("<think>x</think>2", reasoning="x")], "messages[1].reasoning", "is given twice"),
    "alone": ([ASK, answer("", reasoning="x")], "messages[1].content", "empty answer"),
    "with an image": ([ASK, answer(reasoning="<image>")], "messages[1].content", "<image> mark in an answer"),
    "half a character": ([ASK, answer(reasoning="\ud83d")], "messages[1].content", "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    messages, field, text = REFUSED[name]
    samples, (problem,) = read(tmp_path, *messages)
    assert samples == () and problem.field == field and text in problem.problem
