"""Rows of text tables: csv and tsv, with the names of the keys in the first line. A cell with a list or an object in JSON is read as such."""

import ast
import csv
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

from trainer.contract.row_file import Container

MOST_CHARACTERS = 2**28  # of a cell: one may hold an image in base64
# Cells that may hold a list or an object. Other texts that begin with a bracket stay texts.
LISTED = frozenset(("messages", "conversations", "conversation", "history", "images", "image", "answers", "objects", "tools", "texts"))
WRITE_TABLE = "write the names of the keys in the first line, then one row for each conversation"
OPENING = ("[", "{")


class TableFault(ValueError):
    """Why a table or one of its rows cannot be read, and the fix. `line`: 0 for the whole table."""

    def __init__(self, problem: str, fix: str, line: int = 0) -> None:
        super().__init__(problem)
        self.problem, self.fix, self.line = problem, fix, line


def read_table(opened: TextIO, container: Container) -> Iterator[tuple[int, dict[str, Any] | TableFault]]:
    """(line, row) of each row, by the line that it begins on, where the header is the first. Empty cells are left out. A row that does not fit the
    header is a TableFault in its place. Raises TableFault for a table without rows or with an unusable header, and for one in which quotes are not
    closed."""
    csv.field_size_limit(MOST_CHARACTERS)
    blank = 0
    while (first := opened.readline(MOST_CHARACTERS)) and not first.strip():
        blank += 1
    if not first:
        raise TableFault("is empty", WRITE_TABLE)
    if not first.endswith("\n") and "\r" in first.rstrip("\r"):
        raise TableFault("has lines that end with a carriage return alone", "save it with line feeds")
    delimiter = find_delimiter(first, container)
    reader = csv.reader(chain((first,), iter(lambda: opened.readline(MOST_CHARACTERS), "")), delimiter=delimiter, strict=True)
    try:
        names = check_header(next(reader, []))
        begin, count = blank + reader.line_num + 1, 0
        for cells in reader:
            if cells:
                count += 1
                yield begin, make_row(names, cells)
            begin = blank + reader.line_num + 1
    except csv.Error as error:
        fix = 'write a text with a quote, a delimiter or a line feed in quotes, and each quote in it twice: "He said ""yes"""'
        raise TableFault(f"is not a valid table: {error} at line {blank + reader.line_num}", fix) from error
    if not count:
        raise TableFault("has a header and no rows", WRITE_TABLE)


def find_delimiter(header: str, container: Container) -> str:
    """A tab for tsv; for csv a comma or, as in the locales of Europe, a semicolon: the one that the header has. Raises TableFault for both or none of
    them where another fits."""
    counts = {mark: len(next(csv.reader([header], delimiter=mark), [])) - 1 for mark in ",;\t"}
    if container == "tsv":
        if not counts["\t"] and (counts[","] or counts[";"]):
            raise TableFault("is named .tsv, but its first line has no tab", "name it .csv, or separate its columns by tabs")
        return "\t"
    if counts[","] and counts[";"]:
        raise TableFault("has commas and semicolons in its first line", "write the names of the columns in quotes, separated by commas")
    if not counts[","] and not counts[";"] and counts["\t"]:
        raise TableFault("is named .csv, but its columns are separated by tabs", "name it .tsv")
    return ";" if counts[";"] else ","


def check_header(names: list[str]) -> list[str]:
    """The names of the columns. A first column without one is the index that pandas writes. Raises TableFault."""
    names = [name.strip() for name in names]
    unnamed = [number for number, name in enumerate(names, start=1) if not name and number > 1]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if unnamed:
        raise TableFault(
            f"has no name for column {unnamed[0]} in its first line",
            "write the names of the keys in the first line, such as: image,query,response",
        )
    if twice:
        raise TableFault(f"has two columns with the name {twice[0]!r}", "give each column a name of its own")
    return names


def make_row(names: list[str], cells: list[str]) -> dict[str, Any] | TableFault:
    if len(cells) != len(names):
        fix = "write a cell with a delimiter or a line feed in quotes, and an empty cell for a value that is missing"
        return TableFault(f"has {len(cells)} cells, but the first line names {len(names)} columns", fix)
    return {name: read_cell(name, cell) for name, cell in zip(names, cells, strict=True) if cell and name}


def read_cell(name: str, text: Any) -> Any:
    """The list or object that is written in a cell: in JSON, or as Python prints it, which is what pandas writes. Other texts as they are."""
    if name not in LISTED or not isinstance(text, str) or not text.lstrip().startswith(OPENING):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
