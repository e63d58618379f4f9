"""Which samples lie in one row together: bins of equal room, and what goes into each of them. Lengths only, no tensors."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np

Bins = tuple[tuple[int, ...], ...]


def fill_bins(lengths: Sequence[int], room: int, *, multiple: int = 1) -> Bins:
    """The places (in `lengths`) of each bin's samples; a pure function of its arguments.

    As many bins as first-fit decreasing needs, up to the next multiple of `multiple`, and those equally full where that is possible: ranks
    that take one each are then equally long at work. A bin may be empty where there are fewer samples than bins. Raises ValueError for a
    sample that is longer than `room`.
    """
    if any(length > room for length in lengths):
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {room}")
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    tight = fit_first(order, lengths, room)
    count = -(-len(tight) // multiple) * multiple
    even = spread(order, lengths, room, count)
    return even if even is not None else (*tight, *((),) * (count - len(tight)))


def fit_first(order: Sequence[int], lengths: Sequence[int], room: int) -> Bins:
    """First-fit decreasing, when `order` decreases: at most 11/9 of the fewest bins and 6/9 (Dósa, ESCAPE 2007)."""
    free = np.full(len(order), room, dtype=np.int64)  # at most a bin for each sample
    bins: list[list[int]] = []
    for place in order:
        chosen = int(np.argmax(free[: len(bins) + 1] >= lengths[place]))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(place)
        free[chosen] -= lengths[place]
    return tuple(map(tuple, bins))


def spread(order: Sequence[int], lengths: Sequence[int], room: int, count: int) -> Bins | None:
    """Each sample into the emptiest of `count` bins (Graham's longest processing time, SIAM J. Appl. Math. 1969), or None when one does
    not fit there."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    heapify(filled)
    for place in order:
        used, number = filled[0]
        if used + lengths[place] > room:
            return None
        bins[number].append(place)
        heapreplace(filled, (used + lengths[place], number))
    return tuple(map(tuple, bins))
