"""Texts that hold what is not text: a problem where the row loses something, counted elsewhere."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.sample import read_samples
from trainer.data.rows.text_mark import BASE64, NAMED

Row = dict[str, Any]
PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 2).decode()
OTHER = base64.b64encode(bytes(range(1, 256)) * 2).decode()


def read(folder: Path, row: Row) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder)


def talk(question: str, answer: str = "Rain", **keys: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


MARK = "mark of a chat template in a text: "
COUNTED: dict[str, tuple[Row, tuple[str, ...]]] = {
    "plain text": (talk("What happens: [a], # b, 1 < 2?"), ()),
    "an image": (talk("<image>?", image="a.png"), ()),
    "a tag of HTML, closed": (talk("What does <video>x</video> do?"), ("<video> in a text",)),
    "a tag of HTML, named": (talk("How do I use the <audio> tag?"), ("<audio> in a text",)),
    "a tag of HTML, quoted": (talk("Explain `<video>`."), ("<video> in a text",)),
    "a tag in an answer": (talk("How?", "Write <video> there."), ("<video> in a text",)),
    "boxes in their own tags": (talk("Where?", "<bbox>1,2,3,4</bbox>"), ("<bbox> in a text",)),
    "ChatML": (talk("<|im_start|>user\nWhat?"), (MARK + "<|im_start|>",)),
    "the end of another template": (talk("What?<|endoftext|>"), (MARK + "<|endoftext|>",)),
    "Vicuna": (talk("USER: What? ASSISTANT:"), (MARK + "USER:",)),
    "a text about a user": (talk("What is USER: in /etc?"), ()),
    "Llama 2": (talk("[INST] What? [/INST]"), (MARK + "[INST]",)),
    "Alpaca": (talk("### Instruction:\nWhat?\n\n### Response:"), (MARK + "### Instruction:",)),
    "a heading": (talk("### Instruction: what?"), ()),
    "base64 of something": (talk(f"Decode {OTHER}"), (BASE64,)),
    "an image as base64 in an answer": (talk("Encode it.", PICTURE), (BASE64,)),
    "a long text": (talk("word " * 500), ()),
    "a link": (talk("https://example.org/" + "a/b-c_d" * 60), ()),
    "the row's own image": (talk("<image> a.png?", image="a.png"), ()),
    "another image": (talk("<image> and b.png?", image="a.png"), (NAMED,)),
    "an image in an answer": (talk("Which?", "See b.png."), (NAMED,)),
    "a name without a file": (talk("Which?", "See c.png."), ()),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted(tmp_path: Path, name: str) -> None:
    row, warnings = COUNTED[name]
    (sample,), problems = read(tmp_path, row)
    assert problems == () and sample.warnings == warnings


QUESTION = "messages[0].content"
REFUSED: dict[str, tuple[Row, str, str]] = {
    "a video": (talk("<video>What happens?"), QUESTION, "a mark <video> without its video"),
    "a sound": (talk("<audio>\nWhat sound?"), QUESTION, "a mark <audio> without its audio"),
    "an image and a video": (talk("<image>Colour, and <video>?", image="a.png"), QUESTION, "a mark <video>"),
    "a box": (talk("<image>Where?", "<bbox>", image="a.png"), "messages[1].content", "a mark <bbox> without objects"),
    "a name": (talk("Find <ref-object>.", "There"), QUESTION, "a mark <ref-object> without objects"),
    "a data URI": (talk(f"data:image/png;base64,{PICTURE} What?"), QUESTION, "an image as base64 in a question"),
    "bare base64": (talk(f"{PICTURE}\nWhat?"), QUESTION, "an image as base64 in a question"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_row_loses(tmp_path: Path, name: str) -> None:
    row, field, text = REFUSED[name]
    samples, (problem,) = read(tmp_path, row)
    assert samples == () and problem.field == field and text in problem.problem and problem.fix
