"""What reading a file of rows gives: rows with their numbers, and problems."""

import os
from pathlib import Path
from typing import Any, BinaryIO

from trainer.contract import DataProblem
from trainer.data.rows.parsed_row import printable

Found = tuple[int, Any] | DataProblem

ONE_ROW_EACH = "write one row for each conversation"


class Position:
    """How far a file is read, and how large it is, in bytes."""

    opened: BinaryIO | None = None
    size = 0
    share = 1.0  # of the rows, where the place in the file says nothing about it

    @property
    def bytes_read(self) -> int:
        if self.share < 1:
            return int(self.share * self.size)
        return self.opened.tell() if self.opened is not None and not self.opened.closed else self.size

    def start(self, opened: BinaryIO) -> None:
        self.opened, self.size = opened, os.fstat(opened.fileno()).st_size


def file_problem(file: Path, problem: str, fix: str) -> DataProblem:
    return row_problem(file, 0, problem, fix)


def row_problem(file: Path, row: int, problem: str, fix: str, field: str = "") -> DataProblem:
    return DataProblem(file=str(file), row=row, field=printable(field), problem=printable(problem), fix=printable(fix))
