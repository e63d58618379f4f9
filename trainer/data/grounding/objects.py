"""The key `objects` of a row, for the marks <bbox> and <ref-object> in its texts.

    "objects": {"ref": ["dog"], "bbox": [[10, 20, 30, 40]], "bbox_type": "real", "image_id": [0]}

modelscope/ms-swift: docs/source_en/Customization/Custom-dataset.md (grounding). Two numbers are a point. `bbox_type`: "real", pixels of the
image file, or "norm1", from 0 to 1. `image_id`: the image of each box, from 0; without it the first one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from trainer.data.rows.parsed_row import AddProblem, ParsedRow, Row, kind

BOX, REF = "<bbox>", "<ref-object>"
TYPES = ("real", "norm1")
WRITE_BOX = "write [x1, y1, x2, y2], or [x, y] for a point"


@dataclass(frozen=True, kw_only=True)
class Objects:
    """`boxes`: x and y alternately; `images`: the image of each box, from 0; `norm1`: numbers from 0 to 1 instead of pixels."""

    refs: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    images: tuple[int, ...]
    norm1: bool


def read_objects(row: Row, parsed: ParsedRow, add_problem: AddProblem) -> Objects | None:
    """None without marks in the texts: then the key says nothing about them. What is wrong is reported."""
    if not row.get("objects"):
        return None
    texts = [turn.content for turn in parsed.turns or ()]
    marks = {mark: sum(text.count(mark) for text in texts) for mark in (BOX, REF)}
    if not any(marks.values()):
        return None
    given = row["objects"]
    if isinstance(given, str):  # a column of a table
        try:
            given = json.loads(given)
        except ValueError:
            given = row["objects"]
    if not isinstance(given, dict):
        add_problem("objects", f"is {kind(given)}, not an object", 'write {"ref": ["..."], "bbox": [[x1, y1, x2, y2]]}')
        return None
    refs, boxes = read_list(given, "ref", add_problem), read_list(given, "bbox", add_problem)
    check_count(refs, "ref", REF, marks[REF], add_problem)
    check_count(boxes, "bbox", BOX, marks[BOX], add_problem)
    for place, ref in enumerate(refs):
        if not isinstance(ref, str):
            add_problem(f"objects.ref[{place}]", f"is {kind(ref)}, not a string", "write the name of what the box shows")
    norm1 = read_type(given, add_problem)
    images = read_image_ids(given, len(boxes), len(parsed.images), add_problem)
    right = [check_box(box, f"objects.bbox[{place}]", norm1, add_problem) for place, box in enumerate(boxes)]
    if not all(right) or images is None or not all(isinstance(ref, str) for ref in refs):
        return None
    return Objects(
        refs=tuple(refs) if marks[REF] else (),
        boxes=tuple(tuple(map(float, box)) for box in boxes) if marks[BOX] else (),
        images=images,
        norm1=norm1,
    )


def read_list(given: Row, key: str, add_problem: AddProblem) -> list[Any]:
    value = given.get(key)
    if value is None:
        return []
    if isinstance(value, str) and key == "ref":
        return [value]
    if isinstance(value, list):
        return value
    add_problem(f"objects.{key}", f"is {kind(value)}, not a list", "write a list, with one entry for each mark in the texts")
    return []


def check_count(values: Sequence[Any], key: str, mark: str, marks: int, add_problem: AddProblem) -> None:
    """Names and boxes are filled in one by one. A list whose mark is in no text is not filled in."""
    if marks and len(values) != marks:
        problem = f"has {len(values)} entries, and the texts have {marks} {mark} marks"
        add_problem(f"objects.{key}", problem, f"write one entry for each {mark}, in the order of the texts")


def read_type(given: Row, add_problem: AddProblem) -> bool:
    value = given.get("bbox_type") or "real"
    if value not in TYPES:
        add_problem("objects.bbox_type", f"is {value!r}", 'write "real" for pixels of the image, or "norm1" for 0 to 1')
    return bool(value == "norm1")


def read_image_ids(given: Row, boxes: int, images: int, add_problem: AddProblem) -> tuple[int, ...] | None:
    """The image of each box; as in ms-swift, those that are not given are the first one."""
    value = given.get("image_id") or []
    if not isinstance(value, list) or len(value) > boxes:
        add_problem("objects.image_id", f"is {kind(value)} of another length than bbox", "write a list of numbers from 0, one for each box")
        return None
    wrong = [item for item in value if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < max(images, 1)]
    if wrong:
        add_problem("objects.image_id", f"{wrong[0]!r} is not an image of the row", f"write numbers from 0 to {max(images, 1) - 1}")
    if boxes and not images:
        add_problem("objects.bbox", "has boxes, but the row has no image", "add the image, or remove the boxes")
    return None if wrong else (*value, *(0,) * (boxes - len(value)))


def check_box(box: Any, field: str, norm1: bool, add_problem: AddProblem) -> bool:
    if not isinstance(box, list) or len(box) not in (2, 4):
        add_problem(field, f"is {kind(box)}" if not isinstance(box, list) else f"has {len(box)} numbers", WRITE_BOX)
        return False
    if not all(isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number) for number in box):
        add_problem(field, "has a value that is not a number", WRITE_BOX)
        return False
    fault = find_fault(tuple(map(float, box)), (1, 1) if norm1 else None)
    if fault:
        add_problem(field, *fault)
    return not fault


def find_fault(box: Sequence[float], size: tuple[float, float] | None) -> tuple[str, str] | None:
    """(problem, fix) of a box in an image of a size (width, height); None for a size that is not known yet."""
    shown = f"[{', '.join(f'{number:g}' for number in box)}]"
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        return f"{shown} begins right of or below its end", "write the left upper corner first: x1 <= x2 and y1 <= y2"
    if min(box) < 0:
        return f"{shown} is outside of the image: negative numbers", "correct the box, or cut it at the border of the image"
    if size and (max(box[::2]) > size[0] or max(box[1::2]) > size[1]):
        limit = f"{size[0]:g}x{size[1]:g}"
        return f"{shown} is outside of the image, which is {limit}", "correct the box, or say what its numbers are (bbox_type, data.boxes)"
    return None
