from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.trainer.data.conftest import with_data
from trainer.contract import Batch, TrainSpec
from trainer.data.batch.assign_to_ranks import WINDOW, Micro, samples_of_step, share_of_rank
from trainer.data.batch.order import rows_of_step

LENGTHS = [8 + 37 * (number * number % 23) for number in range(200)]  # 8 to 822, mixed
WIDE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def measure(numbers: Sequence[int]) -> list[int]:
    return [LENGTHS[number] for number in numbers]


def never(numbers: Sequence[int]) -> list[int]:
    raise AssertionError("no length is needed")


def cut(spec: TrainSpec, *, ranks: int, size: int, accumulation: int, **data: object) -> TrainSpec:
    batch = Batch(global_batch=ranks * size * accumulation, micro_batch=size, accumulation=accumulation)
    return with_data(replace(spec, batch=batch, device=replace(spec.device, world_size=ranks)), max_length=1024, **data)


def shares(spec: TrainSpec, step: int = 0, count: int = 200) -> list[tuple[Micro, ...]]:
    return [share_of_rank(step, spec, rank=rank, count=count, measure=measure) for rank in range(spec.device.world_size)]


def flat(found: Sequence[tuple[Micro, ...]]) -> list[int]:
    return [number for share in found for micro in share for row in micro for number in row]


def test_length_aware_off_keeps_the_order(spec: TrainSpec) -> None:
    spec = cut(spec, ranks=2, size=2, accumulation=3)
    rows = rows_of_step(5, seed=spec.seed, rows=200, global_batch=12)
    for rank in (0, 1):
        share = share_of_rank(5, spec, rank=rank, count=200, measure=never)
        assert share == tuple(tuple((row,) for row in rows[rank::2][start : start + 2]) for start in (0, 2, 4))


def test_a_single_micro_batch_is_not_measured(spec: TrainSpec) -> None:
    spec = cut(spec, ranks=1, size=8, accumulation=1, length_aware="step")
    rows = rows_of_step(0, seed=spec.seed, rows=200, global_batch=8)
    assert share_of_rank(0, spec, rank=0, count=200, measure=never) == (tuple((row,) for row in rows),)


@WIDE
@given(
    ranks=st.integers(1, 5),
    size=st.integers(1, 4),
    accumulation=st.integers(1, 5),
    step=st.integers(0, 40),
    mode=st.sampled_from([{"packing": True}, {"length_aware": "step"}, {"length_aware": "off"}]),
)
def test_the_ranks_share_the_step_evenly(spec: TrainSpec, ranks: int, size: int, accumulation: int, step: int, mode: dict) -> None:
    spec = cut(spec, ranks=ranks, size=size, accumulation=accumulation, **mode)
    found = shares(spec, step)
    assert Counter(flat(found)) == Counter(rows_of_step(step, seed=spec.seed, rows=200, global_batch=spec.batch.global_batch))
    assert len({len(share) for share in found}) == 1 and 1 <= len(found[0]) <= accumulation
    assert {len(micro) for share in found for micro in share} == {size}
    if spec.data.packing:
        assert all(sum(measure(row)) <= 1024 for share in found for micro in share for row in micro)


def padding(found: Sequence[tuple[Micro, ...]]) -> float:
    """The fraction of padding in the tensors of a step."""
    micros = [[sum(measure(row)) for row in micro] for share in found for micro in share]
    return 1 - sum(map(sum, micros)) / sum(max(micro) * len(micro) for micro in micros)


def test_similar_lengths_share_a_micro_batch(spec: TrainSpec) -> None:
    spec = cut(spec, ranks=2, size=4, accumulation=4)
    plain, aware = shares(spec), shares(with_data(spec, length_aware="step"))
    assert padding(plain) > 0.3 and padding(aware) < 0.15
    widths = [[max(sum(measure(row)) for row in micro) for micro in share] for share in aware]
    plain_widths = [[max(sum(measure(row)) for row in micro) for micro in share] for share in plain]
    waits = [sum(abs(one - other) for one, other in zip(*both, strict=True)) for both in (widths, plain_widths)]
    assert waits[0] < waits[1], "micro-batches that run at the same time have similar lengths"


@pytest.mark.parametrize("ranks", [1, 4])
def test_packed_rows_are_full(spec: TrainSpec, ranks: int) -> None:
    spec = cut(spec, ranks=ranks, size=1, accumulation=64 // ranks, packing=True)
    found = shares(spec)
    rows = [sum(measure(row)) for share in found for micro in share for row in micro]
    assert len(rows) < 40 and len(rows) % ranks == 0
    assert max(rows) - min(rows) < 0.1 * 1024, "ranks with one row each take equally long"


def test_windows(spec: TrainSpec) -> None:
    spec = cut(spec, ranks=2, size=2, accumulation=2, length_aware="window")
    steps = [samples_of_step(step, spec, count=200, measure=measure) for step in range(2 * WINDOW)]
    for first in (0, WINDOW):
        plain = [row for step in range(first, first + WINDOW) for row in rows_of_step(step, seed=spec.seed, rows=200, global_batch=8)]
        assert Counter(row for step in steps[first : first + WINDOW] for row in step) == Counter(plain)
        means = [sum(measure(step)) for step in steps[first : first + WINDOW]]
        assert means != sorted(means) and means != sorted(means, reverse=True), "long and short steps are mixed"
    spreads = [max(measure(step)) - min(measure(step)) for step in steps]
    assert sum(spreads) / len(spreads) < 200
    assert samples_of_step(5, replace(spec, steps=1), count=200, measure=measure) == steps[5], "a longer run has the same order"


def test_the_order_never_changes(spec: TrainSpec) -> None:
    """Golden: a resumed run continues the order of an earlier version."""
    spec = cut(spec, ranks=2, size=2, accumulation=2)
    assert shares(with_data(spec, length_aware="step")) == GOLDEN_STEP
    assert shares(with_data(spec, packing=True)) == GOLDEN_PACKED
    assert samples_of_step(3, with_data(spec, length_aware="window"), count=200, measure=measure) == GOLDEN_WINDOW


GOLDEN_STEP = [(((169,), (188,)), ((29,), (141,))), (((86,), (98,)), ((35,), (28,)))]
GOLDEN_PACKED = [(((86, 29), (188, 35)),), (((98, 141), (169, 28)),)]
GOLDEN_WINDOW = (22, 93, 137, 161, 138, 0, 92, 115)
