"""Divide the samples of a step among ranks, micro-batches and rows.

A pure function of the seed, the step and the lengths of the samples. Which samples a step trains on does not depend on the number of ranks;
which rank takes which sample does not matter, because the loss is the mean over all trained tokens of the step.
"""

from collections.abc import Callable, Sequence

from trainer.contract import TrainSpec
from trainer.data.batch.bin_packing import fill_bins
from trainer.data.batch.order import permute, rows_of_rank, rows_of_step

Row = tuple[int, ...]  # the samples in one row of a tensor: one; with packing any number
Micro = tuple[Row, ...]  # the rows of one micro-batch
Measure = Callable[[Sequence[int]], Sequence[int]]  # sample numbers -> tokens of each

WINDOW = 16  # steps whose samples are sorted together with length_aware=window


def samples_of_step(step: int, spec: TrainSpec, *, count: int, measure: Measure) -> tuple[int, ...]:
    """The `global_batch` samples (numbers from 0 to `count` - 1) of `step` (from 0).

    With length_aware=window, the samples of WINDOW steps are sorted by length and divided into steps again, in an order drawn from the seed.
    Each sample is used as often as without it.
    """
    size = spec.batch.global_batch
    if spec.data.length_aware != "window" or spec.data.packing:
        return rows_of_step(step, seed=spec.seed, rows=count, global_batch=size)
    first = step - step % WINDOW
    pool = [row for one in range(first, first + WINDOW) for row in rows_of_step(one, seed=spec.seed, rows=count, global_batch=size)]
    part = int(permute(WINDOW, f"{spec.seed}:window:{first}")[step - first])
    return tuple(longest_first(pool, measure)[part * size : (part + 1) * size])


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
