"""Which rows are trained on and which are held out, and in which sequence: a pure function of the numbers of rows, the options and a seed.

Rows are numbered from 0 through all files of a data set, in their order. A sample is a use of a row: the sequence of the samples of an epoch is
that of the sets, of each its rows in the order of the file, as often as they are used. `trainer.data.batch.order` shuffles the samples.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from trainer.contract import DataSpec
from trainer.contract.row_sets.selection import CannotSelect, Choice, SetCount, SetSize, count_selected
from trainer.data.batch.order import permute

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pick:
    """`count` samples of a set, whose rows begin at the number `first`: its `rows` rows, or those at `places`, again and again."""

    first: int
    rows: int
    count: int
    places: Numbers | None = None

    def row(self, number: int) -> int:
        return self.first + (number % self.rows if self.places is None else int(self.places[number % len(self.places)]))

    def find(self, row: int) -> int | None:
        """The first sample of the row; None if it is not used."""
        place = row - self.first
        if self.places is not None:
            found = np.flatnonzero(self.places == place)
            place = int(found[0]) if len(found) else self.count
        return place if place < self.count else None

    def used(self) -> Numbers:
        return np.arange(self.rows) if self.places is None else self.places

    def times(self) -> Numbers:
        """How often each row of the set is used."""
        used = self.used()
        whole, rest = divmod(self.count, max(1, len(used)))
        return np.bincount(used, minlength=self.rows) * whole + np.bincount(used[:rest], minlength=self.rows)


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """The sequence of samples: those of each pick, one pick after the other. `sources`: the rows of each source of the data set."""

    picks: tuple[Pick, ...]
    sources: tuple[int, ...] = ()

    @cached_property
    def ends(self) -> tuple[int, ...]:
        return tuple(accumulate(pick.count for pick in self.picks))

    def __len__(self) -> int:
        return self.ends[-1] if self.picks else 0

    def row(self, number: int) -> int:
        """The row of a sample."""
        which = bisect_right(self.ends, number)
        return self.picks[which].row(number - (self.ends[which - 1] if which else 0))

    def rows(self) -> Numbers:
        """The row of each sample."""
        parts = [pick.first + np.resize(pick.used(), pick.count) for pick in self.picks]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def times(self) -> Numbers:
        """How often each row of the data set is used, shape (rows,)."""
        return np.concatenate([pick.times() for pick in self.picks]) if self.picks else np.empty(0, np.int64)

    def find(self, row: int) -> int | None:
        """The first sample of a row; None if it is not used."""
        before = 0
        for pick in self.picks:
            if pick.first <= row < pick.first + pick.rows:
                place = pick.find(row)
                return None if place is None else before + place
            before += pick.count
        return None


def select(sizes: Sequence[SetSize], data: DataSpec, groups: Numbers | None = None) -> tuple[RowSelection, RowSelection]:
    """(trained, held out). `groups`: a number for each row; rows with the same one share an image, and stay on one side of a split. Raises
    CannotSelect for options that do not fit the rows."""
    firsts = [0, *accumulate(size.rows for size in sizes)]
    choice = Choice(max_samples=data.max_samples, split=data.split, mixing=data.mixing, mixing_stop=data.mixing_stop)
    counts = count_selected(sizes, choice)
    chosen = [choose_rows(size, count, data.split_seed) for size, count in zip(sizes, counts, strict=True)]
    apart: list[Numbers] = [np.empty(0, np.int64)] * len(sizes)
    if any(count.held_out for count in counts):
        numbers = [
            first + (np.arange(size.rows) if rows is None else rows) for first, size, rows in zip(firsts, sizes, chosen, strict=False)
        ]
        apart = hold_out(numbers, [count.held_out for count in counts], data.split_seed, groups)
        counts = count_selected(sizes, choice, [len(each) for each in apart])
        check_rest(sizes, counts)
    trained, held = [], []
    for first, size, count, rows, taken in zip(firsts, sizes, counts, chosen, apart, strict=False):
        left = rows
        if len(taken):
            left = np.setdiff1d(np.arange(size.rows) if rows is None else rows, taken - first)
            held.append(Pick(first=first, rows=size.rows, count=len(taken), places=taken - first))
        if size.samples > size.rows:
            left = shuffle(np.arange(size.rows) if left is None else left, data.split_seed)
        trained.append(Pick(first=first, rows=size.rows, count=count.trained, places=left))
    return RowSelection(picks=tuple(trained)), RowSelection(picks=tuple(held))


def check_rest(sizes: Sequence[SetSize], counts: Sequence[SetCount]) -> None:
    """Raises CannotSelect if a split came out empty on one side, since rows that share images cannot be divided."""
    if not any(count.held_out for count in counts):
        problem = "data.evaluation holds out no row: rows that share an image stay together, and each group of them is larger than what is held out"
        raise CannotSelect(f"{problem}\n    set a larger data.evaluation, or name a file of held-out rows")
    for size, count in zip(sizes, counts, strict=True):
        if count.chosen and not count.trained:
            raise CannotSelect(
                f"data.evaluation leaves no row of {size.name} to train on\n    set a smaller data.evaluation, or leave it out"
            )


def choose_rows(size: SetSize, count: SetCount, seed: int) -> Numbers | None:
    """The rows of a set that are used, in order; None for all. Those of `samples` depend on the seed and the number of rows only."""
    if count.chosen == size.rows:
        return None
    rows = np.arange(size.rows, dtype=np.int64)
    return np.sort(shuffle(rows, seed)[: count.chosen]) if 0 < size.samples < size.rows else rows[: count.chosen]


def shuffle(rows: Numbers, seed: int) -> Numbers:
    return rows[permute(len(rows), f"{seed}:samples")]


def hold_out(chosen: Sequence[Numbers], wanted: Sequence[int], seed: int, groups: Numbers | None) -> list[Numbers]:
    """The numbers of the rows of each set that are held out, `wanted` of each or, with groups, at most so many, sorted."""
    ends = list(accumulate(map(len, chosen)))
    numbers = np.concatenate(list(chosen))
    order = permute(len(numbers), f"{seed}:split")
    of_set = np.repeat(np.arange(len(chosen)), [len(each) for each in chosen])
    keys = numbers if groups is None else groups[numbers]
    _, keys = np.unique(keys, return_inverse=True)
    members = np.argsort(keys, kind="stable")
    starts = np.searchsorted(keys[members], np.arange(int(keys.max()) + 2))
    left, taken, seen = list(wanted), np.zeros(len(numbers), bool), np.zeros(int(keys.max()) + 1, bool)
    for place in order:
        if not any(left):
            break
        key = keys[place]
        if seen[key]:
            continue
        seen[key] = True
        group = members[starts[key] : starts[key + 1]]
        sizes = np.bincount(of_set[group], minlength=len(chosen))
        if all(size <= room for size, room in zip(sizes, left, strict=True)):
            taken[group] = True
            left = [room - int(size) for size, room in zip(sizes, left, strict=True)]
    return [numbers[first:end][taken[first:end]] for first, end in zip([0, *ends], ends, strict=False)]


def place_of(row: int, ends: Sequence[int]) -> tuple[int, int]:
    """(source, place in it) of a row of the data set. `ends`: of the rows of each source."""
    source = bisect_right(ends, row)
    return source, row - (ends[source - 1] if source else 0)
