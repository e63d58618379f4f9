"""Runs whose rows hold several samples: the same steps as without, on one rank and two, under each ZeRO stage."""

from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.test_run import rows_of
from trainer.contract import TrainSpec


def packed(spec: TrainSpec, *, room: int) -> TrainSpec:
    """Rows of `room` tokens, evaluation left out."""
    data = replace(spec.data, packing=True, max_length=room)
    return replace(spec, data=data, evaluation=replace(spec.evaluation, enabled=False))


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_packed_run_walks_as_a_padded_one(tiny_spec: Any, torchrun: Any, ranks: int, zero: int) -> None:
    """Steps of 16 samples in rows of four: four or two micro-batches a rank, where DeepSpeed counts on 16 or 8."""
    plain = tiny_spec("plain", micro=16, changes={"evaluation": replace(tiny_spec("unused").evaluation, enabled=False)})
    spec = packed(tiny_spec("packed", micro=1, accumulation=16 // ranks, ranks=ranks, zero=zero), room=128)
    for one in (plain, spec):
        ended = torchrun(one)
        assert ended.code == 0, ended.text
    expected, rows = rows_of(plain), rows_of(spec)
    assert [row.loss for row in rows] == pytest.approx([row.loss for row in expected], abs=2e-6)
    assert [row.grad_norm for row in rows] == pytest.approx([row.grad_norm for row in expected], rel=1e-4)
    assert [(row.samples, row.tokens) for row in rows] == [(row.samples, row.tokens) for row in expected]
