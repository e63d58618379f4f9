"""Rows that are read as they were meant: one image without a mark, and an answer that ends with a literal end mark. Each is counted.

The path of an image in a message is not read as an image: it is a problem, whose fix shows the row rewritten.
"""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.contract import ImageForm
from trainer.data.rows.image_form import MOVED, place_images
from trainer.data.rows.message.reasoning import STRIPPED
from trainer.data.rows.message.turn_order import LEARNED_LAST, MARKED_FIRST, MARKED_LAST, learn_last, order_turns
from trainer.data.rows.parsed_row import MARK, AddProblem, ParsedRow, Row, Turn, shorten
from trainer.data.rows.row_images import insert_marks, join_parts
from trainer.data.rows.row_rules import DEFAULT, RowRules

# What chat templates end an answer with. The template of the model adds its own, so that one in the data would be trained twice.
# tests/conf/test_conf.py: those of all models of conf/model.
END_MARKS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
OPENING = {"</s>": "<s>"}  # an answer about HTML: <s>struck through</s>
IMAGE_FIRST, IMAGE_LAST = "one image without a mark, put first", "one image without a mark, put last"
END_MARK = "end mark in the text of an answer, removed"
ENCLOSED = re.compile(r"<image>\s*(?P<path>[^<>\n]+?)\s*</image>[ \t]*\n?")
LEADING = re.compile(r"\s*(?:<image>\s*)?(?P<path>\S[^<>\n]*?\.(?:png|jpe?g|webp|bmp|gif|tiff?|ppm))(?=\s|$)\s*", re.IGNORECASE)
# Elsewhere in a question: alone, in Markdown, or in a tag of HTML.
WITHIN = re.compile(
    r"!\[[^\]\n]*\]\((?P<markdown>[^)\s]+)\)|<img\b[^<>]*?\bsrc\s*=\s*[\"']?(?P<html>[^\"'<>\s]+)[^<>]*>|"
    r"(?P<plain>[^\s<>\"'()\[\]{}|*`,;]+\.(?:png|jpe?g|webp|bmp|gif|tiff?|ppm))(?![\w/])",
    re.IGNORECASE,
)
SUFFIX = re.compile(r"\.(?:png|jpe?g|webp|bmp|gif|tiff?|ppm|PNG|JPE?G)\b")
SHOWN = 60  # characters of each text of a rewritten row
SEVERAL = {"first": ImageForm(between="\n"), "last": ImageForm(place="after", between="\n")}
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class PathInText:
    """An image path in a question. `text`: the question with a mark in its place."""

    turn: Turn
    path: str
    text: str


def adjust(parsed: ParsedRow, form: ImageForm, rules: RowRules = DEFAULT) -> tuple[ParsedRow, tuple[str, ...]]:
    """The row as it was meant, and what was changed. `form`: of an image without a mark."""
    if parsed.turns is None:
        return parsed, ()
    given = parsed.turns
    changes = [*parsed.adjustments, *(name for turn in given if turn.adjustments for name in turn.adjustments)]
    ended = tuple(trim(turn) if turn.role == "assistant" else turn for turn in given)
    ordered, reordered = order_turns(with_turns(parsed, ended), rules)
    marked, placed = place_marks(ordered.turns or (), len(ordered.images), form, rules)
    turns = learn_last(marked) if rules.learn == "last" else marked
    changes += [*placed, *((END_MARK,) if ended != given else ()), *reordered, *((LEARNED_LAST,) if turns != marked else ())]
    if rules.reasoning == "strip" and any(turn.reasoning for turn in turns):
        turns = tuple(replace(turn, reasoning="") for turn in turns)
        changes.append(STRIPPED)
    stood = joined = join_parts(turns, form)
    if rules.image_place != "row":
        stood = tuple(
            replace(turn, content=place_images(turn.content, rules.image_place)) if turn.role == "user" else turn for turn in joined
        )
        changes += [MOVED[rules.image_place]] if stood != joined else []
    return with_turns(ordered, stood), tuple(dict.fromkeys(changes))


def with_turns(parsed: ParsedRow, turns: tuple[Turn, ...]) -> ParsedRow:
    return parsed if turns == parsed.turns else replace(parsed, turns=turns)


def trim(turn: Turn) -> Turn:
    content = without_end_mark(turn.content)
    return turn if content == turn.content else replace(turn, content=content)


