"""The images of a row, and the different ways to mark their positions in the text."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.contract import ImageForm
from trainer.data.rows.image_form import as_trained, join_images
from trainer.data.rows.message.turn import FROM_IMAGES, path_of
from trainer.data.rows.parsed_row import MARK, SUFFIXES, AddProblem, ImageReference, Row, Turn, keys_of

IMAGE_KEYS = ("image", "images")
EMPTY = (None, "", [])
NESTED, LEFT_OUT = "lists of images in a list, read as one list", "empty entry of a list of images, left out"
IN_TAGS, IN_VISION_MARKS = "image path in <img> tags, read as an image", "image path between vision marks, read as an image"
NAMED_MARK = re.compile(r"<image_\d+>")  # OpenBMB/MiniCPM-V: finetune/dataset.py
TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)  # QwenLM/Qwen-VL; the words before it ("Picture 1: ") are part of the text
VISION_MARKS = re.compile(r"<\|vision_start\|>([^<>|\n]+)<\|vision_end\|>")  # datawhalechina/self-llm: its lesson of Qwen2-VL


def read_images(row: Row, add_problem: AddProblem) -> tuple[ImageReference, ...]:
    """Those under image or images. '' is none: InternVL's rows of text. Empty entries of a list are left out, and a list of lists, such as one for
    each question, is one list."""
    given = [key for key in IMAGE_KEYS if row.get(key) not in (None, [], "")]
    if len(given) > 1:
        add_problem("image", "both image and images are given", "keep one of them: a path or a list of paths")
    if not given:
        return ()
    key = given[0]
    if not isinstance(row[key], list):
        return (ImageReference(name=path_of(row[key]), field=key),)
    items = [(f"{key}[{index}]", item) for index, item in enumerate(row[key]) if item not in EMPTY]
    if is_nested(row[key]):
        items = [(f"{field}[{index}]", item) for field, part in items for index, item in enumerate(part) if item not in EMPTY]
    return tuple(ImageReference(name=path_of(item), field=field) for field, item in items)


def is_nested(items: list[Any]) -> bool:
    return any(isinstance(item, list) for item in items) and all(isinstance(item, list) for item in items if item not in EMPTY)


def list_changes(row: Row) -> tuple[str, ...]:
    """What `read_images` reads otherwise than it is written."""
    lists = [row[key] for key in IMAGE_KEYS if isinstance(row.get(key), list)]
    if not lists or all(isinstance(item, str) and item for items in lists for item in items):
        return ()
    nested = any(map(is_nested, lists))
    parts = [item for items in lists for item in items if nested and isinstance(item, list)]
    empty = any(item in EMPTY for items in (*lists, *parts) for item in items)
    return (NESTED,) * nested + (LEFT_OUT,) * empty


def choose_images(
    in_blocks: Sequence[ImageReference], listed: tuple[ImageReference, ...], add_problem: AddProblem
) -> tuple[ImageReference, ...]:
    """The paths in image blocks of the messages; if the blocks have no paths, those that the row lists under image or images."""
    named = [image for image in in_blocks if image.name is not FROM_IMAGES]
    if not named:
        return listed
    if listed:
        add_problem(named[0].field, f"images are given here and in {listed[0].field.split('[')[0]!r}", "give each image once")
        return listed
    for image in in_blocks:
        if image.name is FROM_IMAGES:
            add_problem(image.field, "this image block has no path, but others have one", 'add "image": PATH to it')
    return tuple(named)


def insert_marks(turns: tuple[Turn, ...], images: int, form: ImageForm) -> tuple[Turn, ...]:
    """A MARK for each image in the first question, if no turn has any (as MiniCPM does for one image)."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(MARK in turn.content for turn in turns):
        return turns
    return (*turns[:first], replace(turns[first], content=join_images(turns[first].content, images, form)), *turns[first + 1 :])


