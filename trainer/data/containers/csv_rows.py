"""The rows of a csv or tsv file."""

from collections.abc import Iterator
from pathlib import Path

from trainer.contract.row_file import find_container, open_text
from trainer.contract.table_text import TableFault, read_table
from trainer.data.containers.found import Found, Position, file_problem, row_problem
from trainer.data.media.store import MediaStore


def stream_csv(file: Path, position: Position, store: MediaStore) -> Iterator[Found]:
    with open_text(file) as (opened, binary):
        position.start(binary)
        try:
            for line, row in read_table(opened, find_container(file)):
                yield row_problem(file, line, row.problem, row.fix) if isinstance(row, TableFault) else (line, row)
        except TableFault as fault:
            yield file_problem(file, fault.problem, fault.fix)