def place_marks(turns: tuple[Turn, ...], images: int, form: ImageForm, rules: RowRules) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns with a mark for an image without one, and for several where the rules say so: all before or after the first question, each on a
    line of its own. ms-swift puts them first with nothing between (template/base.py, _add_default_tags)."""
    if images == 1:
        names = IMAGE_FIRST if form.place == "before" else IMAGE_LAST
        marked = insert_marks(turns, 1, form)
    elif images > 1 and rules.unmarked != "refuse":
        names = MARKED_FIRST if rules.unmarked == "first" else MARKED_LAST
        marked = insert_marks(turns, images, SEVERAL[rules.unmarked])
    else:
        return turns, ()
    return marked, (names,) if marked != turns else ()


def without_end_mark(answer: str) -> str:
    """Without the end marks at its end, and the spaces before them. An answer without one is unchanged, its spaces too."""
    text = answer.rstrip()
    mark = next((mark for mark in END_MARKS if text.endswith(mark)), "") if text.endswith(END_MARKS) else ""
    if not mark or (mark in OPENING and OPENING[mark] in text):
        return answer
    return without_end_mark(text.removesuffix(mark).rstrip())


# ----------------------------------------------------------------------------------------------------- paths in messages


def report_paths(parsed: ParsedRow, row: Row, folders: tuple[Path, ...], add_problem: AddProblem) -> bool:
    """Report the image paths in questions, as one problem; whether there are any. `folders`: where a relative path may start."""
    found = tuple(find_paths(parsed, folders))
    if found:
        first = found[0]
        problem = f"the image path {shorten(first.path, SHOWN)!r} is in the message"
        add_problem(first.turn.text_field, problem, f"move it to image: {rewrite(row, found)}")
    return bool(found)


def find_paths(parsed: ParsedRow, folders: tuple[Path, ...]) -> Iterator[PathInText]:
    """`<image>PATH</image>` anywhere in a question; and, in a row that names no image, an image file that exists: one at its beginning, whose path
    may have spaces, or the first one within it."""
    for turn in parsed.turns or ():
        if turn.role != "user":
            continue
        if enclosed := ENCLOSED.search(turn.content):
            yield PathInText(turn=turn, path=enclosed["path"], text=with_mark(turn.content, enclosed))
        elif not parsed.images and (leading := LEADING.match(turn.content)) and is_image(leading["path"], folders):
            yield PathInText(turn=turn, path=leading["path"], text=with_mark(turn.content, leading))
        elif not parsed.images and (within := find_named(turn.content, folders)):
            found, path = within
            text = f"{turn.content[: found.start()]}{MARK}{turn.content[found.end() :]}"
            yield PathInText(turn=turn, path=path, text=text)


def find_named(text: str, folders: tuple[Path, ...]) -> tuple[re.Match[str], str] | None:
    """The first name of an image file that exists, and its place."""
    if not SUFFIX.search(text):
        return None
    for match in WITHIN.finditer(text):
        path = next(filter(None, match.groups()))
        if is_image(path, folders):
            return match, path
    return None


def with_mark(content: str, match: re.Match[str]) -> str:
    return f"{content[: match.start()]}{MARK}\n{content[match.end() :]}"


def is_image(path: str, folders: tuple[Path, ...]) -> bool:
    try:
        return any((folder / path.removeprefix("file://")).is_file() for folder in folders)
    except (OSError, ValueError):  # too long for a file name
        return False


def rewrite(row: Row, found: tuple[PathInText, ...]) -> str:
    """The row as it should be, with long texts shortened."""
    written = deepcopy({key: value for key, value in row.items() if key not in ("image", "images")})
    for each in found:
        put(written, each.turn.text_field, each.text)
    paths = [each.path for each in found]
    written["image"] = paths[0] if len(paths) == 1 else paths
    return json.dumps(shorten_texts(written), ensure_ascii=False)


def put(row: Any, field: str, text: str) -> None:
    """Set the value of a path such as messages[0].content. A path that is no longer there is left alone."""
    steps = [name or int(index) for name, index in STEP.findall(field)]
    try:
        for step in steps[:-1]:
            row = row[step]
        row[steps[-1]] = text
    except (LookupError, TypeError):
        return


def shorten_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "image" else shorten_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten_texts(item) for item in value]
    return shorten(value, SHOWN) if isinstance(value, str) else value
