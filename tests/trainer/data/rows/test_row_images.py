"""Lists of images in all shapes, and image paths in the text of a question."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.row_images import IN_TAGS, IN_VISION_MARKS, LEFT_OUT, NESTED
from trainer.data.rows.sample import read_samples

Row = dict[str, Any]


def read(folder: Path, row: Row) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder)


def talk(question: Any, answer: str = "Blue", **keys: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


ONE, TWO = "<image>?", "<image><image>?"
# row -> images, question, adjustments
READ: dict[str, tuple[Row, tuple[str, ...], str, tuple[str, ...]]] = {
    "a list in a list": (talk(ONE, images=[["a.png"]]), ("a.png",), ONE, (NESTED,)),
    "a list for each question": (talk(TWO, images=[["a.png"], [], ["b.png"]]), ("a.png", "b.png"), TWO, (NESTED, LEFT_OUT)),
    "null in a list": (talk("?", images=[None]), (), "?", (LEFT_OUT,)),
    "null between": (talk(TWO, images=["a.png", None, "b.png"]), ("a.png", "b.png"), TWO, (LEFT_OUT,)),
    "InternVL's row of text": (talk("?", image=""), (), "?", ()),
    "an empty path in a list": (talk("?", images=[""]), (), "?", (LEFT_OUT,)),
    "no list": (talk("?", images=None), (), "?", ()),
    "a path": (talk(ONE, images=[{"path": "a.png", "bytes": None}]), ("a.png",), ONE, ()),
    "a URL key": (talk(ONE, images=[{"url": "a.png"}]), ("a.png",), ONE, ()),
    "an image key": (talk(ONE, image={"image": "a.png"}), ("a.png",), ONE, ()),
    "a path in a block": (talk([{"type": "image", "image": {"path": "a.png", "bytes": None}}, "?"]), ("a.png",), ONE, ()),
    "a file URL in a block": (talk([{"type": "image_url", "image_url": {"url": "a.png"}}, "?"]), ("a.png",), ONE, ()),
    "Qwen's tags in messages": (talk("Picture 1: <img>a.png</img>?"), ("a.png",), "Picture 1: <image>?", (IN_TAGS,)),
    "vision marks": (talk("COCO Yes: <|vision_start|>a.png<|vision_end|>"), ("a.png",), "COCO Yes: <image>", (IN_VISION_MARKS,)),
    "vision marks in LLaVA's rows": (
        {"conversations": [{"from": "user", "value": "<|vision_start|>a.png<|vision_end|>?"}, {"from": "assistant", "value": "Blue"}]},
        ("a.png",),
        ONE,
        (IN_VISION_MARKS,),
    ),
    "tags without a path": (talk("Is <img>x</img> HTML?"), (), "Is <img>x</img> HTML?", ()),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    row, images, question, adjustments = READ[name]
    (sample,), problems = read(tmp_path, row)
    assert problems == () and sample.adjustments == adjustments
    assert sample.images == tuple(tmp_path / image for image in images) and sample.messages[0].content == question


# row -> key and text of the first problem, its fix
REFUSED: dict[str, tuple[Row, str, str, str]] = {
    "paths in one text": (talk(TWO, images=["a.png,b.png"]), "images[0]", "'a.png,b.png' is several paths", 'write a list: ["a.png", "b.png"]'),
    "with semicolons": (talk(TWO, image="a.png; b.png"), "image", "is several paths", 'write a list: ["a.png", "b.png"]'),
    "the JSON of a list": (talk(ONE, image='["a.png"]'), "image", "is several paths", 'write a list: ["a.png"]'),
    "a comma in a name": (talk(ONE, image="a,b.png"), "image", "no image file at", "put the file there"),
    "lists and paths": (talk(TWO, images=["a.png", ["b.png"]]), "images[1]", "is a list, not a path", "give the path"),
    "lists in lists in a list": (talk(ONE, images=[[["a.png"]]]), "images[0][0]", "is a list, not a path", "give the path"),
    "an object without a path": (talk(ONE, images=[{"name": "a.png"}]), "images[0]", "is an object, not a path", "give the path"),
    "in an answer too": (talk("<img>a.png</img>?", "<img>b.png</img>"), "messages[1].content", "<img> in an answer", "only questions"),
    "not a file": (talk("<|vision_start|>c.png<|vision_end|>?"), "messages[0].content", "no image file at", "put the file there"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    row, field, text, fix = REFUSED[name]
    samples, (problem, *_) = read(tmp_path, row)
    assert samples == () and problem.field == field and text in problem.problem and problem.fix.startswith(fix)
    if fix.startswith("write a list: "):
        (sample,), problems = read(tmp_path, row | {field.split("[")[0]: json.loads(fix.removeprefix("write a list: "))})
        assert problems == () and sample.images[0] == tmp_path / "a.png"
