from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from trainer.data.batch.order import permute, rows_of_rank, rows_of_step

ROWS, BATCH, SEED = st.integers(1, 60), st.integers(1, 150), st.integers(0, 2**64)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, batch=BATCH, seed=SEED)
def test_every_epoch_sees_every_row_once(rows: int, batch: int, seed: int) -> None:
    steps = -(-3 * rows // batch)
    seen = [row for step in range(steps) for row in rows_of_step(step, seed=seed, rows=rows, global_batch=batch)]
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, batch=BATCH, seed=SEED, step=st.integers(0, 1000), world=st.integers(1, 9))
def test_any_number_of_ranks_divides_the_step(rows: int, batch: int, seed: int, step: int, world: int) -> None:
    whole = rows_of_step(step, seed=seed, rows=rows, global_batch=batch)
    assert len(whole) == batch
    shares = [rows_of_rank(whole, rank=rank, world_size=world) for rank in range(world)]
    assert Counter(row for share in shares for row in share) == Counter(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_and_seeds_differ() -> None:
    first, second = (rows_of_step(step, seed=1, rows=50, global_batch=50) for step in (0, 1))
    assert first != second
    assert rows_of_step(0, seed=2, rows=50, global_batch=50) != first


def test_the_order_never_changes() -> None:
    """Golden: a resumed run continues the order of a run that another version of numpy started."""
    assert permute(10, "digits").tolist() == [3, 9, 4, 6, 1, 5, 2, 8, 7, 0]
    assert rows_of_step(0, seed=7, rows=10, global_batch=12) == (2, 3, 8, 6, 4, 0, 1, 7, 5, 9, 1, 4)


@pytest.mark.parametrize(("step", "rows", "batch"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_invalid_arguments(step: int, rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match="rows_of_step needs"):
        rows_of_step(step, seed=0, rows=rows, global_batch=batch)
