"""The rows of a data set that are used, where its options choose some: their numbers, and which of them share an image.

Ranks and the data check come to the same selection, since it depends on the files, the options and the seed only.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.contract import DataSpec, InputRefused, write_text
from trainer.contract.row_sets.selection import CannotSelect, SetSize
from trainer.data.containers.row_index import identity
from trainer.data.kept_folder import kept_folder, locked
from trainer.data.rows.sample import stream_source
from trainer.data.rows.selection import Numbers, RowSelection, select
from trainer.data.sources.data_set import DataSet, SourceSet

FOLDER = "splits"  # of trainer.data.kept_folder
KEPT = 10  # files of groups; the oldest ones are removed
EDGE_BYTES = 2**15  # at both ends of an image, which tell it from others of the same size


def choose_rows(found: DataSet, counts: Sequence[int] | None = None) -> RowSelection | None:
    """None where all rows are used as often as their files say, and where files are missing. `counts`: conversations of each source, where they are
    known. Raises InputRefused for options that do not fit the rows."""
    data = found.data
    if data is None or not found.chosen or found.problems or not all(source.file.is_file() for source in found.sources):
        return None  # reading the files reports the problems
    groups = None
    if data.split:
        counts, groups = group_rows(found, data)
    elif counts is None:
        counts = [sum(each.row > 0 for each in stream_source(source)) for source in found.sources]
    try:
        trained, held_out = select(sizes_of(found.sets, counts), data, groups)
    except CannotSelect as error:
        raise InputRefused(str(error)) from error
    return replace(held_out if found.part == "held out" else trained, sources=tuple(counts))


def sizes_of(sets: Iterable[SourceSet], counts: Sequence[int]) -> list[SetSize]:
    left, sizes = iter(counts), list[SetSize]()
    for each in sets:
        rows = sum(islice(left, len(each.sources)))
        repeat = each.repeat if each.repeat != 1 else each.sources[0].repeat  # one of the two is that of a meta file or of an entry
        sizes.append(SetSize(name=each.name, rows=rows, samples=each.samples, repeat=repeat, weight=each.weight))
    return sizes


# ------------------------------------------------------------------------------------------------------------- images


def group_rows(found: DataSet, data: DataSpec) -> tuple[list[int], Numbers]:
    """(conversations of each source, the number of the group of each conversation: rows of one group share images). Kept for the next process that
    needs them, since every row and the beginning of every image is read."""
    folder = kept_folder(data, FOLDER)
    try:
        parts = [
            (str(source.file), str(source.images), str(source.columns), str(source.rules), identity(source.file))
            for source in found.sources
        ]
    except OSError as error:
        raise InputRefused(f"{found.name} cannot be read: {error}\n    set data.train to the paths of readable files") from error
    kept = folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
    with locked(folder / f"{kept.stem}.lock"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            read = json.loads(kept.read_text(encoding="utf-8"))
            return list(read["counts"]), np.array(read["groups"], np.int64)
        counts, groups = find_groups(found)
        with suppress(OSError):
            write_text(json.dumps({"counts": counts, "groups": groups.tolist()}), kept)
            for old in sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)[KEPT:]:
                old.unlink(missing_ok=True)
    return counts, groups


def find_groups(found: DataSet) -> tuple[list[int], Numbers]:
    counts: list[int] = []
    groups = Groups()
    for source in found.sources:
        before = len(groups.parents)
        for each in stream_source(source):
            if each.row:
                groups.add(each.sample.images if each.sample else ())
        counts.append(len(groups.parents) - before)
    return counts, groups.numbers()


class Groups:
    """Rows that are joined by their images: by the path, and by the content of files with other names."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.by_path: dict[Path, int] = {}
        self.by_content: dict[str, int] = {}

    def add(self, images: Iterable[Path]) -> None:
        row = len(self.parents)
        self.parents.append(row)
        for path in images:
            if path in self.by_path:
                self.join(self.by_path[path], row)
            else:
                self.by_path[path] = row
                self.join(self.by_content.setdefault(content_of(path), row), row)

    def join(self, first: int, second: int) -> None:
        roots = sorted((self.root(first), self.root(second)))
        self.parents[roots[1]] = roots[0]

    def root(self, row: int) -> int:
        while self.parents[row] != row:
            self.parents[row] = self.parents[self.parents[row]]
            row = self.parents[row]
        return row

    def numbers(self) -> Numbers:
        """The number of the first row of the group of each row."""
        return np.array([self.root(row) for row in range(len(self.parents))], np.int64)


def content_of(path: Path) -> str:
    """Equal for equal files, and hardly ever for others: by the size, and both ends. The path itself for a file that cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(EDGE_BYTES)
            file.seek(max(0, size - EDGE_BYTES))
            tail = file.read(EDGE_BYTES)
    except OSError:
        return str(path)
    return hashlib.blake2b(f"{size}\0".encode() + head + tail, digest_size=16).hexdigest()
