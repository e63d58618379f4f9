"""Runs whose rows hold several samples: the same steps as with padding, on one rank and two, under each ZeRO stage."""

from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.test_run import rows_of
from trainer.contract import TrainSpec


def without_padding(spec: TrainSpec, **changes: Any) -> TrainSpec:
    """Evaluation left out."""
    return replace(spec, data=replace(spec.data, **changes), evaluation=replace(spec.evaluation, enabled=False))


@pytest.mark.parametrize(
    ("ranks", "zero", "changes"),
    [*((ranks, zero, {"packing": True, "max_length": 128}) for ranks, zero in [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]), (2, 3, {"padding_free": True})],
)
def test_a_packed_run_walks_as_a_padded_one(tiny_spec: Any, torchrun: Any, ranks: int, zero: int, changes: dict[str, Any]) -> None:
    """Steps of 16 samples. In rows of four: four or two micro-batches a rank, where DeepSpeed counts on 16 or 8."""
    plain = tiny_spec("plain", micro=16, changes={"evaluation": replace(tiny_spec("unused").evaluation, enabled=False)})
    micro = 1 if "packing" in changes else 4
    spec = without_padding(tiny_spec("packed", micro=micro, accumulation=16 // ranks // micro, ranks=ranks, zero=zero), **changes)
    for one in (plain, spec):
        ended = torchrun(one)
        assert ended.code == 0, ended.text
    expected, rows = rows_of(plain), rows_of(spec)
    assert [row.loss for row in rows] == pytest.approx([row.loss for row in expected], abs=2e-6)
    assert [row.grad_norm for row in rows] == pytest.approx([row.grad_norm for row in expected], rel=1e-4)
    assert [(row.samples, row.tokens) for row in rows] == [(row.samples, row.tokens) for row in expected]
