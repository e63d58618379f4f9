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
    spec = replace(cut(spec, ranks=2, size=2, accumulation=2, length_aware="window"), steps=25)
    steps = [samples_of_step(step, spec, count=200, measure=measure) for step in range(25)]
    for first, end in ((0, WINDOW), (WINDOW, 25)):
        plain = [row for step in range(first, end) for row in rows_of_step(step, seed=spec.seed, rows=200, global_batch=8)]
        assert Counter(row for step in steps[first:end] for row in step) == Counter(plain)
        means = [sum(measure(step)) for step in steps[first:end]]
        assert means != sorted(means) and means != sorted(means, reverse=True), "long and short steps are mixed"
    spreads = [max(measure(step)) - min(measure(step)) for step in steps]
    assert sum(spreads) / len(spreads) < 250
    longer = replace(spec, steps=100)
    assert [samples_of_step(step, longer, count=200, measure=measure) for step in range(25)] == steps, "the epoch ends there anyway"


MODES = [{"length_aware": "window"}, {"length_aware": "step"}, {"length_aware": "off"}, {"packing": True}]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 200),
    ranks=st.integers(1, 4),
    size=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    steps=st.integers(1, 60),
    mode=st.sampled_from(MODES),
)
def test_each_epoch_has_each_row_once(spec: TrainSpec, rows: int, ranks: int, size: int, accumulation: int, steps: int, mode: dict) -> None:
    """All rows that all ranks of a run take, counted: whole epochs, and a last one of which each row is used at most once, the same rows as without
    windows."""
    spec = replace(cut(spec, ranks=ranks, size=size, accumulation=accumulation, **mode), steps=steps)
    used = Counter(number for step in range(steps) for number in flat(shares(spec, step, count=rows)))
    batch = spec.batch.global_batch
    whole, rest = divmod(steps * batch, rows)
    assert all(used[row] - whole in (0, 1) for row in range(rows)) and sum(used.values()) == whole * rows + rest
    plain = Counter(row for step in range(steps) for row in rows_of_step(step, seed=spec.seed, rows=rows, global_batch=batch))
    assert used == plain


@WIDE
@given(rows=st.integers(1, 150), batch=st.integers(1, 12), ends=st.lists(st.integers(1, 40), min_size=2, max_size=4), data=st.data())
def test_a_run_that_goes_on_with_other_steps_uses_each_row_once(
    spec: TrainSpec, rows: int, batch: int, ends: list[int], data: st.DataObject
) -> None:
    """Each attempt resumes at any step of the one before, with another number of ranks and, if need be, more or fewer steps."""
    used, done = Counter[int](), 0
    spec = cut(spec, ranks=1, size=batch, accumulation=1, length_aware="window")
    attempts: list[tuple[int, ...]] = []
    for end in ends:
        attempt = replace(spec, steps=max(end, done + 1), earlier_steps=spec.window_ends if attempts else ())
        start = data.draw(st.integers(0, done), label="resumed at") if done else 0
        attempts = attempts[:start] + [samples_of_step(step, attempt, count=rows, measure=measure) for step in range(start, attempt.steps)]
        spec, done = attempt, data.draw(st.integers(start, attempt.steps), label="done")
        attempts = attempts[:done]
    attempts += [samples_of_step(step, spec, count=rows, measure=measure) for step in range(done, spec.steps)]
    used = Counter(row for step in attempts for row in step)
    assert max(used.values()) - min(used[row] for row in range(rows)) <= 1
    assert sum(used.values()) == len(attempts) * batch


def test_an_epoch_of_ten_steps_in_a_window_of_sixteen(spec: TrainSpec) -> None:
    """1,280 rows, a batch of 128, one epoch: a report of 476 rows that were never used."""
    lengths = [8 + 37 * (number * number % 23) for number in range(1280)]
    spec = replace(cut(spec, ranks=1, size=128, accumulation=1, length_aware="window"), steps=10)
    used = [
        row for step in range(10) for row in samples_of_step(step, spec, count=1280, measure=lambda rows: [lengths[row] for row in rows])
    ]
    assert sorted(used) == list(range(1280))


def test_the_order_never_changes(spec: TrainSpec) -> None:
    """Golden: a resumed run continues the order of an earlier version."""
    spec = cut(spec, ranks=2, size=2, accumulation=2)
    assert shares(with_data(spec, length_aware="step")) == GOLDEN_STEP
    assert shares(with_data(spec, packing=True)) == GOLDEN_PACKED
    windows = replace(with_data(spec, length_aware="window"), steps=WINDOW)
    assert samples_of_step(3, windows, count=200, measure=measure) == GOLDEN_WINDOW


GOLDEN_STEP = [(((169,), (188,)), ((29,), (141,))), (((86,), (98,)), ((35,), (28,)))]
GOLDEN_PACKED = [(((86, 29), (188, 35)),), (((98, 141), (169, 28)),)]
GOLDEN_WINDOW = (22, 93, 137, 161, 138, 0, 92, 115)
