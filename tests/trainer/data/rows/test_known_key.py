"""Keys that are not read: refused where they would change what is learned, counted elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.sample import read_samples

Row = dict[str, Any]


def read(folder: Path, row: Row) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder)


def talk(answer: Any = "A cat.", question: Any = "What?", **keys: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]}


def block(**keys: Any) -> Row:
    return talk(question=[{"type": "image", "image": "a.png", **keys}, {"type": "text", "text": "What?"}])


# row -> keys that are counted
IGNORED: dict[str, tuple[Row, tuple[str, ...]]] = {
    "none": (talk(), ()),
    "harmless ones": (talk() | {"id": 1, "source": "x", "metadata": {"a": 1}, "width": 8, "dataset": "d"}, ()),
    "without a value": (talk() | {"videos": None, "audios": [], "objects": {}, "rejected": "", "split": None, "x": [None, ""]}, ()),
    "any other": (talk() | {"split": "test", "score": 0}, ("split", "score")),
    "a good answer": (talk() | {"label": True}, ("label",)),
    "a class": (talk() | {"label": 3}, ("label",)),
    "whole weight": (talk() | {"weight": 1}, ("weight",)),
    "ms-swift's channel": (talk() | {"channel": "math"}, ("channel",)),
    "columns of another format": (talk() | {"query": "x", "response": "y"}, ("query", "response")),
    "texts of the format": ({"query": "What?", "response": "A cat.", "history": []}, ()),
    "texts of alpaca": ({"instruction": "What?", "input": "", "output": "A cat.", "text": "### x"}, ("text",)),
    "the file name of alpaca's row": ({"instruction": "?", "output": "x", "file_name": "c.png"}, ("file_name",)),
    "half a character": (talk() | {"\ud83d": 1, "x" * 100: 1}, ("\\ud83d", "x" * 59 + "…")),
    "of a message": (talk(name="x", refusal=None), ("messages[].name",)),
    "of LLaVA's message": (
        {"conversations": [{"from": "human", "value": "?", "markdown": None}, {"from": "gpt", "value": "x", "rating": 5}]},
        ("conversations[].rating",),
    ),
    "of the last channel": (talk(channel="final"), ("messages[].channel",)),
    "of a block": (block(caption="x"), ("messages[].content[].caption",)),
    "of a block of a table": (talk([{"type": "text", "text": "A cat.", "image": None, "max_pixels": None}]), ()),
    "detail that is automatic": (block(detail="auto"), ("messages[].content[].detail",)),
    "the image again": (talk(question="<image>?") | {"image": "a.png", "picture_file": "a.png"}, ("picture_file",)),
    "a file that is no image": (talk() | {"file": "rows.json"}, ("file",)),
    "an image that is not there": (talk() | {"thumbnail": "c.png"}, ("thumbnail",)),
}


@pytest.mark.parametrize("name", IGNORED)
def test_keys_that_are_counted(tmp_path: Path, name: str) -> None:
    row, ignored = IGNORED[name]
    (sample,), problems = read(tmp_path, row)
    assert problems == () and sample.ignored == ignored


BAD, PAIRS, ONE_IMAGE = "an answer that must not be learned", "preference data is not supported", "settings of a single image"
# row -> key, part of the problem
REFUSED: dict[str, tuple[Row, str, str]] = {
    "ms-swift's KTO": (talk() | {"label": False}, "label", BAD),
    "LLaMA-Factory's KTO": (talk() | {"kto_tag": False}, "kto_tag", BAD),
    "ms-swift's pairs": (talk() | {"rejected_messages": [{"role": "assistant", "content": "x"}]}, "rejected_messages", PAIRS),
    "images of the other answer": (talk() | {"rejected_images": ["b.png"]}, "rejected_images", PAIRS),
    "a margin": (talk() | {"margin": 0.3}, "margin", PAIRS),
    "a row in part": (talk() | {"weight": 0.3}, "weight", "weights of rows are not supported"),
    "a row left out": (talk() | {"weight": 0}, "weight", "weights of rows are not supported"),
    "a row that is not trained": (talk() | {"train": False}, "train", "false excludes the whole row"),
    "a video": (talk() | {"video_path": "a.mp4"}, "video_path", "only images are supported"),
    "pixels of a row": (talk() | {"max_pixels": 9}, "max_pixels", "settings of a single row"),
    "an image elsewhere": (talk() | {"thumbnail": "a.png"}, "thumbnail", "'a.png' is an image file that is not read from this key"),
    "images elsewhere": (talk() | {"pages": ["c.png", "b.png"]}, "pages", "'b.png' is an image file"),
    "another image": (talk(question="<image>?") | {"image": "a.png", "second": "b.png"}, "second", "'b.png' is an image file"),
    "images of a message": (talk(images=["a.png"]), "messages[1].images", "images of a message are read from its content or from the row"),
    "a bad message": (talk(label=False), "messages[1].label", BAD),
    "parts of an answer": (talk(train_detail=[{"begin_offset": 0}]), "messages[1].train_detail", "only a whole answer"),
    "a mask": (talk(mask=1), "messages[1].mask", "whether 1 is learned or left out"),
    "a channel": (talk(channel="analysis"), "messages[1].channel", "is not what the model says"),
    "tools in a message": (talk(tools=[{"name": "x"}]), "messages[1].tools", "tools of a message are not supported"),
    "two texts": (talk(value="A dog."), "messages[1]", "value and content say different things"),
    "two roles": ({"messages": [{"role": "user", "from": "gpt", "content": "?"}, talk()["messages"][1]]}, "messages[0]", "from and role"),
    "Qwen's height": (block(resized_height=280), "messages[0].content[0].resized_height", ONE_IMAGE),
    "Qwen's pixels": (block(max_pixels=9), "messages[0].content[0].max_pixels", ONE_IMAGE),
    "OpenAI's detail": (
        talk(question=[{"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}]),
        "messages[0].content[0].image_url.detail",
        ONE_IMAGE,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_would_change_what_is_learned(tmp_path: Path, name: str) -> None:
    row, field, text = REFUSED[name]
    samples, (problem,) = read(tmp_path, row)
    assert samples == () and problem.field == field and text in problem.problem and problem.fix


def test_the_advice_is_accepted(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, talk() | {"thumbnail": "a.png"})
    assert problem.fix == "rename the key to image, or remove it"
    (sample,), problems = read(tmp_path, talk() | {"image": "a.png"})
    assert problems == () and sample.images == (tmp_path / "a.png",)
