"""Rows that a run does not use, or not as they are written: data_left_out.jsonl. The data check decides which, once; every rank reads the file.

A row is left out as a whole, also one with several conversations. What remains keeps its order, so that a run is the same as on files without
these rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.contract import DATA_LEFT_OUT_FILE, SPEC_FILE, DataProblem, InputRefused, LeftOutRow, SpecError, as_problem, decode, write_text
from trainer.data.rows.indexed_samples import IndexedSamples
from trainer.data.rows.sample import Sample, Samples
from trainer.data.rows.turn_order import LISTED

Use = Literal["train", "evaluation"]
Rows = Mapping[str, frozenset[int]]  # file -> its rows
NOTHING: Rows = {}


@dataclass(frozen=True, kw_only=True)
class RemainingSamples:
    """Those of `samples` with these numbers. A row that is not among them is never read."""

    samples: Samples
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.samples[int(self.numbers[number])]


class LeftOutTally:
    """What a data check leaves out, as it reads. `skips`: rows with a problem are left out, and refuse no run."""

    def __init__(self, *, skips: bool) -> None:
        self.skips = skips
        self.listed: list[LeftOutRow] = []
        self.rows: dict[Use, dict[str, set[int]]] = {"train": {}, "evaluation": {}}
        self.only_trained: dict[str, set[int]] = {}  # rows that are left out of the training rows, and not of held-out ones
        self.adjusted: dict[Use, set[tuple[str, int, str]]] = {"train": set(), "evaluation": set()}

    def sort_out(self, problems: Iterable[DataProblem], use: Use, *, always: bool = True) -> list[DataProblem]:
        """Leave out the rows with problems, and return the problems that refuse the run: all where rows are not left out, and always those of
        whole files. `always`: they are problems of held-out rows too."""
        if not self.skips:
            return list(problems)
        kept, found = list[DataProblem](), list[DataProblem]()
        for problem in problems:
            (found if problem.row else kept).append(problem)
        self.leave_out(found, use, always=always)
        return kept

    def leave_out(self, problems: Iterable[DataProblem], use: Use, *, always: bool = True) -> None:
        for problem in problems:
            rows = self.rows[use].setdefault(problem.file, set())
            if problem.row in rows:
                continue
            rows.add(problem.row)
            if not always:
                self.only_trained.setdefault(problem.file, set()).add(problem.row)
            row = LeftOutRow(use=use, file=problem.file, row=problem.row, key=problem.field, reason=problem.problem, done="left out")
            self.listed.append(row)

    def take_over(self, file: str) -> None:
        """Before a file is read whose rows were trained on: what was wrong with them, which is not examined again; and the rows that were cut, of
        which the last answer is not whole."""
        found = [row for row in self.listed if row.use == "train" and row.file == file and row.done in ("left out", "cut")]
        only = self.only_trained.get(file, set())
        problems = [as_problem(row) for row in found if row.row not in only]
        self.leave_out(problems, "evaluation")

    def without(self, samples: list[Sample], use: Use) -> list[Sample]:
        rows = self.rows[use]
        return [sample for sample in samples if sample.row not in rows.get(sample.file, ())] if rows else samples

    def list_cut(self, cut: Iterable[tuple[Sample, int]]) -> None:
        for sample, tokens in cut:
            if sample.row in self.rows["train"].get(sample.file, ()):
                continue
            reason = f"{tokens} tokens are more than data.max_length"
            self.listed.append(LeftOutRow(use="train", file=sample.file, row=sample.row, key="", reason=reason, done="cut"))

    def list_adjusted(self, samples: Iterable[Sample], use: Use) -> None:
        for sample in samples:
            for name in sample.adjustments:
                entry = (sample.file, sample.row, name)
                if name in LISTED and entry not in self.adjusted[use]:
                    self.adjusted[use].add(entry)
                    row = LeftOutRow(use=use, file=sample.file, row=sample.row, key="", reason=name, done=LISTED[name])
                    self.listed.append(row)


def leave_out(samples: Samples, rows: Rows) -> Samples:
    """The samples of all other rows, in their order."""
    if not rows:
        return samples
    if isinstance(samples, IndexedSamples):
        numbers = np.delete(np.arange(len(samples)), samples.find_numbers(rows))
        return RemainingSamples(samples=samples, numbers=numbers)
    assert isinstance(samples, tuple)
    return tuple(sample for sample in samples if sample.row not in rows.get(sample.file, ()))


def find_others(problems: Iterable[DataProblem], rows: Rows) -> tuple[DataProblem, ...]:
    """The problems of other rows, and those of whole files."""
    return tuple(problem for problem in problems if not problem.row or problem.row not in rows.get(problem.file, ()))


def rows_left_out(listed: Iterable[LeftOutRow], use: Use) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for each in listed:
        if each.use == use and each.done == "left out":
            found.setdefault(each.file, set()).add(each.row)
    return {file: frozenset(rows) for file, rows in found.items()}


def count_left_out(listed: Iterable[LeftOutRow]) -> dict[str, int]:
    """As DataReport.left_out."""
    return dict(sorted(Counter(f"{each.use} {each.done}" for each in listed).items()))


def hash_left_out(listed: Sequence[LeftOutRow]) -> str:
    """'' for none. Independent of the paths: files count in the order in which they are first listed."""
    if not listed:
        return ""
    files = {file: number for number, file in enumerate(dict.fromkeys(each.file for each in listed))}
    lines = (json.dumps((each.use, files[each.file], each.row, each.done)) for each in listed)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------------- file


def write_left_out(listed: Sequence[LeftOutRow], folder: Path, *, expected: bool) -> None:
    """`expected`: ranks read the file, and it is empty where nothing was left out. Otherwise there is none then."""
    file = folder / DATA_LEFT_OUT_FILE
    if not listed and not expected:
        file.unlink(missing_ok=True)
        return
    write_text("".join(f"{json.dumps(asdict(row), ensure_ascii=False)}\n" for row in listed), file)


def read_left_out(folder: Path) -> tuple[LeftOutRow, ...]:
    """Raises InputRefused for a file that is missing or damaged."""
    file = folder / DATA_LEFT_OUT_FILE
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputRefused(
            f"{file} cannot be read ({error.strerror}): the data check writes there which rows data.bad_rows and data.too_long leave out\n"
            f"    check the data first: python -m trainer data {folder / SPEC_FILE}"
        ) from error
    try:
        return decode_rows(json.loads(line) for line in lines if line)
    except (ValueError, SpecError) as error:
        raise InputRefused(f"{file} is damaged: {error}\n    remove the run's folder, and start the run again") from error


def decode_rows(rows: Iterable[Any]) -> tuple[LeftOutRow, ...]:
    """Raises SpecError."""
    return tuple(decode(LeftOutRow, row) for row in rows)
