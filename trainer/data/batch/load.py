"""The micro-batches of one rank, step after step, prepared ahead of the loop."""

from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.assign_to_ranks import Measure, Micro, share_of_rank
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features, collate, encode_cached
from trainer.data.batch.pack import collate_packed, collate_unpadded
from trainer.data.media.image import read_size
from trainer.data.rows.sample import Sample

if TYPE_CHECKING:
    from trainer.models.family import Processor

CACHE_BYTES = 512 * 2**20  # of processed images and encoded texts, for each rank
STEPS_AHEAD = 2  # whose samples are measured and shared out before the loop comes to them

Item = TypeVar("Item")
Made = TypeVar("Made")
Task = tuple[Micro | InputRefused, bool]  # a micro-batch, and whether it is the last one of its step


def batches(
    samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, *, rank: int, first_step: int
) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """For each step from `first_step` (steps already done) to spec.steps, this rank's micro-batches: `accumulation` of them made by
    `collate` or `collate_unpadded`, or as many as it takes, up to that, made by `collate_packed`; on every rank equally many.

    Closing the iterator ends its threads. Raises InputRefused, with file and row, at the step that holds a bad sample.
    """
    refuse_unusable(samples, processor, spec)
    cache, workers = Cache(CACHE_BYTES), spec.data.workers
    own = spec.device.world_size == 1  # else most of the texts that are counted are other ranks', and would push images out
    measure = keep_lengths(samples, processor, spec, cache if own else Cache(0))

    def share(step: int) -> tuple[Micro, ...] | InputRefused:
        try:
            return share_of_rank(step, spec, rank=rank, count=len(samples), measure=measure)
        except InputRefused as error:  # told when its step comes: until then the run has something to do, and to save
            return error

    def prepare(task: Task) -> tuple[dict[str, Tensor], bool]:
        micro, last = task
        if isinstance(micro, InputRefused):
            raise micro
        rows = [[samples[number] for number in row] for row in micro]
        if spec.data.packing:
            return collate_packed(rows, processor, spec, cache), last
        make = collate_unpadded if spec.data.padding_free else collate
        return make([sample for row in rows for sample in row], processor, spec, cache), last

    with (
        closing(prefetch(share, iter(range(first_step, spec.steps)), min(workers, 1), STEPS_AHEAD)) as shares,
        closing(prefetch(prepare, one_by_one(shares), workers, spec.batch.accumulation + workers)) as prepared,
    ):
        step: list[dict[str, Tensor]] = []
        for tensors, last in prepared:
            step.append(tensors)
            if last:
                yield tuple(step)
                step = []


def refuse_unusable(samples: Sequence[Sample], processor: "Processor", spec: TrainSpec) -> None:
    """Raises InputRefused for no samples at all, and for rows of several samples where a family cannot have them."""
    if not samples:
        raise InputRefused(
            f"{spec.data.train or spec.data.name} has no usable row\n    the data check before the run names what is wrong with each row"
        )
    key = "packing" if spec.data.packing else "padding_free"
    if getattr(spec.data, key) and processor.position_ids is None:
        raise InputRefused(
            f"data.{key}: samples of {spec.model.family} in one row would see each other, whatever their positions\n    set "
            f"data.{key}=false; data.length_aware=step saves padding without it"
        )


def one_by_one(shares: Iterable[tuple[Micro, ...] | InputRefused]) -> Iterator[Task]:
    for share in shares:
        micros = (share,) if isinstance(share, InputRefused) else share
        yield from ((micro, place == len(micros)) for place, micro in enumerate(micros, start=1))


def keep_lengths(samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, cache: Cache) -> Measure:
    """Tokens of samples by their numbers, each counted once, from the text and the images' sizes. Every rank counts all samples of a step,
    not its own alone. Raises InputRefused for a sample that cannot be encoded."""
    known = array("q", bytes(8 * len(samples)))  # 0 = not counted yet

    def count(number: int) -> int:
        if not known[number]:
            sample = samples[number]
            known[number] = len(encode_cached(sample, processor, spec, image_sizes(sample), cache).input_ids)
        return known[number]

    return lambda numbers: [count(number) for number in numbers]


def image_sizes(sample: Sample) -> list[Features]:
    """What a sample's images are before they are decoded."""
    try:
        return [Features(tensors={}, size=read_size(path)) for path in sample.images]
    except InputRefused as error:
        raise InputRefused(f"{sample.file} row {sample.row}, key 'image': {error}") from error


def prefetch(make: Callable[[Item], Made], items: Iterator[Item], workers: int, ahead: int) -> Generator[Made, None, None]:
    """`map(make, items)` in `workers` threads, in order, at most `ahead` results early, or right here with 0 workers. An exception
    arrives in its place."""
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
