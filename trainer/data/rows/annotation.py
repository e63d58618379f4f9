"""Read annotation files: a JSON list of rows, or JSON Lines. The content of a row is not interpreted here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.contract.annotation_file import is_list

# The two usual syntax errors of annotation files that were written by hand or with Python's str().
SYNTAX_HELP = "JSON requires double quotes and no comma before a closing bracket; to find the error, run: python -m json.tool {file}"
LIST_OF_ROWS = "put the rows into a list: [ {...}, {...} ]"
ONE_ROW_EACH = "write one row for each conversation"


def read_rows(file: Path) -> tuple[tuple[tuple[int, Any], ...], tuple[DataProblem, ...]]:
    """(number, row) for each row, and the problems of the file. Numbers start at 1: the position in the list, or the line.

    A line that is not JSON is a problem of that line; a list that is not JSON is a problem of the file.
    """
    text, problem = read_text(file)
    if problem:
        return (), (problem,)
    if not text.strip():
        return (), (file_problem(file, "is empty", ONE_ROW_EACH),)
    if is_list(file, text.lstrip()[:1]):
        return read_list(file, text)
    return read_lines(file, text)


def read_text(file: Path) -> tuple[str, DataProblem | None]:
    try:
        return file.read_text(encoding="utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", file_problem(file, f"is not UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return "", file_problem(file, f"cannot be read: {reason}", "set data.train and data.evaluation to the paths of readable JSON files")


def read_list(file: Path, text: str) -> tuple[tuple[tuple[int, Any], ...], tuple[DataProblem, ...]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        return (), (file_problem(file, describe(error), SYNTAX_HELP.format(file=file)),)
    if not rows:
        return (), (file_problem(file, "is an empty list", ONE_ROW_EACH),)
    return tuple(enumerate(rows, start=1)), ()


def read_lines(file: Path, text: str) -> tuple[tuple[tuple[int, Any], ...], tuple[DataProblem, ...]]:
    if spans_lines(text):
        return (), (file_problem(file, "is a single JSON object, not a list of rows", LIST_OF_ROWS),)
    rows: list[tuple[int, Any]] = []
    problems: list[DataProblem] = []
    for number, line in numbered_lines(text):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            fix = "write a list [ ... ], or one complete JSON object per line; " + SYNTAX_HELP.split(";")[0]
            problems.append(DataProblem(file=str(file), row=number, field="", problem=describe(error), fix=fix))
    if len(rows) == 1 and (key := find_wrapper(rows[0][1])):
        problem = f"is a single JSON object, not a list of rows: they are under its key {key!r}"
        return (), (file_problem(file, problem, LIST_OF_ROWS),)
    return tuple(rows), tuple(problems)


def find_wrapper(row: Any) -> str:
    """The key of an object whose only value is a list of rows, as {"data": [{"messages": ...}, ...]}; '' for a row."""
    values = list(row.items()) if isinstance(row, dict) else []
    wrapped = len(values) == 1 and isinstance(values[0][1], list) and values[0][1] and isinstance(values[0][1][0], dict)
    inner = values[0][1][0] if wrapped else {}
    is_message = bool({"role", "from"} & inner.keys())  # of a single row, whose content may be a list of blocks
    return str(values[0][0]) if not is_message and any(isinstance(value, list) for value in inner.values()) else ""


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank. Split only at line feeds: str.splitlines also splits at U+2028, which JSON allows in strings."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def spans_lines(text: str) -> bool:
    """Whether the whole text is one JSON object over several lines, such as `{"data": [...]}`."""
    if "\n" not in text.strip():
        return False
    try:
        return isinstance(json.loads(text), dict)
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
