"""The micro-batches of one rank for each step, prepared in threads ahead of the training loop."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from trainer.contract import InputRefused, TrainSpec
from trainer.contract.row_sets.row_set import describe_entries
from trainer.data.batch.assign_to_ranks import Measure, Micro, share_of_rank
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features, collate, encode_cached, naming_row, reads_truncated
from trainer.data.batch.draw import mark_draw
from trainer.data.batch.length_table import LengthTable, private_table
from trainer.data.batch.pack import collate_packed, collate_unpadded
from trainer.data.media.image import read_size
from trainer.data.rows.sample import Sample, Samples

if TYPE_CHECKING:
    from trainer.data.processor import Processor

CACHE_BYTES = 512 * 2**20  # of processed images and encoded texts, per rank
STEPS_AHEAD = 2  # whose samples are measured and divided in advance

Item = TypeVar("Item")
Made = TypeVar("Made")
Task = tuple[Micro | InputRefused, bool, int]  # a micro-batch, whether it is the last one of its step, and the step


def batches(
    samples: Samples,
    processor: "Processor",
    spec: TrainSpec,
    *,
    rank: int,
    first_step: int,
    lengths: LengthTable | None = None,
) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """For each step from `first_step` (the number of finished steps) to spec.steps, this rank's micro-batches: `accumulation` of them by
    `collate` or `collate_unpadded`; with packing as many as are needed, at most `accumulation`, by `collate_packed`. All ranks get the same
    number. `lengths`: those that are known; a table of several ranks gets what each of them measures.

    Closing the iterator stops its threads. Raises InputRefused with file and row at the step that has a bad sample.
    """
    refuse_unusable(samples, processor, spec)
    cache, workers = Cache(CACHE_BYTES), spec.data.workers
    alone = spec.device.world_size == 1  # else most measured texts belong to other ranks, and would displace images from the cache
    measure = keep_lengths(samples, processor, spec, cache if alone else Cache(0), lengths)

    def share(step: int) -> tuple[Micro, ...] | InputRefused:
        try:
            return share_of_rank(step, spec, rank=rank, count=len(samples), measure=measure)
        except InputRefused as error:  # raised at its own step: the earlier steps can still be trained and saved
            return error

    def prepare(task: Task) -> tuple[dict[str, Tensor], bool]:
        micro, last, step = task
        if isinstance(micro, InputRefused):
            raise micro
        rows = [[mark_draw(samples[number], spec, step=step, number=number) for number in row] for row in micro]
        return make_batch(rows, processor, spec, cache), last

    with (
        closing(prefetch(share, iter(range(first_step, spec.steps)), min(workers, 1), STEPS_AHEAD)) as shares,
        closing(prefetch(prepare, one_by_one(shares, first_step), workers, spec.batch.accumulation + workers)) as prepared,
    ):
        yield from whole_steps(prepared)


def refuse_unusable(samples: Samples, processor: "Processor", spec: TrainSpec) -> None:
    """Raises InputRefused when there are no samples, and for packing with a family that does not support it."""
    if not len(samples):
        name = describe_entries(spec.data.train) or spec.data.name
        raise InputRefused(
            f"{name} has no usable row\n    run omnilaunch data check with the same overrides: it lists the problem of each row"
        )
    key = "packing" if spec.data.packing else "padding_free"
    if getattr(spec.data, key) and processor.position_ids is None:
        raise InputRefused(
            f"data.{key}=true is not possible with {spec.model.family}: samples in the same row would attend to each other\n    set "
            f"data.{key}=false; data.length_aware=step also reduces padding"
        )


def one_by_one(shares: Iterable[tuple[Micro, ...] | InputRefused], first_step: int) -> Iterator[Task]:
    for step, share in enumerate(shares, start=first_step):
        micros = (share,) if isinstance(share, InputRefused) else share
        yield from ((micro, number == len(micros), step) for number, micro in enumerate(micros, start=1))


def make_batch(rows: Sequence[Sequence[Sample]], processor: "Processor", spec: TrainSpec, cache: Cache) -> dict[str, Tensor]:
    if spec.data.packing:
        return collate_packed(rows, processor, spec, cache)
    make = collate_unpadded if spec.data.padding_free else collate
    return make([sample for row in rows for sample in row], processor, spec, cache)


def whole_steps(prepared: Iterable[tuple[dict[str, Tensor], bool]]) -> Iterator[tuple[dict[str, Tensor], ...]]:
    whole: list[dict[str, Tensor]] = []
    for tensors, last in prepared:
        whole.append(tensors)
        if last:
            yield tuple(whole)
            whole = []


def keep_lengths(samples: Samples, processor: "Processor", spec: TrainSpec, cache: Cache, lengths: LengthTable | None = None) -> Measure:
    """A function from numbers of samples to their lengths in tokens, from the text and the sizes of the images. Each is computed once and kept.
    Every rank needs those of all samples of a step, not only of its own. Raises InputRefused for a sample that cannot be encoded."""
    table = lengths or private_table(len(samples))

    def count(number: int) -> int:
        sample = samples[number]
        return len(encode_cached(sample, processor, spec, image_sizes(sample, spec), cache).input_ids)

    return lambda numbers: table.measure(numbers, count)


def image_sizes(sample: Sample, spec: TrainSpec) -> list[Features]:
    """The sizes of a sample's images from the file headers, without tensors."""
    with naming_row(sample):
        return [Features(tensors={}, size=read_size(path, truncated=reads_truncated(spec))) for path in sample.images]


def prefetch(make: Callable[[Item], Made], items: Iterator[Item], workers: int, ahead: int) -> Generator[Made, None, None]:
    """`map(make, items)` in `workers` threads, in order, at most `ahead` results in advance; with 0 workers in this thread. An exception is
    raised at the position of its item."""
    if not workers:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        try:
            pending = deque(pool.submit(make, item) for item in islice(items, ahead))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(make, item) for item in islice(items, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
