"""How the rows of a data set are laid out in files, before any row is looked at: the launcher counts the rows that the trainer reads.

A file has rows in one of the containers of trainer.contract.row_file, JSON in the shapes of trainer.contract.json_shape; or it is a meta file of
InternVL, which lists other files (trainer.data.sources.source).
"""

import json
from pathlib import Path
from typing import Any

from trainer.contract.row_file import suffix_of

META_BYTES = 8 * 2**20  # a meta file lists a few hundred data sets; a larger file contains rows


def read_meta(file: Path) -> dict[str, Any] | None:
    """The content of a meta file; None for rows, invalid JSON or a missing file."""
    try:
        if file.stat().st_size > META_BYTES or first_letter(file) != "{":
            return None
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    is_meta = isinstance(content, dict) and any(isinstance(entry, dict) and "annotation" in entry for entry in content.values())
    return content if is_meta else None


def first_letter(file: Path) -> str:
    """The first character that is not blank; '' if there is none. Raises OSError, and ValueError for text that is not UTF-8."""
    with file.open(encoding="utf-8-sig") as opened:
        while part := opened.read(64):
            if text := part.lstrip():
                return text[0]
    return ""


def is_list(file: Path, letter: str) -> bool:
    """Whether the rows are one JSON list, and not JSON Lines, where a line may be a list too. `letter`: the first of the file."""
    return letter == "[" and suffix_of(file) != ".jsonl"


def count_repeated(rows: int, repeat: float) -> int:
    """How many rows of a file are used: the first part of them for a `repeat` below 1, else all of them so many times."""
    return int(rows * repeat) if repeat < 1 else rows * int(repeat)
