"""The shapes of rows that people have, one entry each, tried from the first to the last. What a row says is judged elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from trainer.data.rows.parsed_row import Complain, ParsedRow, Row, keys_of
from trainer.data.rows.row_images import has_tags, read_pictures, take_blocks, take_first, take_named, take_tags
from trainer.data.rows.turn import pair, read_system, read_turns


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`fits`: whether a row that has `key` is one. `read`: makes a draft of it, and complains of what it cannot understand."""

    name: str
    key: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Complain], ParsedRow]
    example: str


def read_row_shape(row: Row, complain: Complain) -> ParsedRow | None:
    """None where the row has no known shape, or two."""
    shape = find_shape(row, complain)
    return shape.read(row, complain) if shape else None


def find_shape(row: Row, complain: Complain) -> Shape | None:
    present = [key for key in KEYS[0] if key in row] or [key for key in KEYS[1] if key in row]
    if len(present) == 1:
        return next(shape for shape in SHAPES_OF[present[0]] if shape.fits(row))
    if present:
        complain("", f"has both {' and '.join(present)}", "keep one of them")
    else:
        shape = nearest(row)
        complain("", f"has no known shape: keys {keys_of(row)}", f"the nearest is {shape.name}: {shape.example}")
    return None


def nearest(row: Row) -> Shape:
    """The shape with most keys in common, those that are nearly written alike counted half; of several the one that most people have."""

    def score(shape: Shape) -> tuple[float, bool]:
        keys = [key for key in EXAMPLE_KEYS if f'"{key}"' in shape.example]
        found = [MEANT.get(key, key) for key in list(row)[:MOST_KEYS]]
        return sum(1.0 if key in keys else 0.5 * bool(get_close_matches(key, keys, 1, 0.7)) for key in found), shape.example == USUAL

    return max(SHAPES, key=score)


# -------------------------------------------------------------------------------------------------------------- the readers


def read_conversations(row: Row, complain: Complain) -> ParsedRow:
    return read_listed(row, "conversations", complain)


def read_messages(row: Row, complain: Complain) -> ParsedRow:
    return read_listed(row, "messages", complain)


def read_listed(row: Row, key: str, complain: Complain) -> ParsedRow:
    turns, standing = read_turns(row, key, complain)
    pictures = take_blocks(row, standing, read_pictures(row, complain), complain)
    return ParsedRow(field=key, turns=read_system(row, turns, complain), pictures=pictures)


def read_minicpm(row: Row, complain: Complain) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", complain)
    pictures = read_pictures(row, complain)
    if turns is not None and isinstance(row.get("image"), str):
        turns = take_first(turns)
    return ParsedRow(field="conversations", turns=turns, pictures=pictures)


def read_named(row: Row, complain: Complain) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", complain)
    if turns is None:
        return ParsedRow(field="conversations", turns=None, pictures=())
    turns, pictures = take_named(row["image"], turns, complain)
    return ParsedRow(field="conversations", turns=turns, pictures=pictures)


def read_tagged(row: Row, complain: Complain) -> ParsedRow:
    turns, _ = read_turns(row, "conversations", complain)
    turns, pictures = take_tags(turns or (), complain) if turns is not None else (None, ())
    return ParsedRow(field="conversations", turns=read_system(row, turns, complain), pictures=pictures)


def read_pairs(row: Row, complain: Complain) -> ParsedRow:
    """[{"human": question, "assistant": answer}, ...]"""
    pairs = row["conversation"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(item, dict) for item in pairs):
        complain("conversation", "is not a list of questions and answers", 'write [{"human": "...", "assistant": "..."}]')
        return ParsedRow(field="conversation", turns=None, pictures=read_pictures(row, complain))
    fields = [(f"conversation[{place}].human", f"conversation[{place}].assistant") for place in range(len(pairs))]
    read = [pair(item.get("human"), item.get("assistant"), place, complain) for item, place in zip(pairs, fields, strict=True)]
    turns = tuple(turn for turns in read if turns for turn in turns) if all(read) else None
    return ParsedRow(field="conversation", turns=read_system(row, turns, complain), pictures=read_pictures(row, complain))


def read_query(row: Row, complain: Complain) -> ParsedRow:
    return read_asked(row, "query", row["query"], "response", complain)


def read_instruction(row: Row, complain: Complain) -> ParsedRow:
    """LLaMA-Factory joins instruction and input by a line feed."""
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n{more}" if question else more
    elif more not in (None, ""):
        question = more  # not text: told as such
    return read_asked(row, "instruction", question, "output", complain)


