"""Find boxes and points in a text, in the ways that models and data sets write them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NUMBER = r"-?\d+(?:\.\d+)?"
PAIR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"
FOUR = rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3}}\s*\]"
TWO = rf"\[\s*{NUMBER}\s*,\s*{NUMBER}\s*\]"
# Qwen2-VL and later; InternVL, Qwen-VL and MiniCPM-V; JSON of Qwen2.5-VL; ms-swift's own form; LLaVA and others.
BOXES = re.compile(
    rf"<\|box_start\|>(?P<marked>[^<]*)<\|box_end\|>|<(?P<tag>box|point)>(?P<tagged>[^<]*)</(?P=tag)>"
    rf'|"(?:bbox|point)_2d"\s*:\s*(?P<json>{FOUR}|{TWO})|(?P<pairs>\[\s*{PAIR}(?:\s*,\s*{PAIR})?\s*\])|(?P<list>{FOUR})'
)
NUMBERS = re.compile(NUMBER)
JSON_KEYS = re.compile(r'"(?:bbox|point)_2d"\s*:')
LISTED = ("json", "list")  # written as a plain list, which stays one

Numbers = tuple[float, ...]  # x and y alternately: 2 of a point, 4 of a box


@dataclass(frozen=True, kw_only=True)
class FoundBox:
    """A place in the text with one or several boxes. `plain`: they are a list of numbers without marks."""

    start: int
    end: int
    boxes: tuple[Numbers, ...]
    plain: bool


def find_boxes(text: str) -> Iterator[FoundBox]:
    for match in BOXES.finditer(text):
        group = next(name for name in ("marked", "tagged", "json", "pairs", "list") if match[name] is not None)
        numbers = tuple(map(float, NUMBERS.findall(match[group])))
        boxes = (numbers,) if len(numbers) == 2 else tuple(numbers[start : start + 4] for start in range(0, len(numbers), 4))
        if boxes and all(len(box) in (2, 4) for box in boxes):
            whole = group if group in LISTED else 0
            yield FoundBox(start=match.start(whole), end=match.end(whole), boxes=boxes, plain=group in LISTED)


def boxes_of(text: str) -> tuple[Numbers, ...]:
    """All boxes and points, in the order of the text."""
    return tuple(box for found in find_boxes(text) for box in found.boxes)


def replace_boxes(text: str, write: Callable[[Numbers, bool], str]) -> str:
    """Each box as `write(numbers, plain)` writes it."""
    parts, end = [], 0
    for found in find_boxes(text):
        parts += [text[end : found.start], "".join(write(box, found.plain) for box in found.boxes)]
        end = found.end
    return "".join((*parts, text[end:]))