def join_parts(turns: tuple[Turn, ...], form: ImageForm) -> tuple[Turn, ...]:
    """Questions of texts and images in parts, which have no text between an image and the question, as the model was trained."""
    return tuple(replace(turn, content=as_trained(turn.content, form)) if turn.in_parts and turn.role == "user" else turn for turn in turns)


def replace_named_marks(
    images: Row, turns: tuple[Turn, ...], add_problem: AddProblem
) -> tuple[tuple[Turn, ...], tuple[ImageReference, ...]]:
    """MiniCPM: {"<image_00>": path, ...}; each mark in a question becomes MARK."""
    found: list[ImageReference] = []
    read: list[Turn] = []
    for turn in turns:
        marks = NAMED_MARK.findall(turn.content)
        for mark in marks:
            if turn.role != "user":
                add_problem(turn.text_field, f"{mark} in {describe_role(turn)}", "only questions may contain images")
            elif mark not in images:
                add_problem(turn.text_field, f"{mark} is not among the images of the row: {keys_of(images)}", "add its path, or remove it")
            else:
                found.append(ImageReference(name=images[mark], field=f"image.{mark}"))
        read.append(replace(turn, content=NAMED_MARK.sub(MARK, turn.content)) if turn.role == "user" else turn)
    unknown = [mark for mark in images if not NAMED_MARK.fullmatch(mark)]
    for mark in unknown:
        add_problem(f"image.{mark}", "is not a valid name of an image", 'use the names "<image_00>", "<image_01>" ... of the questions')
    used = {image.field for image in found}
    for mark in images:
        if mark not in unknown and f"image.{mark}" not in used:
            add_problem(
                f"image.{mark}", "no question contains this image", f"write {mark} at its position in a question, or remove the image"
            )
    return tuple(read), tuple(found)


def has_tags(row: Row) -> bool:
    """Whether a message contains <img>path</img>. In a row that lists its images, the tag is ordinary text about HTML."""
    items = row["conversations"]
    if not isinstance(items, list) or row.get("image") or row.get("images"):
        return False
    for item in items:
        text = item.get("value") if isinstance(item, dict) else None
        if isinstance(text, str) and "</img>" in text and TAG.search(text):
            return True
    return False


def find_tags(turns: tuple[Turn, ...]) -> tuple[re.Pattern[str], str] | None:
    """(pattern, adjustment) of the first form in which questions of a row without images name them: in tags, where all of these hold the path of
    an image file, or between the marks of Qwen2-VL's template."""
    asked = [turn.content for turn in turns if turn.role == "user" and "<" in turn.content]
    for pattern, end, adjustment in ((TAG, "</img>", IN_TAGS), (VISION_MARKS, "<|vision_end|>", IN_VISION_MARKS)):
        names = [name for text in asked if end in text for name in pattern.findall(text)]
        if names and all(name.strip().lower().endswith(SUFFIXES) for name in names):
            return pattern, adjustment
    return None


def replace_tags(
    turns: tuple[Turn, ...], add_problem: AddProblem, tag: re.Pattern[str] = TAG
) -> tuple[tuple[Turn, ...], tuple[ImageReference, ...]]:
    """Qwen-VL: the paths are in the text; each tag becomes MARK."""
    found: list[ImageReference] = []
    read: list[Turn] = []
    for turn in turns:
        names = tag.findall(turn.content)
        if names and turn.role != "user":
            add_problem(
                turn.text_field,
                f"{'<img>' if tag is TAG else 'an image path'} in {describe_role(turn)}",
                "only questions may contain images",
            )
            read.append(turn)
            continue
        if names and MARK in turn.content:
            add_problem(turn.text_field, f"both {MARK} and <img>", "use only one of them")
        found += [ImageReference(name=name.strip(), field=turn.text_field) for name in names]
        read.append(replace(turn, content=tag.sub(MARK, turn.content)) if names else turn)
    return tuple(read), tuple(found)


def describe_role(turn: Turn) -> str:
    return "an answer" if turn.role == "assistant" else f"a {turn.role} message"
