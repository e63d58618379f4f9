"""Runs whose rows hold several samples: the same steps as with padding, on one rank and two, under each ZeRO stage."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.mortal import expect, run_ranks
from tests.trainer.programs.test_train import rows_of
from trainer.contract import TrainSpec

pytestmark = pytest.mark.usefixtures("one_thread")
PACKED = {"packing": True, "max_length": 128}


def without_evaluation(spec: TrainSpec, **changes: Any) -> TrainSpec:
    return replace(spec, data=replace(spec.data, **changes), evaluation=replace(spec.evaluation, enabled=False))


@pytest.fixture
def uneven(tmp_path: Path, digits: Path) -> dict[str, str]:
    """The digits with questions of several lengths, as fields of a spec's data."""
    rows = json.loads((digits / "digits/train.json").read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        row["conversations"][0]["value"] += " which" * (number % 7)
    (tmp_path / "uneven.json").write_text(json.dumps(rows), encoding="utf-8")
    return {"builtin": "", "root": str(tmp_path), "train": "uneven.json", "images": str(digits / "digits")}


@pytest.mark.parametrize(
    ("ranks", "zero", "changes"),
    [
        (1, 0, PACKED),
        *(pytest.param(2, zero, PACKED, marks=pytest.mark.slow) for zero in (0, 1, 2)),
        (2, 3, PACKED),
        (2, 3, {"padding_free": True}),
    ],
)
def test_a_packed_run_walks_as_a_padded_one(tiny_spec: Any, uneven: dict[str, str], ranks: int, zero: int, changes: dict[str, Any]) -> None:
    """Steps of 16 samples. In rows of four: four or two micro-batches a rank, where DeepSpeed counts on 16 or 8."""
    plain = without_evaluation(tiny_spec("plain", micro=16), **uneven)
    micro = 1 if "packing" in changes else 4
    spec = tiny_spec("packed", micro=micro, accumulation=16 // ranks // micro, ranks=ranks, zero=zero)
    spec = without_evaluation(spec, **uneven, **changes)
    for one in (plain, spec):
        expect(run_ranks(one), *[0] * one.device.world_size)
    expected, rows = rows_of(plain), rows_of(spec)
    assert [row.loss for row in rows] == pytest.approx([row.loss for row in expected], abs=2e-6)
    assert [row.grad_norm for row in rows] == pytest.approx([row.grad_norm for row in expected], rel=1e-4)
    assert [(row.samples, row.tokens) for row in rows] == [(row.samples, row.tokens) for row in expected]
