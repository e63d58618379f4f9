"""Read annotation files: a JSON list of rows, or JSON Lines. The content of a row is not interpreted here."""

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from trainer.contract import DataProblem
from trainer.contract.annotation_file import is_list
from trainer.data.containers.syntax_advice import advise

# The two usual syntax errors of annotation files that were written by hand or with Python's str().
SYNTAX_HELP = "JSON requires double quotes and no comma before a closing bracket; to find the error, run: python -m json.tool {file}"
LIST_OF_ROWS = "put the rows into a list: [ {...}, {...} ]"
ONE_ROW_EACH = "write one row for each conversation"
LIST_BYTES = 2**20  # characters of a list that are read at a time; a longer row is read whole
NUMBER_GOES_ON = 4  # characters after 1 that may show it to be a part of 1e-5
BLANK = re.compile(r"[ \t\n\r]*")  # JSON's white space

Found = tuple[int, Any] | DataProblem


class Position:
    """How far a file is read, and how large it is, in bytes."""

    opened: TextIO | None = None
    size = 0

    @property
    def bytes_read(self) -> int:
        return self.opened.buffer.tell() if self.opened is not None and not self.opened.closed else self.size

    def start(self, opened: TextIO) -> None:
        self.opened, self.size = opened, os.fstat(opened.fileno()).st_size


def read_rows(file: Path) -> tuple[tuple[tuple[int, Any], ...], tuple[DataProblem, ...]]:
    """(number, row) for each row, and the problems of the file. Numbers start at 1: the position in the list, or the line.

    A line that is not JSON is a problem of that line; a list that is not JSON is a problem of the file, which has no rows then.
    """
    rows: list[tuple[int, Any]] = []
    problems: list[DataProblem] = []
    for found in stream_rows(file):
        (problems if isinstance(found, DataProblem) else rows).append(found)  # type: ignore[arg-type]
    whole = [problem for problem in problems if not problem.row]
    return ((), (*whole,)) if whole else (tuple(rows), tuple(problems))


def stream_rows(file: Path, position: Position | None = None) -> Iterator[Found]:
    """The same, one at a time, without the whole file in memory. A problem of the file (row 0) may follow rows that were read before it was found;
    nothing follows it. `position` is kept up to date."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as opened:
            if position is not None:
                position.start(opened)
            first, lines = first_line(opened)
            if not first:
                yield file_problem(file, "is empty", ONE_ROW_EACH)
            elif is_list(file, first.lstrip()[:1]):
                yield from stream_list(file, first, opened)
            else:
                yield from stream_lines(file, lines, first, opened)
    except UnicodeDecodeError:
        yield read_text(file)[1] or file_problem(file, "is not UTF-8 text", "save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield file_problem(file, f"cannot be read: {reason}", "set data.train and data.evaluation to the paths of readable JSON files")


def first_line(opened: TextIO) -> tuple[str, int]:
    """The beginning of the first line that is not blank, with its number: of a list, which may be a single line of any length, LIST_BYTES at
    most; '' for a blank file."""
    number = 1
    while line := opened.readline(LIST_BYTES):
        if line.strip():
            return line, number
        number += line.endswith("\n")
    return "", number


def read_text(file: Path) -> tuple[str, DataProblem | None]:
    """The whole file, and where it is not UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", file_problem(file, f"is not UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8")


# -------------------------------------------------------------------------------------------------------------------- list


def stream_list(file: Path, text: str, opened: TextIO) -> Iterator[Found]:
    """`text`: the beginning of the file, with the bracket of the list. A list that is not JSON is read once more as a whole, for a message with
    line and column."""
    count = 0
    try:
        for _, _, row in scan_list(text, opened.read):
            count += 1
            yield count, row
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        yield file_problem(file, describe_list(file, error), advise(file))
        return
    if not count:
        yield file_problem(file, "is an empty list", ONE_ROW_EACH)


