"""The supported row formats, one entry each, tried in order. The content of a row is checked elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial

from trainer.data.rows.known_key import KNOWN_IN_ROW
from trainer.data.rows.message.tool import TOOL_KEYS, read_tools
from trainer.data.rows.message.turn import read_system, read_turns
from trainer.data.rows.parsed_row import AddProblem, ParsedRow, Row, keys_of
from trainer.data.rows.plain_row import ask, has_image, read_caption, read_instruction, read_pair, read_pairs, read_prompt, read_question
from trainer.data.rows.row_images import choose_images, find_tags, has_tags, list_changes, read_images, replace_named_marks, replace_tags
from trainer.data.rows.row_rules import RowRules


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """`fits`: whether a row with `key` has this format. `read`: parses it, and reports what it cannot parse. `texts`: keys of further texts.
    `caption`: it has no question."""

    name: str
    key: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, AddProblem], ParsedRow]
    example: str
    texts: tuple[str, ...] = ()
    caption: bool = False


def parse_row(row: Row, row_format: RowFormat | None, rules: RowRules, add_problem: AddProblem) -> ParsedRow | None:
    """None without a format."""
    parsed = row_format.read(row, add_problem) if row_format else None
    if parsed is None or row_format is None:
        return None
    if row_format.caption and parsed.turns:
        parsed = ask(parsed, rules.question, add_problem)
    if not row.keys().isdisjoint(TOOL_KEYS):
        parsed = replace(parsed, tools=read_tools(row, add_problem))
    if changes := list_changes(row):
        parsed = replace(parsed, adjustments=(*parsed.adjustments, *changes))
    if not parsed.images and parsed.turns and (found := find_tags(parsed.turns)):
        turns, images = replace_tags(parsed.turns, add_problem, found[0])
        parsed = replace(parsed, turns=turns, images=images, adjustments=(*parsed.adjustments, found[1]))
    return parsed


def known_keys(row_format: RowFormat | None) -> frozenset[str]:
    """Of rows of this format: the keys that are read, and those that change nothing."""
    return KNOWN[row_format.name] if row_format else KNOWN_IN_ROW


def find_format(row: Row, add_problem: AddProblem) -> RowFormat | None:
    """None if the row has no known format, or two."""
    present = [key for key in KEYS[0] if key in row] or find_other(row)
    if len(present) == 1:
        return next(each for each in FORMATS_OF_KEY[present[0]] if each.fits(row))
    if present:
        add_problem("", f"has both {' and '.join(present)}", "keep one of them")
    else:
        similar = nearest_format(row)
        add_problem(
            "",
            f"unknown row format: keys {keys_of(row)}{suggest_keys(row) or lacks(row, similar)}",
            f"the most similar format is {similar.name}: {similar.example}",
        )
    return None


def find_other(row: Row) -> list[str]:
    """The keys of the first group with one that fits, after the first group."""
    groups = ([key for key in group if key in row and any(each.fits(row) for each in FORMATS_OF_KEY[key])] for group in KEYS[1:])
    return next(filter(None, groups), [])


def lacks(row: Row, similar: RowFormat) -> str:
    key = next((key for key in (similar.key, *similar.texts[:1]) if key not in row), "")
    return f"; it lacks {key!r}, which holds the texts" if key else ""


def suggest_keys(row: Row) -> str:
    """What the keys of the row may have been meant as; '' where none is near a known one."""
    near = {key: MEANT.get(key) or next(iter(get_close_matches(key, EXAMPLE_KEYS, 1, 0.7)), key) for key in list(row)[:MOST_KEYS]}
    meant = [f"{known!r} in place of {key!r}" for key, known in near.items() if key not in EXAMPLE_KEYS and known != key]
    return f"; did you mean {', '.join(meant)}?" if meant else ""


def nearest_format(row: Row) -> RowFormat:
    """The format with most keys in common; similar keys count half. If several match equally, the most usual one."""

    def score(row_format: RowFormat) -> tuple[float, bool]:
        keys = [key for key in EXAMPLE_KEYS if f'"{key}"' in row_format.example]
        found = [MEANT.get(key, key) for key in list(row)[:MOST_KEYS]]
        return sum(1.0 if key in keys else 0.5 * bool(get_close_matches(key, keys, 1, 0.7)) for key in found), row_format.example == USUAL

    return max(ROW_FORMATS, key=score)


# -------------------------------------------------------------------------------------------------------------- the readers


def read_listed(row: Row, add_problem: AddProblem, *, key: str) -> ParsedRow:
    turns, in_blocks = read_turns(row, key, add_problem)
    images = choose_images(in_blocks, read_images(row, add_problem), add_problem)
    return ParsedRow(field=key, turns=read_system(row, turns, add_problem), images=images)


def read_minicpm(row: Row, add_problem: AddProblem) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", add_problem)
    return ParsedRow(field="conversations", turns=read_system(row, turns, add_problem), images=read_images(row, add_problem))


def read_named(row: Row, add_problem: AddProblem) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", add_problem)
    if turns is None:
        return ParsedRow(field="conversations", turns=None, images=())
    turns, images = replace_named_marks(row["image"], turns, add_problem)
    return ParsedRow(field="conversations", turns=read_system(row, turns, add_problem), images=images)


def read_tagged(row: Row, add_problem: AddProblem) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", add_problem)
    turns, images = replace_tags(turns, add_problem) if turns is not None else (None, ())
    return ParsedRow(field="conversations", turns=read_system(row, turns, add_problem), images=images)


# ---------------------------------------------------------------------------------------------------------------- the table


def any_row(_: Row) -> bool:
    return True


def has_roles(row: Row) -> bool:
    items = row["conversations"]
    return isinstance(items, list) and bool(items) and isinstance(items[0], dict) and "from" not in items[0] and "role" in items[0]


def has_blocks(row: Row) -> bool:
    items = row["messages"]
    return isinstance(items, list) and any(isinstance(item, dict) and isinstance(item.get("content"), list) for item in items)


MOST_KEYS = 40  # to compare, of a row in an unknown format: it may be a table with thousands of columns
# Keys that identify a format. Those of the second group are also common names of columns, and used only if the row has none of the first.
KEYS = (
    ("conversations", "messages", "conversation"), ("query", "instruction"), ("texts", "question", "prompt"), ("caption",), ("text",),
)  # fmt: skip
EXAMPLE_KEYS = (
    "id", "image", "images", "conversations", "messages", "conversation", "query", "response", "history", "instruction", "input",
    "output", "system", "question", "answer", "prompt", "completion", "texts", "caption", "file_name",
)  # fmt: skip
# Keys of other formats, and the keys here with the same meaning.
MEANT = {
    "questions": "question",
    "dialog": "conversations", "dialogue": "conversations", "chat": "messages", "image_path": "image", "img": "image",
}  # fmt: skip
USUAL = '{"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}'
ROW_FORMATS = (
    RowFormat(
        name="MiniCPM with an object of images",
        key="conversations",
        fits=lambda row: isinstance(row.get("image"), dict) and not {"path", "bytes", "url", "image"} & set(row["image"]),
        read=read_named,
        example='{"id": 1, "image": {"<image_00>": "a.png"}, "conversations": [{"role": "user", "content": "<image_00>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    RowFormat(
        name="Qwen-VL",
        key="conversations",
        fits=has_tags,
        read=read_tagged,
        example='{"id": 1, "conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\\n..."}, '
        '{"from": "assistant", "value": "..."}]}',
    ),
    RowFormat(
        name="MiniCPM",
        key="conversations",
        fits=has_roles,
        read=read_minicpm,
        example='{"id": 1, "image": "a.png", "conversations": [{"role": "user", "content": "<image>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    RowFormat(
        name="LLaVA, Qwen2.5-VL, InternVL and sharegpt",
        key="conversations",
        fits=any_row,
        read=partial(read_listed, key="conversations"),
        example=USUAL,
    ),
    RowFormat(
        name="OpenAI and transformers",
        key="messages",
        fits=has_blocks,
        read=partial(read_listed, key="messages"),
        example='{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "..."}]}]}',
    ),
    RowFormat(
        name="LLaMA-Factory, MindSpeed-MM and ms-swift",
        key="messages",
        fits=any_row,
        read=partial(read_listed, key="messages"),
        example='{"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    RowFormat(
        name="ms-swift's conversation",
        key="conversation",
        fits=any_row,
        read=partial(read_pairs, key="conversation", asked="human"),
        example='{"system": "...", "conversation": [{"human": "<image>\\n...", "assistant": "..."}], "images": ["a.png"]}',
    ),
    RowFormat(
        name="ms-swift's query",
        key="query",
        fits=any_row,
        read=lambda row, add_problem: read_pair(row, "query", row["query"], "response", add_problem),
        texts=("response", "history"),
        example='{"query": "<image>\\n...", "response": "...", "history": [["...", "..."]], "images": ["a.png"]}',
    ),
    RowFormat(
        name="LLaMA-Factory's alpaca",
        key="instruction",
        fits=any_row,
        read=read_instruction,
        texts=("input", "output", "history"),
        example='{"instruction": "<image>\\n...", "input": "...", "output": "...", "system": "...", "images": ["a.png"]}',
    ),
    RowFormat(
        name="The Cauldron",
        key="texts",
        fits=lambda row: isinstance(row["texts"], list),
        read=partial(read_pairs, key="texts", asked="user"),
        example='{"images": ["a.png"], "texts": [{"user": "<image>\\n...", "assistant": "..."}]}',
    ),
    RowFormat(
        name="question and answer",
        key="question",
        fits=lambda row: "answer" in row or "answers" in row,
        read=read_question,
        texts=("answer", "history", "file_name"),
        example='{"image": "a.png", "question": "<image>\\n...", "answer": "..."}',
    ),
    RowFormat(
        name="prompt and completion",
        key="prompt",
        fits=lambda row: "completion" in row or "response" in row or "answer" in row,
        read=read_prompt,
        texts=("completion", "response", "answer", "file_name", "history"),
        example='{"image": "a.png", "prompt": "<image>\\n...", "completion": "..."}',
    ),
    RowFormat(
        name="caption",
        key="caption",
        fits=has_image,
        read=partial(read_caption, key="caption"),
        texts=("file_name",),
        caption=True,
        example='{"image": "a.png", "caption": "..."}',
    ),
    RowFormat(
        name="image and text",
        key="text",
        fits=has_image,
        read=partial(read_caption, key="text"),
        texts=("file_name",),
        caption=True,
        example='{"file_name": "a.png", "text": "..."}',
    ),
)
KNOWN = {each.name: KNOWN_IN_ROW | {each.key, *each.texts} for each in ROW_FORMATS}
FORMATS_OF_KEY = {key: tuple(each for each in ROW_FORMATS if each.key == key) for group in KEYS for key in group}
