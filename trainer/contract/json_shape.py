"""How rows are laid out in JSON: what the first line of a file says of it, and where the rows are in a file that is a single object.

A single object is a row; or it wraps one list of rows, as {"data": [...]}; or it has a row by id, as {"id1": {...}}; or it has the rows by column,
as {"question": [...], "answer": [...]}, which Dataset.to_dict of the datasets library and DataFrame.to_json of pandas write. An object that could
be two of them is refused.
"""

import json
from pathlib import Path
from typing import Any, Literal

from trainer.contract.annotation_file import is_list

Shape = Literal["list", "lines", "objects"]

NUMBERED = list[tuple[int, Any]]
# Keys of a row, whose value is then a text; a key that has a list of messages needs no other name than that of the role.
TEXT_KEYS = frozenset((
    "messages", "conversations", "conversation", "query", "response", "instruction", "output", "question", "answer", "prompt", "completion",
    "caption", "text", "chosen", "rejected",
))  # fmt: skip
LISTED_KEYS = frozenset(
    ("messages", "conversations", "conversation", "history", "images", "image")
)  # lists in a row: by column, lists of them
ROLE_KEYS = frozenset(("role", "from", "user", "human", "assistant"))
WRAPPERS = frozenset(("data", "rows", "train", "examples", "samples", "instances", "items", "records", "test", "validation", "eval"))


def find_shape(file: Path, first: str, second: str, *, cut: bool) -> Shape:
    """`first`: the first line that is not blank, or its beginning if it is `cut`; `second`: the line after it. A .jsonl file is read line by line,
    where a line may be a list of conversations, unless its first line is only the beginning of a list or of an object."""
    letter = first.lstrip()[:1]
    if is_list(file, letter):
        return "list"
    if letter not in ("[", "{"):
        return "lines"
    begun = begins(first, cut=cut)
    if letter == "[":
        return "list" if begun == "goes on" else "lines"
    if begun == "goes on":  # a broken first line of JSON Lines looks the same, but the next line is whole then
        return "lines" if second.lstrip().startswith("{") and begins(second) == "whole" else "objects"
    return "objects" if begun == "another" else "lines"


def begins(line: str, *, cut: bool = False) -> Literal["whole", "another", "goes on", "broken"]:
    """Whether a line is a JSON value, the beginning of one, or a value with another object after it."""
    text = line.strip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return "whole" if cut else "goes on" if error.pos >= len(text) else "broken"
    except (ValueError, RecursionError):
        return "broken"
    rest = text[end:].lstrip()
    return "whole" if not rest else "another" if rest.startswith("{") else "broken"


# ---------------------------------------------------------------------------------------------------------- a single object


def rows_of_object(value: Any) -> NUMBERED | str | None:
    """The rows of a value that is alone in its file, numbered from 1 in their order; why there are none; None for an object that is a row, or whose
    keys say nothing about it."""
    if not isinstance(value, dict) or is_row(value):
        return None
    holders = {key: found for key, found in value.items() if holds_rows(key, found)}
    if len(holders) > 1:
        counts = ", ".join(f"{key!r} ({len(found)})" for key, found in holders.items())
        return f"is a single JSON object with rows under several keys: {counts}"
    if holders:
        return rows_of_wrapper(value, *holders)
    return rows_by_column(value) if value and all(isinstance(item, list) for item in value.values()) else rows_by_id(value)


def is_row(value: Any) -> bool:
    """Whether an object has texts under keys of a row, or a list of messages."""
    return isinstance(value, dict) and any(
        (key in TEXT_KEYS and isinstance(item, str)) or (isinstance(item, list) and bool(item) and is_message(item[0]))
        for key, item in value.items()
    )


def is_message(item: Any) -> bool:
    return isinstance(item, dict) and not ROLE_KEYS.isdisjoint(item)


def holds_rows(key: str, found: Any) -> bool:
    """Whether this is a list of rows: by its first one, and by the name of the key where the keys of the row are unknown."""
    if not isinstance(found, list) or not found:
        return False
    first = found[0][0] if isinstance(found[0], list) and found[0] and key not in LISTED_KEYS else found[0]
    return is_row(first) or (isinstance(first, dict) and key.lower() in WRAPPERS)


def rows_of_wrapper(value: dict[str, Any], key: str) -> NUMBERED | str:
    others = [name for name, item in value.items() if isinstance(item, list) and name != key and item]
    if others:
        return f"is a single JSON object with a list of rows under {key!r} and other lists under {', '.join(map(repr, others))}"
    return list(enumerate(value[key], start=1))


def rows_by_column(columns: dict[str, list[Any]]) -> NUMBERED | str | None:
    lengths = {key: len(column) for key, column in columns.items()}
    if not (columns.keys() & (TEXT_KEYS | LISTED_KEYS)) and len(columns) < 2:
        return None
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key!r} {length}" for key, length in lengths.items())
        return f"is a single JSON object by column, and its columns have different numbers of rows: {listed}"
    return [(number, dict(zip(columns, items, strict=True))) for number, items in enumerate(zip(*columns.values(), strict=True), start=1)]


def rows_by_id(value: dict[str, Any]) -> NUMBERED | str | None:
    """A row by id gets it as its `id`, if it has no other; the columns of pandas have an object of index and value each."""
    entries = [item for item in value.values() if isinstance(item, dict) and item]
    if not entries or len(entries) < len(value):
        return None
    rows = [key for key, item in value.items() if is_row(item)]
    alike = len(value) > 1 and len({frozenset(item) for item in entries}) == 1
    if not rows and alike and all(key.isdecimal() for key in entries[0]):
        return [(number, {key: value[key][index] for key in value}) for number, index in enumerate(entries[0], start=1)]
    if rows and len(rows) < len(value):
        other = next(key for key in value if key not in rows)
        return f"is a single JSON object with rows by id, but {other!r} is not a row"
    return [(number, {"id": key, **item}) for number, (key, item) in enumerate(value.items(), start=1)] if rows or alike else None
