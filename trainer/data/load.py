"""The micro-batches of one rank, step after step, prepared ahead of the loop."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.contract import InputRefused, TrainSpec
from trainer.data.cache import Cache
from trainer.data.collate import collate
from trainer.data.order import rows_of_rank, rows_of_step
from trainer.data.sample import Sample

if TYPE_CHECKING:
    from trainer.models.family import Processor

CACHE_BYTES = 512 * 2**20  # of processed images and encoded texts, for each rank

Prepare = Callable[[Sequence[int]], dict[str, Tensor]]


def batches(
    samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, *, rank: int, first_step: int
) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """For each step from `first_step` (steps already done) to spec.steps, this rank's `accumulation` micro-batches, made by `collate`.

    Closing the iterator ends its threads. Raises InputRefused, with file and row, at the step that holds a bad sample.
    """
    if not samples:
        raise InputRefused(
            f"{spec.data.train or spec.data.name} has no usable row\n    the data check before the run names what is wrong with each row"
        )
    cache = Cache(CACHE_BYTES)

    def prepare(rows: Sequence[int]) -> dict[str, Tensor]:
        return collate([samples[row] for row in rows], processor, spec, cache)

    work = micro_batches(len(samples), spec, rank=rank, first_step=first_step)
    ahead = spec.batch.accumulation + spec.data.workers
    prepared = prefetch(prepare, work, spec.data.workers, ahead) if spec.data.workers else (prepare(rows) for rows in work)
    with closing(prepared):
        for _ in range(first_step, spec.steps):
            yield tuple(islice(prepared, spec.batch.accumulation))


def micro_batches(rows: int, spec: TrainSpec, *, rank: int, first_step: int) -> Iterator[tuple[int, ...]]:
    """Row indices of one micro-batch after the other."""
    size = spec.batch.micro_batch
    for step in range(first_step, spec.steps):
        whole = rows_of_step(step, seed=spec.seed, rows=rows, global_batch=spec.batch.global_batch)
        share = rows_of_rank(whole, rank=rank, world_size=spec.device.world_size)
        yield from (share[start : start + size] for start in range(0, size * spec.batch.accumulation, size))


def prefetch(prepare: Prepare, work: Iterator[tuple[int, ...]], workers: int, ahead: int) -> Generator[dict[str, Tensor], None, None]:
    """`map(prepare, work)` in `workers` threads, in order, at most `ahead` results early. An exception arrives in its place."""
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        try:
            pending = deque(pool.submit(prepare, rows) for rows in islice(work, ahead))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(prepare, rows) for rows in islice(work, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
