"""Read the rows of a file in any container: JSON in its usual shapes here, the others by the module of each. The content of a row is not interpreted."""

import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from trainer.contract import DataProblem
from trainer.contract.json_shape import Shape, find_shape, is_row, rows_of_object
from trainer.contract.row_file import INSTALL, Container, find_container, is_plain, open_text
from trainer.data.containers import json_text
from trainer.data.containers.arrow_rows import stream_arrow
from trainer.data.containers.csv_rows import stream_csv
from trainer.data.containers.found import ONE_ROW_EACH, Found, Position, file_problem, row_problem
from trainer.data.containers.json_text import RowDecoder, describe, scan_list, scan_objects
from trainer.data.containers.syntax_advice import advise
from trainer.data.containers.tar_rows import stream_tar
from trainer.data.media.store import MediaStore

# The two usual syntax errors of annotation files that were written by hand or with Python's str().
SYNTAX_HELP = "JSON requires double quotes and no comma before a closing bracket; to find the error, run: python -m json.tool {file}"
LIST_OF_ROWS = "put the rows into a list: [ {...}, {...} ]"
SHOWN_KEYS = 8
ONE_LIST = 'keep one list of rows in a file: [ {...}, {...} ], or {"data": [...]}; name a second one as data.evaluation'
TWICE = ("the key {!r} is given twice, with different values", "keep one of them")
UNREADABLE = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)  # what the decoders of damaged files raise


def read_rows(file: Path, store: MediaStore | None = None) -> tuple[tuple[tuple[int, Any], ...], tuple[DataProblem, ...]]:
    """(number, row) for each row, and the problems of the file. Numbers start at 1: the position in a list or a table, or the line.

    A line that is not JSON is a problem of that line; a list that is not JSON is a problem of the file, which has no rows then.
    """
    rows: list[tuple[int, Any]] = []
    problems: list[DataProblem] = []
    for found in stream_rows(file, store=store):
        (problems if isinstance(found, DataProblem) else rows).append(found)  # type: ignore[arg-type]
    whole = [problem for problem in problems if not problem.row]
    return ((), (*whole,)) if whole else (tuple(rows), tuple(problems))


def stream_rows(file: Path, position: Position | None = None, store: MediaStore | None = None) -> Iterator[Found]:
    """The same, one at a time, without the whole file in memory. A problem of the file (row 0) may follow rows that were read before it was found;
    nothing follows it. `position` is kept up to date. `store`: for the images in a file that has them as bytes.

    Raises InputRefused where it cannot keep an image."""
    try:
        yield from STREAMS[find_container(file)](file, position or Position(), store or MediaStore())
    except UnicodeDecodeError:
        yield find_text_problem(file) or file_problem(file, "is not UTF-8 text", "save it as UTF-8")
    except ModuleNotFoundError as error:
        yield file_problem(file, f"cannot be read without {error.name}, which is not installed here", f"run: {INSTALL}")
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends too early"
        yield file_problem(file, f"cannot be read: {reason}", "set data.train and data.evaluation to the paths of readable files of rows")


