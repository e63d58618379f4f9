"""Rows without messages: captions, questions and answers, prompts and completions."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.adjustment import IMAGE_FIRST
from trainer.data.rows.plain_row import ASKED, MOST_FREQUENT
from trainer.data.rows.row_rules import RowRules
from trainer.data.rows.sample import read_samples

Row = dict[str, Any]
ASKING = RowRules(question="Describe it.")


def read(folder: Path, row: Row, **options: Any) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder, **options)


def say(role: str, content: str) -> Row:
    return {"role": role, "content": content}


TELL = "A square."
# row -> (role, text, in the loss) of each message, adjustments
READ: dict[str, tuple[Row, list[tuple[str, str, bool]], tuple[str, ...]]] = {
    "caption": (
        {"image": "a.png", "caption": TELL},
        [("user", "<image>\nDescribe it.", True), ("assistant", TELL, True)],
        (ASKED, IMAGE_FIRST),
    ),
    "a folder of the datasets library": (
        {"file_name": "a.png", "text": TELL},
        [("user", "<image>\nDescribe it.", True), ("assistant", TELL, True)],
        (ASKED, IMAGE_FIRST),
    ),
    "image and text": (
        {"image": "a.png", "text": TELL, "system": "Be brief."},
        [("system", "Be brief.", True), ("user", "<image>\nDescribe it.", True), ("assistant", TELL, True)],
        (ASKED, IMAGE_FIRST),
    ),
    "question and answer": (
        {"image": "a.png", "question": "Which?", "answer": TELL},
        [("user", "<image>\nWhich?", True), ("assistant", TELL, True)],
        (IMAGE_FIRST,),
    ),
    "question and answers": (
        {"file_name": "a.png", "question": "<image>?", "answers": ["one", "two", "two"]},
        [("user", "<image>?", True), ("assistant", "two", True)],
        (MOST_FREQUENT,),
    ),
    "question and one answer": (
        {"question": "1+1?", "answers": ["2", "2"]},
        [("user", "1+1?", True), ("assistant", "2", True)],
        (),
    ),
    "prompt and completion": (
        {"image": "a.png", "prompt": "<image>?", "completion": TELL},
        [("user", "<image>?", True), ("assistant", TELL, True)],
        (),
    ),
    "prompt and response": ({"prompt": "1+1?", "response": "2"}, [("user", "1+1?", True), ("assistant", "2", True)], ()),
    "prompt and completion of messages": (
        {
            "images": ["a.png"],
            "prompt": [say("user", "<image>?"), say("assistant", "A"), say("user", "And?")],
            "completion": [say("assistant", TELL)],
        },
        [("user", "<image>?", True), ("assistant", "A", False), ("user", "And?", True), ("assistant", TELL, True)],
        (),
    ),
    "The Cauldron": (
        {"images": ["a.png"], "texts": [{"user": "Which?", "assistant": TELL, "source": "x"}, {"user": "Sure?", "assistant": "Yes"}]},
        [("user", "<image>\nWhich?", True), ("assistant", TELL, True), ("user", "Sure?", True), ("assistant", "Yes", True)],
        (IMAGE_FIRST,),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    row, messages, adjustments = READ[name]
    (sample,), problems = read(tmp_path, row, rules=ASKING)
    assert problems == () and sample.ignored == () and sample.adjustments == adjustments
    assert [(message.role, message.content, message.in_loss) for message in sample.messages] == messages
    assert len(sample.images) == sum(text.count("<image>") for _, text, _ in messages)


def test_a_caption_without_a_question_shows_the_option_and_the_row(tmp_path: Path) -> None:
    samples, (problem,) = read(tmp_path, {"image": "a.png", "caption": TELL})
    assert samples == () and problem.field == "caption" and problem.problem == "a caption without a question"
    fix = problem.fix.removeprefix("set data.question='Describe the image.' for all of them, or write ")
    (sample,), problems = read(tmp_path, json.loads(fix))
    assert problems == () and [message.content for message in sample.messages] == ["<image>\nDescribe the image.", TELL]


REFUSED: dict[str, tuple[Row, str, str]] = {
    "a caption that is a list": ({"image": "a.png", "caption": [TELL]}, "caption", "is a list, not a string"),
    "an empty caption": ({"image": "a.png", "caption": " "}, "caption", "empty answer"),
    "an answer that is a number": ({"question": "1+1?", "answer": 2}, "answer", "is a number, not a string"),
    "no answers": ({"question": "1+1?", "answers": []}, "answer", "is missing"),
    "messages and a text": ({"prompt": [say("user", "?")], "completion": TELL}, "completion", "is a string, not a list of messages"),
    "a text and messages": ({"prompt": "?", "completion": [say("assistant", TELL)]}, "completion", "is a list, not a string"),
    "two without marks": ({"images": ["a.png", "b.png"], "texts": [{"user": "?", "assistant": "x"}]}, "texts[0].user", "too few <image> marks"),
    "no image file": ({"file_name": "c.png", "question": "<image>?", "answer": "x"}, "file_name", "no image file at"),
    "texts of strings": ({"texts": ["a"]}, "texts", "is not a list of questions and answers"),
    "settings in a completion": (
        {"prompt": [say("user", "?")], "completion": [say("assistant", TELL) | {"mask": 1}]},
        "completion[0].mask",
        "whether 1 is learned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    row, field, text = REFUSED[name]
    samples, (problem,) = read(tmp_path, row, rules=ASKING)
    assert samples == () and problem.field == field and text in problem.problem and problem.fix