def scan_list(text: str, read: Callable[[int], str]) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each value of a JSON list, in characters from the beginning of `text`, which `read` continues. Raises ValueError and
    RecursionError for what json.loads would refuse, without its line and column."""
    decode = json.JSONDecoder().raw_decode
    before, place, expects = 0, text.index("[") + 1, "value or end"
    while True:
        place = BLANK.match(text, place).end()  # type: ignore[union-attr]  # it matches an empty text
        if place == len(text):
            before, text, place = before + place, read(LIST_BYTES), 0
            if not text:
                break
        elif expects == "comma or end":
            raise_unless(text[place] in ",]")
            expects, place = "value" if text[place] == "," else "nothing", place + 1
        elif expects == "value or end" and text[place] == "]":
            expects, place = "nothing", place + 1
        else:
            raise_unless(expects != "nothing")
            value, start, end, text = decode_value(decode, text, place, read)
            before += place - start
            yield before + start, before + end, value
            place, expects = end, "comma or end"
    raise_unless(expects == "nothing")


def decode_value(
    decode: Callable[[str, int], tuple[Any, int]], text: str, place: int, read: Callable[[int], str]
) -> tuple[Any, int, int, str]:
    """The value at `place`, where it starts and ends, and the text of these places: continued as far as the value needs it, without what is before
    the value."""
    while True:
        try:
            value, end = decode(text, place)
        except ValueError:
            more = read(max(LIST_BYTES, len(text) - place))
            if not more:
                raise
        else:
            more = read(LIST_BYTES) if len(text) - end < NUMBER_GOES_ON else ""
            if not more:
                return value, place, end, text
        text, place = text[place:] + more, 0


def raise_unless(valid: bool) -> None:
    if not valid:
        raise ValueError("not a list of JSON values")


def describe_list(file: Path, error: Exception) -> str:
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as found:
        return describe(found)
    return describe(error)


# ------------------------------------------------------------------------------------------------------------------- lines


def stream_lines(file: Path, number: int, first: str, opened: TextIO) -> Iterator[Found]:
    """`first`: the beginning of line `number`, which `opened` continues."""
    rest = "" if first.endswith("\n") else opened.readline()
    held: tuple[int, Any] | None = None  # a first row that may turn out to be the only one, with all rows under one of its keys
    for place, line in chain(((number, first + rest),), enumerate(opened, start=number + 1)):
        if not line.strip():
            continue
        try:
            found: Found = (place, json.loads(line))
        except (ValueError, RecursionError) as error:
            if place == number and spans_lines(file):
                yield file_problem(file, "is a single JSON object, not a list of rows", LIST_OF_ROWS)
                return
            fix = "write a list [ ... ], or one complete JSON object per line; " + SYNTAX_HELP.split(";")[0]
            yield DataProblem(file=str(file), row=place, field="", problem=describe(error), fix=fix)
            continue
        if place == number and find_wrapper(found[1]):
            held = found
            continue
        if held is not None:
            yield held
            held = None
        yield found
    if held is not None:
        problem = f"is a single JSON object, not a list of rows: they are under its key {find_wrapper(held[1])!r}"
        yield file_problem(file, problem, LIST_OF_ROWS)


def find_wrapper(row: Any) -> str:
    """The key of an object whose only value is a list of rows, as {"data": [{"messages": ...}, ...]}; '' for a row."""
    values = list(row.items()) if isinstance(row, dict) else []
    wrapped = len(values) == 1 and isinstance(values[0][1], list) and values[0][1] and isinstance(values[0][1][0], dict)
    inner = values[0][1][0] if wrapped else {}
    is_message = bool({"role", "from"} & inner.keys())  # of a single row, whose content may be a list of blocks
    return str(values[0][0]) if not is_message and any(isinstance(value, list) for value in inner.values()) else ""


def spans_lines(file: Path) -> bool:
    """Whether the whole text is one JSON object over several lines, such as `{"data": [...]}`."""
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
    if isinstance(error, RecursionError):
        return "is not usable JSON: nested too deeply"
    return f"is not usable JSON: {error}"


def file_problem(file: Path, problem: str, fix: str) -> DataProblem:
    return DataProblem(file=str(file), row=0, field="", problem=problem, fix=fix)