def read_asked(row: Row, asked: str, question: object, answered: str, complain: Complain) -> ParsedRow:
    """Question and answer under keys of their own, after the pairs of `history`."""
    pictures = read_pictures(row, complain)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(item, list) and len(item) == 2 for item in history):
        complain("history", "is not a list of pairs", 'write [["question", "answer"], ...]')
        return ParsedRow(field=asked, turns=None, pictures=pictures)
    past = [(item[0], item[1], (f"history[{place}][0]", f"history[{place}][1]")) for place, item in enumerate(history)]
    read = [pair(first, second, fields, complain) for first, second, fields in (*past, (question, row.get(answered), (asked, answered)))]
    turns = tuple(turn for turns in read if turns for turn in turns) if all(read) else None
    return ParsedRow(field=asked, turns=read_system(row, turns, complain), pictures=pictures)


# ---------------------------------------------------------------------------------------------------------------- the table


def any_row(_: Row) -> bool:
    return True


def has_roles(row: Row) -> bool:
    items = row["conversations"]
    return isinstance(items, list) and bool(items) and isinstance(items[0], dict) and "from" not in items[0] and "role" in items[0]


def has_blocks(row: Row) -> bool:
    items = row["messages"]
    return isinstance(items, list) and any(isinstance(item, dict) and isinstance(item.get("content"), list) for item in items)


MOST_KEYS = 40  # of a row that has no known shape: a table that was read as rows may have thousands of columns
# What tells a shape; the second rank counts where none of the first is there, since its words are common names of columns, too.
KEYS = (("conversations", "messages", "conversation"), ("query", "instruction"))
EXAMPLE_KEYS = (
    "id", "image", "images", "conversations", "messages", "conversation", "query", "response", "history", "instruction", "input",
    "output", "system",
)  # fmt: skip
# Keys that rows of no known shape often have, and what they stand for.
MEANT = {
    "question": "query", "prompt": "query", "answer": "response", "completion": "response", "caption": "response",
    "dialog": "conversations", "dialogue": "conversations", "chat": "messages", "image_path": "image", "img": "image",
}  # fmt: skip
USUAL = '{"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}'
SHAPES = (
    Shape(
        name="MiniCPM with an object of images",
        key="conversations",
        fits=lambda row: isinstance(row.get("image"), dict) and not {"path", "bytes"} & set(row["image"]),
        read=read_named,
        example='{"id": 1, "image": {"<image_00>": "a.png"}, "conversations": [{"role": "user", "content": "<image_00>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    Shape(
        name="Qwen-VL",
        key="conversations",
        fits=has_tags,
        read=read_tagged,
        example='{"id": 1, "conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\\n..."}, '
        '{"from": "assistant", "value": "..."}]}',
    ),
    Shape(
        name="MiniCPM",
        key="conversations",
        fits=has_roles,
        read=read_minicpm,
        example='{"id": 1, "image": "a.png", "conversations": [{"role": "user", "content": "<image>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    Shape(
        name="LLaVA, Qwen2.5-VL, InternVL and sharegpt",
        key="conversations",
        fits=any_row,
        read=read_conversations,
        example=USUAL,
    ),
    Shape(
        name="OpenAI and transformers",
        key="messages",
        fits=has_blocks,
        read=read_messages,
        example='{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "..."}]}]}',
    ),
    Shape(
        name="LLaMA-Factory, MindSpeed-MM and ms-swift",
        key="messages",
        fits=any_row,
        read=read_messages,
        example='{"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\\n..."}, '
        '{"role": "assistant", "content": "..."}]}',
    ),
    Shape(
        name="ms-swift's conversation",
        key="conversation",
        fits=any_row,
        read=read_pairs,
        example='{"system": "...", "conversation": [{"human": "<image>\\n...", "assistant": "..."}], "images": ["a.png"]}',
    ),
    Shape(
        name="ms-swift's query",
        key="query",
        fits=any_row,
        read=read_query,
        example='{"query": "<image>\\n...", "response": "...", "history": [["...", "..."]], "images": ["a.png"]}',
    ),
    Shape(
        name="LLaMA-Factory's alpaca",
        key="instruction",
        fits=any_row,
        read=read_instruction,
        example='{"instruction": "<image>\\n...", "input": "...", "output": "...", "system": "...", "images": ["a.png"]}',
    ),
)
SHAPES_OF = {key: tuple(shape for shape in SHAPES if shape.key == key) for rank in KEYS for key in rank}
