"""The samples of large annotation files: a sequence whose rows are read when they are used."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.contract import DataProblem, InputRefused
from trainer.contract.annotation_file import count_repeated
from trainer.data.containers.annotation import describe
from trainer.data.containers.row_index import RowIndex, open_index
from trainer.data.media.image import hash_file
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.rows.sample import Sample, read_row, split_row
from trainer.data.sources.source import AnnotationSource, find_sources

INDEX_FOLDER = "index"  # of trainer.data.kept_folder
LARGE_BYTES = 64 * 2**20  # of annotation files; smaller ones are read whole, in some seconds


@dataclass(frozen=True, kw_only=True)
class IndexedSource:
    source: AnnotationSource
    index: RowIndex

    def __len__(self) -> int:
        """The samples, as often as they are used."""
        return count_repeated(len(self.index), self.source.repeat)

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
    """The samples of an annotation file or of the files that a meta file lists, as `read_samples` returns them where no row has a problem. A row
    with one raises InputRefused when it is used."""

    def __init__(self, sources: Sequence[IndexedSource]) -> None:
        self.sources = tuple(sources)
        self.ends = tuple(accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect_right(self.ends, number)
        return self.sources[which].sample(number - (self.ends[which - 1] if which else 0))

    def hash_of(self, file: Path) -> str:
        """The hash of a file: that of an annotation file is in its index. Raises OSError."""
        return next((each.index.sha256 for each in self.sources if each.source.file == file), "") or hash_file(file)

    def find_numbers(self, rows: Mapping[str, Collection[int]]) -> NDArray[np.int64]:
        """The numbers of all samples of these rows of each file, in order."""
        found = [np.empty(0, np.int64)]
        for each, end in zip(self.sources, self.ends, strict=True):
            wanted = np.fromiter(rows.get(str(each.source.file), ()), np.int64)
            places = np.flatnonzero(np.isin(each.index.entries["row"], wanted))
            first = end - len(each)
            times = -(-len(each) // max(1, len(each.index)))
            numbers = np.concatenate([first + time * len(each.index) + places for time in range(times)] or found)
            found.append(numbers[numbers < end])
        return np.concatenate(found)

    def find_rows(self, rows: Mapping[str, Collection[int]]) -> Iterator[tuple[int, str, int]]:
        """(number, file, row) of the first sample of each conversation in these rows of each file."""
        for each, end in zip(self.sources, self.ends, strict=True):
            name = str(each.source.file)
            wanted = np.fromiter(rows.get(name, ()), np.int64)
            numbers = each.index.entries["row"]
            for place in np.flatnonzero(np.isin(numbers, wanted)):
                if place < len(each):
                    yield end - len(each) + int(place), name, int(numbers[place])


def open_samples(file: Path, images: Path, folder: Path, rules: RowRules = DEFAULT) -> IndexedSamples | None:
    """The samples by index, if the files are large; None for those that are read whole, and those with a problem that reading them reports.
    `folder`: for the indexes. Raises OSError, InputRefused."""
    sources, problems = find_sources(file, images, rules)
    size = sum(source.file.stat().st_size if source.file.is_file() else 0 for source in sources)
    return None if problems or size < LARGE_BYTES else index_samples(file, images, folder, rules)


def index_samples(file: Path, images: Path, folder: Path, rules: RowRules = DEFAULT) -> IndexedSamples:
    """Raises OSError, and InputRefused for a list that is not JSON."""
    sources, _ = find_sources(file, images, rules)
    return IndexedSamples([IndexedSource(source=source, index=open_index(source.file, folder)) for source in sources])
