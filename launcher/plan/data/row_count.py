"""Counts the rows of a file as trainer.data reads them, by the same modules of trainer.contract and without its packages.

Whether the rows are valid is not looked at: the data check refuses a run with others.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TextIO

from trainer.contract.annotation_file import count_repeated, read_meta
from trainer.contract.json_shape import find_shape, rows_of_object
from trainer.contract.row_file import find_container, import_pyarrow, open_binary, open_text, split_member
from trainer.contract.table_text import read_table

BLANK = re.compile(r"\s*")
UNREADABLE = (OSError, ValueError, EOFError, RecursionError, TypeError, KeyError, AttributeError, tarfile.TarError, ModuleNotFoundError)


def count_rows(file: Path) -> int:
    """Rows of a file; 0 for one that cannot be read here, as parquet without pyarrow, or that is invalid: the data check says what is wrong."""
    try:
        meta = read_meta(file)
        if meta is not None:
            return sum(count_entry(entry, file.parent) for entry in meta.values())
        return count_of(file)
    except UNREADABLE:
        return 0


def count_entry(entry: Any, folder: Path) -> int:
    return count_repeated(count_rows(folder / entry["annotation"]), entry.get("repeat_time", 1))


def count_of(file: Path) -> int:
    container = find_container(file)
    if container in ("parquet", "arrow"):
        return count_arrow(file) if container == "arrow" else int(import_pyarrow("pyarrow.parquet").read_metadata(file).num_rows)
    if container == "tar":
        return count_groups(file)
    with open_text(file) as (opened, _):
        if container == "json":
            return sum(map(count_conversations, read_json(file, opened)))
        return sum(1 for _ in read_table(opened, container))


def count_arrow(file: Path) -> int:
    pyarrow, ipc = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.ipc")
    with pyarrow.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            opened = ipc.open_file(mapped)
            return sum(opened.get_batch(number).num_rows for number in range(opened.num_record_batches))
        mapped.seek(0)
        return sum(batch.num_rows for batch in ipc.open_stream(mapped))


def count_groups(file: Path) -> int:
    with open_binary(file) as (plain, _), tarfile.open(fileobj=plain, mode="r|") as archive:
        members = (split_member(member.name)[0] for member in archive if not member.isdir())
        return sum(1 for _ in groupby(members))


# ------------------------------------------------------------------------------------------------------------------- JSON


def read_json(file: Path, opened: TextIO) -> Iterator[Any]:
    """The rows of a file; of JSON Lines only those that are lists, and None for the others, which are not parsed."""
    first = next((line for line in opened if line.strip()), "")
    second = opened.readline()
    shape = find_shape(file, first, second, cut=False)
    if shape == "list":
        yield from json.loads(first + second + opened.read())
    elif shape == "objects":
        yield from read_values(first + second + opened.read())
    else:
        lines = (line for line in chain((first, second), opened) if line.strip())
        one, two = next(lines, ""), next(lines, "")
        if one and not two:
            yield from read_single(json.loads(one))
        else:
            yield from map(parse_list, chain(filter(None, (one, two)), lines))


def parse_list(line: str) -> Any:
    return json.loads(line) if line.lstrip().startswith("[") else None


def read_values(text: str) -> Iterator[Any]:
    decode, values = json.JSONDecoder().raw_decode, list[Any]()
    place = BLANK.match(text).end()  # type: ignore[union-attr]  # it matches an empty text
    while place < len(text):
        value, end = decode(text, place)
        values.append(value)
        place = BLANK.match(text, end).end()  # type: ignore[union-attr]
    yield from values if len(values) > 1 else read_single(*values)


def read_single(value: Any) -> Iterator[Any]:
    """The rows of an object that is alone in its file."""
    rows = rows_of_object(value)
    if isinstance(rows, str):
        raise ValueError(rows)
    yield from [value] if rows is None else [row for _, row in rows]


def count_conversations(row: Any) -> int:
    return len(row) if isinstance(row, list) and row else 1
