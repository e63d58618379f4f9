"""Blocks whose text, path or call is under `value`: hiyouga/LLaMA-Factory, data/v1_sft_demo.jsonl and reason_tool_use_demo_50.jsonl."""

import json
from pathlib import Path
from typing import Any

from trainer.data.rows.sample import read_samples


def read(folder: Path, *messages: dict[str, Any]) -> Any:
    (folder / "a.png").touch()
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return read_samples(folder / "rows.jsonl", folder)


def block(kind: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "value": value}


def test_texts_images_and_weights(tmp_path: Path) -> None:
    question = {"role": "user", "content": [block("image_url", "a.png"), block("text", "Which?")], "loss_weight": 0.0}
    (sample,), problems = read(tmp_path, question, {"role": "assistant", "content": [block("text", "One")], "loss_weight": 1.0})
    assert problems == () and sample.images == (tmp_path / "a.png",)
    assert [message.content.replace("\n", "") for message in sample.messages] == ["<image>Which?", "One"]


def test_calls_and_reasoning(tmp_path: Path) -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    answer = {"role": "assistant", "content": [block("reasoning", "Think."), block("text", "I ask."), block("tool_call", call)]}
    (sample,), problems = read(tmp_path, {"role": "user", "content": [block("text", "Which?")]}, answer)
    assert problems == ()
    assert (sample.messages[1].content, sample.messages[1].reasoning) == ("I ask.", "Think.")
    assert [(each.name, each.arguments) for each in sample.messages[1].calls] == [("f", '{"x": 1}')]


def test_values_that_are_not_texts_and_calls_that_are_none(tmp_path: Path) -> None:
    for content in ([block("text", 3)], [block("tool_call", "no JSON")], [block("tool_call", None)]):
        samples, problems = read(tmp_path, {"role": "user", "content": "Which?"}, {"role": "assistant", "content": content})
        assert samples == () and len(problems) == 1
        assert problems[0].field.startswith("messages[1].content") or problems[0].field == "messages[1]"
