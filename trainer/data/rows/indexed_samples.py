"""The samples of large annotation files: a sequence whose rows are read when they are used."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.contract import DataProblem, InputRefused
from trainer.contract.annotation_file import count_repeated
from trainer.data.containers.json_text import describe
from trainer.data.containers.row_index import RowIndex, open_index
from trainer.data.media.image import hash_file
from trainer.data.media.store import MediaStore
from trainer.data.rows.row_choice import choose_rows
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.rows.sample import Sample, read_row, split_row
from trainer.data.rows.selection import RowSelection, place_of
from trainer.data.sources.data_set import EMPTY, DataSet, set_of_file
from trainer.data.sources.source import AnnotationSource

INDEX_FOLDER = "index"  # of trainer.data.kept_folder
LARGE_BYTES = 64 * 2**20  # of annotation files; smaller ones are read whole, in some seconds


@dataclass(frozen=True, kw_only=True)
class IndexedSource:
    source: AnnotationSource
    index: RowIndex

    def __len__(self) -> int:
        """The samples, as often as they are used."""
        return count_repeated(len(self.index), self.source.repeat)

    def find_places(self, rows: Mapping[str, Collection[int]]) -> NDArray[np.int64]:
        """Of the conversations in these rows of each file, from 0."""
        wanted = np.fromiter(rows.get(str(self.source.file), ()), np.int64)
        return np.flatnonzero(np.isin(self.index.entries["row"], wanted))

    def sample(self, place: int) -> Sample:
        """Raises InputRefused with the problems of the row."""
        source = self.source
        try:
            row, part, content = self.index.read(place % len(self.index))
        except (OSError, ValueError, RecursionError) as error:
            number = int(self.index.entries[place % len(self.index)]["row"])
            problem = DataProblem(file=str(source.file), row=number, field="", problem=describe(error), fix="write one JSON object")
            raise InputRefused(str(problem)) from error
        for number, name, item in split_row(content):
            if number == part:
                sample, problems = read_row(item, row, source, part=part, prefix=name)
                if sample is None:
                    raise InputRefused("\n".join(map(str, problems)))
                return sample
        raise InputRefused(f"{source.file} row {row}: it has changed since the run began\n    restore it, or start a new run")


class IndexedSamples:
    """The samples of a data set, as `read_set` returns them where no row has a problem. A row with one raises InputRefused when it is used.
    `selection`: of the conversations of all sources; None for all, as often as their files are used."""

    def __init__(self, sources: Sequence[IndexedSource], selection: RowSelection | None = None) -> None:
        self.sources, self.selection = tuple(sources), selection
        self.ends = tuple(accumulate(map(len, self.sources)))
        self.row_ends = tuple(accumulate(len(each.index) for each in self.sources))
        self.count = len(selection) if selection is not None else self.ends[-1] if self.ends else 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < self.count:
            raise IndexError(number)
        which, place = place_of(number, self.ends) if self.selection is None else place_of(self.selection.row(number), self.row_ends)
        return self.sources[which].sample(place)

    def hash_of(self, file: Path) -> str:
        """The hash of a file: that of an annotation file is in its index. Raises OSError."""
        return next((each.index.sha256 for each in self.sources if each.source.file == file), "") or hash_file(file)

    def find_numbers(self, rows: Mapping[str, Collection[int]]) -> NDArray[np.int64]:
        """The numbers of all samples of these rows of each file, in order."""
        found = [np.empty(0, np.int64)]
        for each, end, row_end in zip(self.sources, self.ends, self.row_ends, strict=True):
            places = each.find_places(rows)
            if self.selection is not None:
                found.append(row_end - len(each.index) + places)
                continue
            first = end - len(each)
            times = -(-len(each) // max(1, len(each.index)))
            numbers = np.concatenate([first + time * len(each.index) + places for time in range(times)] or found)
            found.append(numbers[numbers < end])
        numbers = np.concatenate(found)
        return numbers if self.selection is None else np.flatnonzero(np.isin(self.selection.rows(), numbers))

    def find_rows(self, rows: Mapping[str, Collection[int]]) -> Iterator[tuple[int, str, int]]:
        """(number, file, row) of the first sample of each conversation in these rows of each file."""
        for each, end, row_end in zip(self.sources, self.ends, self.row_ends, strict=True):
            for place in each.find_places(rows).tolist():
                number: int | None = end - len(each) + place if place < len(each) else None
                if self.selection is not None:
                    number = self.selection.find(row_end - len(each.index) + place)
                if number is not None:
                    yield number, str(each.source.file), int(each.index.entries["row"][place])


def open_samples(file: Path, images: Path, folder: Path, store: MediaStore = EMPTY, *, rules: RowRules = DEFAULT) -> IndexedSamples | None:
    """As `open_set`, of one annotation file or meta file."""
    return open_set(set_of_file(file, images, rules, store), folder)


def open_set(found: DataSet, folder: Path) -> IndexedSamples | None:
    """The samples by index, if the files are large; None for those that are read whole, and those with a problem that reading them reports.
    `folder`: for the indexes. Raises OSError, InputRefused."""
    size = sum(source.file.stat().st_size if source.file.is_file() else 0 for source in found.sources)
    return None if found.problems or size < LARGE_BYTES else index_set(found, folder)


def index_samples(file: Path, images: Path, folder: Path, store: MediaStore = EMPTY, *, rules: RowRules = DEFAULT) -> IndexedSamples:
    """Raises OSError, and InputRefused for a list that is not JSON."""
    return index_set(set_of_file(file, images, rules, store), folder)


def index_set(found: DataSet, folder: Path) -> IndexedSamples:
    """Raises OSError, and InputRefused for a list that is not JSON."""
    sources = [IndexedSource(source=source, index=open_index(source.file, folder, source.store)) for source in found.sources]
    return IndexedSamples(sources, choose_rows(found, [len(each.index) for each in sources]))
