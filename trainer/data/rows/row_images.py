"""Where a row says which images it has, and the many ways to say where they stand in the text."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.rows.parsed_row import MARK, Complain, ImageReference, Row, Turn, keys_of, kind
from trainer.data.rows.turn import FROM_IMAGES

IMAGE_KEYS = ("image", "images")
NAMED_MARK = re.compile(r"<image_\d+>")  # OpenBMB/MiniCPM-V: finetune/dataset.py
TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)  # QwenLM/Qwen-VL: the words before it ("Picture 1: ") are part of the text


def read_pictures(row: Row, complain: Complain) -> tuple[ImageReference, ...]:
    given = [key for key in IMAGE_KEYS if row.get(key) not in (None, [])]
    if len(given) > 1:
        complain("image", "both image and images are given", "keep one of them, as a path or a list of paths")
    if not given:
        return ()
    key = given[0]
    if isinstance(row[key], list):
        return tuple(ImageReference(name=path_of(item), field=f"{key}[{place}]") for place, item in enumerate(row[key]))
    return (ImageReference(name=path_of(row[key]), field=key),)


def path_of(item: Any) -> Any:
    """ms-swift and datasets write {"path": ..., "bytes": null}."""
    return item["path"] if isinstance(item, dict) and item.get("path") is not None else item


def take_blocks(row: Row, standing: Sequence[ImageReference], listed: tuple[ImageReference, ...], complain: Complain) -> tuple[ImageReference, ...]:
    """The images of blocks: those with a path, or for blocks without one those that the row lists."""
    named = [picture for picture in standing if picture.name is not FROM_IMAGES]
    if not named:
        return listed
    if listed:
        complain(named[0].field, f"images stand here and in {listed[0].field.split('[')[0]!r}", "give each image once")
        return listed
    for picture in standing:
        if picture.name is FROM_IMAGES:
            complain(picture.field, "an image block without a path beside others that have one", 'give it an "image": PATH')
    return tuple(named)


def take_first(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """MiniCPM: one image whose place is not said stands before the first question."""
    if any(MARK in turn.content for turn in turns):
        return turns
    place = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if place is None:
        return turns
    return (*turns[:place], replace(turns[place], content=f"{MARK}\n{turns[place].content}"), *turns[place + 1 :])


def take_named(images: Row, turns: tuple[Turn, ...], complain: Complain) -> tuple[tuple[Turn, ...], tuple[ImageReference, ...]]:
    """MiniCPM: {"<image_00>": path, ...}, each standing wherever a question names it."""
    pictures: list[ImageReference] = []
    read: list[Turn] = []
    for turn in turns:
        marks = NAMED_MARK.findall(turn.content)
        for mark in marks:
            if turn.role != "user":
                complain(turn.text_field, f"{mark} mark in {describe_role(turn)}", "only questions may hold images")
            elif mark not in images:
                complain(turn.text_field, f"{mark} is not in the row's images, which are {keys_of(images)}", "add its path, or take it out")
            else:
                pictures.append(ImageReference(name=images[mark], field=f"image.{mark}"))
        read.append(replace(turn, content=NAMED_MARK.sub(MARK, turn.content)) if turn.role == "user" else turn)
    unknown = [mark for mark in images if not NAMED_MARK.fullmatch(mark)]
    for mark in unknown:
        complain(f"image.{mark}", "is no name of an image", 'name them "<image_00>", "<image_01>" ... as the questions do')
    used = {picture.field for picture in pictures}
    for mark in images:
        if mark not in unknown and f"image.{mark}" not in used:
            complain(f"image.{mark}", "no question names this image", f"write {mark} where it stands, or take it out")
    return tuple(read), tuple(pictures)


def has_tags(row: Row) -> bool:
    """Whether a question holds <img>path</img>; a row that lists images writes of HTML."""
    items = row["conversations"]
    if not isinstance(items, list) or row.get("image") or row.get("images"):
        return False
    for item in items:
        text = item.get("value") if isinstance(item, dict) else None
        if isinstance(text, str) and "</img>" in text and TAG.search(text):
            return True
    return False


def take_tags(turns: tuple[Turn, ...], complain: Complain) -> tuple[tuple[Turn, ...], tuple[ImageReference, ...]]:
    """Qwen-VL: the path stands in the text."""
    pictures: list[ImageReference] = []
    read: list[Turn] = []
    for turn in turns:
        names = TAG.findall(turn.content)
        if names and turn.role != "user":
            complain(turn.text_field, f"<img> in {describe_role(turn)}", "only questions may hold images")
            read.append(turn)
            continue
        if names and MARK in turn.content:
            complain(turn.text_field, f"both {MARK} and <img>", "write each image in one way")
        pictures += [ImageReference(name=name.strip(), field=turn.text_field) for name in names]
        read.append(replace(turn, content=TAG.sub(MARK, turn.content)) if names else turn)
    return tuple(read), tuple(pictures)


def describe_role(turn: Turn) -> str:
    return "an answer" if turn.role == "assistant" else f"a {turn.role} message"


def describe_picture(name: Any) -> str:
    return "is an empty path" if name == "" else f"is {kind(name)}, not a path"
