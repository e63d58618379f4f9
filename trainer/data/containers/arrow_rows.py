"""The rows of a parquet or Arrow file (IPC file or stream, as the datasets library writes), read by pyarrow.

Row groups and batches are read one after the other. Bytes are kept as files (trainer.data.media.store), and their paths take their place; Arrow has no
missing keys, so that a null in a struct is one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.contract.row_file import find_container, import_pyarrow
from trainer.contract.table_text import read_cell
from trainer.data.containers.found import ONE_ROW_EACH, Found, Position, file_problem, row_problem
from trainer.data.media.store import MediaStore

ROWS = 64  # at a time: a row may have several images
BUFFER_BYTES = 2**20  # read at a time of each column, instead of all of it in a row group
TURNS = (
    "messages",
    "conversations",
    "conversation",
    "texts",
)  # lists of structs, which older versions of datasets wrote as structs of lists
FEATHER_1 = b"FEA1"
JSON_TYPES = (str, int, float, bool, type(None))


def stream_arrow(file: Path, position: Position, store: MediaStore) -> Iterator[Found]:
    """Raises ModuleNotFoundError without pyarrow, OSError, InputRefused."""
    pyarrow = import_pyarrow("pyarrow")
    with file.open("rb") as opened:
        old = opened.read(4) == FEATHER_1
        position.start(opened)
        position.share = 0.0
        if old:
            yield file_problem(file, "is a Feather file of version 1", "write it again with pyarrow.feather.write_feather, or as parquet")
            return
        number = 0
        try:
            for share, batch in read_batches(file):
                for row in batch.to_pylist():
                    number += 1
                    yield read_table_row(file, number, row, store)
                position.share = share
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            after = f" after row {number:,}" if number else ""
            yield file_problem(file, f"cannot be read{after}: {reason}", "write the file again, or copy it again from its source")
            return
        if not number:
            yield file_problem(file, "has no rows", ONE_ROW_EACH)


def read_batches(file: Path) -> Iterator[tuple[float, Any]]:
    """(share of the rows that are read after it, at most ROWS rows). Offsets and texts of an Arrow file are checked before anything uses them:
    nothing else does."""
    if find_container(file) == "parquet":
        yield from read_parquet(file)
        return
    pyarrow, ipc = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.ipc")
    with pyarrow.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            opened = ipc.open_file(mapped)
            batches: Any = ((number / opened.num_record_batches, opened.get_batch(number)) for number in range(opened.num_record_batches))
        else:
            mapped.seek(0)
            batches = ((mapped.tell() / mapped.size(), batch) for batch in ipc.open_stream(mapped))
        for share, batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS):
                yield share, batch.slice(start, ROWS)


def read_parquet(file: Path) -> Iterator[tuple[float, Any]]:
    with import_pyarrow("pyarrow.parquet").ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, memory_map=False) as opened:
        total, done = opened.metadata.num_rows, 0
        for batch in opened.iter_batches(batch_size=ROWS, use_threads=False):
            done += batch.num_rows
            yield done / total, batch


def read_table_row(file: Path, number: int, row: dict[str, Any], store: MediaStore) -> Found:
    read: dict[str, Any] = {}
    for name, value in row.items():
        try:
            read[name] = read_value(name, value, store)
        except ValueError as error:
            return row_problem(file, number, str(error), "replace the image, or remove the row", name)
    return number, {name: value for name, value in read.items() if value is not None}


def read_value(name: str, value: Any, store: MediaStore) -> Any:
    """A value as JSON has it. Raises ValueError for bytes that cannot be kept, InputRefused."""
    value = plain(value, store)
    if name in TURNS and isinstance(value, dict) and all(isinstance(item, list) for item in value.values()):
        if len({len(item) for item in value.values()}) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        return value
    return read_cell(name, value)


def plain(value: Any, store: MediaStore) -> Any:
    if isinstance(value, JSON_TYPES):
        return value
    if isinstance(value, bytes):
        return str(store.keep(value))
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and value.keys() <= {"bytes", "path"}:  # an image of the datasets library
            return str(store.keep(value["bytes"]))
        return {key: plain(item, store) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item, store) for item in value]
    return str(value)  # dates, times and decimals
