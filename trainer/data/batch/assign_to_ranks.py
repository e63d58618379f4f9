"""How the samples of a step are shared out: to ranks, micro-batches and rows.

A pure function of seed, step and the samples' lengths. Which samples a step trains on does not depend on the number of ranks; who takes
which is free, because the loss is the mean over all trained tokens of the step.
"""

from collections.abc import Callable, Sequence

from trainer.contract import TrainSpec
from trainer.data.batch.bin_packing import fill_bins
from trainer.data.batch.order import permute, rows_of_rank, rows_of_step

Row = tuple[int, ...]  # the samples in one row of a tensor: one, or several where rows are packed, or none
Micro = tuple[Row, ...]  # the rows of one micro-batch
Measure = Callable[[Sequence[int]], Sequence[int]]  # sample numbers -> tokens of each

WINDOW = 16  # steps whose samples are grouped together by length_aware=window


def samples_of_step(step: int, spec: TrainSpec, *, count: int, measure: Measure) -> tuple[int, ...]:
    """The `global_batch` samples (numbers from 0, out of `count`) of `step` (from 0).

    With length_aware=window those of WINDOW steps are sorted by length and cut into steps again, which come in an order drawn from the
    seed: as often as ever, but in other company.
    """
    size = spec.batch.global_batch
    if spec.data.length_aware != "window" or spec.data.packing:
        return rows_of_step(step, seed=spec.seed, rows=count, global_batch=size)
    first = step - step % WINDOW
    pool = [row for one in range(first, first + WINDOW) for row in rows_of_step(one, seed=spec.seed, rows=count, global_batch=size)]
    place = int(permute(WINDOW, f"{spec.seed}:window:{first}")[step - first])
    return tuple(longest_first(pool, measure)[place * size : (place + 1) * size])


def share_of_rank(step: int, spec: TrainSpec, *, rank: int, count: int, measure: Measure) -> tuple[Micro, ...]:
    """This rank's micro-batches of `step`: on every rank equally many of equally many rows, `accumulation` of them, or fewer where packed."""
    chosen = samples_of_step(step, spec, count=count, measure=measure)
    size, ranks = spec.batch.micro_batch, spec.device.world_size
    if spec.data.packing:
        return assign_to_ranks(pack_rows(chosen, spec, measure), rank=rank, ranks=ranks, size=size)
    if spec.data.length_aware != "off" and size < len(chosen):  # one micro-batch of all has nothing to choose
        return assign_to_ranks([(row,) for row in longest_first(chosen, measure)], rank=rank, ranks=ranks, size=size)
    share = rows_of_rank(chosen, rank=rank, world_size=ranks)
    return tuple(tuple((row,) for row in share[start : start + size]) for start in range(0, len(share), size))


def pack_rows(chosen: Sequence[int], spec: TrainSpec, measure: Measure) -> list[Row]:
    """Rows of at most `max_length` tokens, the longest first, as many as ranks and micro-batches divide."""
    lengths = measure(chosen)
    bins = fill_bins(lengths, spec.data.max_length, multiple=spec.batch.micro_batch * spec.device.world_size)
    bins = sorted(bins, key=lambda places: -sum(lengths[place] for place in places))
    return [tuple(chosen[place] for place in places) for places in bins]


def longest_first(chosen: Sequence[int], measure: Measure) -> list[int]:
    lengths = measure(chosen)
    return [chosen[place] for place in sorted(range(len(chosen)), key=lambda place: -lengths[place])]  # equal ones keep their order


def assign_to_ranks(rows: Sequence[Row], *, rank: int, ranks: int, size: int) -> tuple[Micro, ...]:
    """Of rows by length: neighbours share a micro-batch (little padding), and the ranks' micro-batches of one time are neighbours, too
    (nobody waits)."""
    together = size * ranks
    return tuple(tuple(rows[start + rank * size : start + (rank + 1) * size]) for start in range(0, len(rows), together))
