"""Divide the samples of a step among ranks, micro-batches and rows.

A pure function of the seed, the step and the lengths of the samples. Which samples a step trains on does not depend on the number of ranks;
which rank takes which sample does not matter, because the loss is the mean over all trained tokens of the step.
"""

from collections.abc import Callable, Iterator, Sequence

from trainer.contract import TrainSpec
from trainer.data.batch.bin_packing import fill_bins
from trainer.data.batch.order import permute, rows_between, rows_of_rank, rows_of_step

Row = tuple[int, ...]  # the samples in one row of a tensor: one; with packing any number
Micro = tuple[Row, ...]  # the rows of one micro-batch
Measure = Callable[[Sequence[int]], Sequence[int]]  # sample numbers -> tokens of each

WINDOW = 16  # steps whose samples are sorted together with length_aware=window, at most


def samples_of_step(step: int, spec: TrainSpec, *, count: int, measure: Measure) -> tuple[int, ...]:
    """The `global_batch` samples (numbers from 0 to `count` - 1) of `step` (from 0).

    With length_aware=window, the samples of a window are sorted by length and divided into its steps again, in an order drawn from the seed.
    """
    size = spec.batch.global_batch
    if spec.data.length_aware != "window" or spec.data.packing:
        return rows_of_step(step, seed=spec.seed, rows=count, global_batch=size)
    chosen: list[int] = []
    position, end = step * size, (step + 1) * size
    while position < end:
        window = window_around(position, spec, count)
        chosen += part_of_window(window, position, spec, count=count, measure=measure)
        position = min(end, window[1])
    return tuple(chosen)


def window_around(position: int, spec: TrainSpec, count: int) -> tuple[int, int]:
    """(first, end) of the window of a position in the sequence of all steps. Windows end at every WINDOW-th step, and where an epoch or the run
    ends, also that of an earlier attempt: each epoch has every sample once, and a run has the same samples as without windows. A step in which
    an epoch ends has parts of two windows."""
    size = spec.batch.global_batch
    ends = [end * size for end in spec.window_ends]
    lengths = (size * WINDOW, count)
    first = max(*(position - position % length for length in lengths), *(end for end in ends if end <= position))
    return first, min(*(position - position % length + length for length in lengths), *(end for end in ends if end > position))


def part_of_window(window: tuple[int, int], position: int, spec: TrainSpec, *, count: int, measure: Measure) -> list[int]:
    """The samples of the window in the step of `position`. The window has one part in each of its steps; each part gets the samples from a place
    in the list of all, longest first."""
    first, end = window
    size = spec.batch.global_batch
    sizes = list(part_sizes(first, end, size))
    places = [int(place) for place in permute(len(sizes), f"{spec.seed}:window:{first // size}")]
    number = position // size - first // size
    start = sum(other for other, place in zip(sizes, places, strict=True) if place < places[number])
    return longest_first(rows_between(first, end, seed=spec.seed, rows=count), measure)[start : start + sizes[number]]


def part_sizes(first: int, end: int, size: int) -> Iterator[int]:
    """How many of the positions `first` to `end` - 1 each step of `size` positions has."""
    while first < end:
        border = min(end, first - first % size + size)
        yield border - first
        first = border


def share_of_rank(step: int, spec: TrainSpec, *, rank: int, count: int, measure: Measure) -> tuple[Micro, ...]:
    """This rank's micro-batches of `step`. Every rank gets the same number of micro-batches with the same number of rows: `accumulation`
    micro-batches, or fewer with packing."""
    chosen = samples_of_step(step, spec, count=count, measure=measure)
    size, ranks = spec.batch.micro_batch, spec.device.world_size
    if spec.data.packing:
        return assign_to_ranks(pack_rows(chosen, spec, measure), rank=rank, ranks=ranks, size=size)
    if spec.data.length_aware != "off" and size < len(chosen):  # with a single micro-batch there is nothing to sort
        return assign_to_ranks([(row,) for row in longest_first(chosen, measure)], rank=rank, ranks=ranks, size=size)
    share = rows_of_rank(chosen, rank=rank, world_size=ranks)
    return tuple(tuple((row,) for row in share[start : start + size]) for start in range(0, len(share), size))


def pack_rows(chosen: Sequence[int], spec: TrainSpec, measure: Measure) -> list[Row]:
    """Rows of at most `max_length` tokens, the longest first; their number is a multiple of micro_batch * world_size."""
    lengths = measure(chosen)
    bins = fill_bins(lengths, spec.data.max_length, multiple=spec.batch.micro_batch * spec.device.world_size)
    bins = sorted(bins, key=lambda indices: -sum(lengths[index] for index in indices))
    return [tuple(chosen[index] for index in indices) for indices in bins]


def longest_first(chosen: Sequence[int], measure: Measure) -> list[int]:
    lengths = measure(chosen)
    return [chosen[index] for index in sorted(range(len(chosen)), key=lambda index: -lengths[index])]  # stable


def assign_to_ranks(rows: Sequence[Row], *, rank: int, ranks: int, size: int) -> tuple[Micro, ...]:
    """`rows` sorted by length. Adjacent rows share a micro-batch, so that little padding is needed, and the micro-batches that the ranks
    process at the same time are adjacent too, so that no rank waits long for another."""
    block = size * ranks
    return tuple(tuple(rows[start + rank * size : start + (rank + 1) * size]) for start in range(0, len(rows), block))
