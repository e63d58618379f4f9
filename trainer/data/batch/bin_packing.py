"""Which samples share a packed row: bin packing by their lengths, without tensors."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np

Bins = tuple[tuple[int, ...], ...]


def fill_bins(lengths: Sequence[int], capacity: int, *, multiple: int = 1) -> Bins:
    """The indices (in `lengths`) of the samples of each bin; a pure function of its arguments.

    The number of bins is what first-fit decreasing needs, rounded up to a multiple of `multiple`. If possible the bins are filled evenly, so
    that ranks with one bin each take equally long. Bins are empty when there are fewer samples than bins. Raises ValueError for a sample
    that is longer than `capacity`.
    """
    if any(length > capacity for length in lengths):
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {capacity}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    tight = first_fit(order, lengths, capacity)
    count = -(-len(tight) // multiple) * multiple
    even = fill_evenly(order, lengths, capacity, count)
    return even if even is not None else (*tight, *((),) * (count - len(tight)))


def first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """First-fit decreasing, given `order` by decreasing length: at most 11/9 OPT + 6/9 bins (Dósa, ESCAPE 2007)."""
    free = np.full(len(order), capacity, dtype=np.int64)  # at most one bin per sample
    bins: list[list[int]] = []
    for index in order:
        chosen = int(np.argmax(free[: len(bins) + 1] >= lengths[index]))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        free[chosen] -= lengths[index]
    return tuple(map(tuple, bins))


def fill_evenly(order: Sequence[int], lengths: Sequence[int], capacity: int, count: int) -> Bins | None:
    """Each sample into the emptiest of `count` bins (Graham's longest processing time, SIAM J. Appl. Math. 1969); None when one does not
    fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    heapify(filled)
    for index in order:
        used, number = filled[0]
        if used + lengths[index] > capacity:
            return None
        bins[number].append(index)
        heapreplace(filled, (used + lengths[index], number))
    return tuple(map(tuple, bins))