def stream_json(file: Path, position: Position, store: MediaStore) -> Iterator[Found]:
    with open_text(file) as (opened, binary):
        position.start(binary)
        begin = read_begin(file, opened)
        if not begin.text:
            yield file_problem(file, "is empty", ONE_ROW_EACH)
        elif "\0" in begin.text[:4]:
            yield file_problem(file, "is not UTF-8 text: it has zero bytes, as UTF-16 without its byte order mark has", "save it as UTF-8")
        elif begin.shape == "list":
            yield from stream_list(file, begin.text, opened)
        elif begin.shape == "objects":
            yield from expand_single(file, stream_objects(file, begin, opened), over_lines=True)
        else:
            yield from expand_single(file, stream_lines(file, begin, opened), over_lines=False)


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The first line of a file that is not blank and a part of the next one, `line`: the number of the first. Of a list, which may be a single line
    of any length, LIST_BYTES at most. '' for a blank file."""

    text: str
    line: int
    shape: Shape


def read_begin(file: Path, opened: TextIO) -> Begin:
    number = 1
    while (first := opened.readline(json_text.LIST_BYTES)) and not first.strip():
        number += first.endswith("\n")
    cut = not first.endswith("\n") and len(first) >= json_text.LIST_BYTES
    second = "" if cut or not first else opened.readline(json_text.LIST_BYTES)
    return Begin(text=first + second, line=number, shape=find_shape(file, first, second, cut=cut))


def find_layout(file: Path) -> Shape | None:
    """The shape of a file whose rows can be read from their places; None for other containers, compressed text, and an object that holds all rows.
    Raises OSError, ValueError."""
    if find_container(file) != "json" or not is_plain(file):
        return None
    with open_text(file) as (opened, _):
        begin = read_begin(file, opened)
        if begin.shape == "list":
            return begin.shape
        values = stream_objects(file, begin, opened) if begin.shape == "objects" else stream_lines(file, begin, opened)
        first, second = next(values, None), next(values, None)
    alone = second is None and isinstance(first, tuple) and isinstance(first[1], dict) and not is_row(first[1])
    return None if alone else begin.shape


def find_text_problem(file: Path) -> DataProblem | None:
    """Where a file is not UTF-8 text."""
    try:
        read_text(file)
    except UnicodeDecodeError as error:
        problem = f"is not {error.encoding.upper()} text: {error.reason} at byte {error.start}"
        return file_problem(file, problem, f"save it as UTF-8{guess_encoding(file)}")
    return None


def guess_encoding(file: Path) -> str:
    """The command for text in the usual encoding of Chinese Windows, if the file could be that."""
    try:
        file.read_bytes().decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return f"; if it is Chinese text of Windows, run: iconv -f GB18030 -t UTF-8 {file}"


def read_text(file: Path) -> str:
    with open_text(file) as (opened, _):
        return opened.read()


# ------------------------------------------------------------------------------------------------------------------- json


def stream_list(file: Path, text: str, opened: TextIO) -> Iterator[Found]:
    """`text`: the beginning of the file, with the bracket of the list. A list that is not JSON is read once more as a whole, for a message with
    line and column."""
    count, decoder = 0, RowDecoder()
    try:
        for _, _, row in scan_list(text, opened.read, decoder):
            count += 1
            yield row_or_problem(file, count, row, decoder)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        yield file_problem(file, describe_list(file, error), advise(file))
        return
    if not count:
        yield file_problem(file, "is an empty list", ONE_ROW_EACH)


def describe_list(file: Path, error: Exception) -> str:
    try:
        json.loads(read_text(file))
    except (ValueError, RecursionError) as found:
        return describe(found)
    return describe(error)


def stream_objects(file: Path, begin: Begin, opened: TextIO) -> Iterator[Found]:
    """Objects over several lines, one after the other: the number of a row is that of the line on which it begins."""
    decoder = RowDecoder()
    try:
        for _, _, number, row in scan_objects(begin.text, opened.read, begin.line, decoder):
            yield row_or_problem(file, number, row, decoder)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        yield file_problem(
            file, describe(error), "write a list [ ... ], or one complete JSON object after the other, without commas between them"
        )


def stream_lines(file: Path, begin: Begin, opened: TextIO) -> Iterator[Found]:
    decoder = RowDecoder()
    for place, line in enumerate(lines_of(begin.text, opened), start=begin.line):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            fix = "write a list [ ... ], or one complete JSON object per line; " + SYNTAX_HELP.split(";")[0]
            fix = fix if isinstance(error, json.JSONDecodeError) else "shorten this value, or remove the row"
            yield row_problem(file, place, describe(error), fix)
            continue
        yield row_or_problem(file, place, row, decoder)


def lines_of(begin: str, opened: TextIO) -> Iterator[str]:
    """Lines as they end with a line feed: of what str.splitlines takes for an end of a line, others may be in a text."""
    *whole, last = begin.split("\n")
    yield from (f"{line}\n" for line in whole)
    if last:
        yield last + opened.readline()
    while line := opened.readline(json_text.MOST_CHARACTERS):
        if len(line) == json_text.MOST_CHARACTERS:
            raise ValueError(f"a line is longer than {json_text.MOST_CHARACTERS:,} characters")
        yield line


def row_or_problem(file: Path, number: int, row: Any, decoder: RowDecoder) -> Found:
    if decoder.repeated:
        problem, fix = TWICE
        return row_problem(file, number, problem.format(decoder.repeated), fix, decoder.repeated)
    return number, row


def expand_single(file: Path, found: Iterator[Found], *, over_lines: bool) -> Iterator[Found]:
    """What was found; and of an object that is alone in its file and not a row, the rows in it. `over_lines`: such an object without rows is reported;
    on one line it is the row of JSON Lines, which is reported when its keys are read."""
    first = next(found, None)
    if first is None or isinstance(first, DataProblem) or is_row(first[1]) or not isinstance(first[1], dict):
        yield from chain(() if first is None else (first,), found)
        return
    second = next(found, None)
    if second is not None:
        yield from chain((first, second), found)
        return
    rows = rows_of_object(first[1])
    if isinstance(rows, str):
        yield file_problem(file, rows, ONE_LIST)
    elif rows is not None:
        yield from rows
    elif over_lines:
        keys = ", ".join(map(repr, list(first[1])[:SHOWN_KEYS])) or "none"
        yield file_problem(file, f"is a single JSON object, not a list of rows; its keys: {keys}", LIST_OF_ROWS)
    else:
        yield first


# -------------------------------------------------------------------------------------------------------------- containers

STREAMS: dict[Container, Callable[[Path, Position, MediaStore], Iterator[Found]]] = {
    "json": stream_json,
    "csv": stream_csv,
    "tsv": stream_csv,
    "parquet": stream_arrow,
    "arrow": stream_arrow,
    "tar": stream_tar,
}
