"""The steps that a report names are those that train on the rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.conftest import with_data
from trainer.contract import DataProblem, TrainSpec
from trainer.data.batch.assign_to_ranks import samples_of_step
from trainer.data.check import examine_data, resolve
from trainer.data.row_use import find_uses

BAD = {3: 2, 11: 5, 30: 1}  # row -> any number


def problem(file: Path, row: int) -> DataProblem:
    return DataProblem(file=str(file), row=row, field="", problem="a mark", fix="remove it")


@pytest.fixture(autouse=True)
def local_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)


@pytest.mark.parametrize("mode", [{}, {"length_aware": "step"}, {"length_aware": "window"}, {"packing": True}])
def test_the_first_step_of_each_row(spec: TrainSpec, write_data: Callable[..., Path], mode: dict) -> None:
    file = write_data(40)
    spec = replace(with_data(spec, **mode), steps=25)
    uses = find_uses(spec, resolve(spec.data), [problem(file, row) for row in BAD])
    lengths = {number: 10 + number % 7 for number in range(40)}
    steps = [samples_of_step(step, spec, count=40, measure=lambda rows: [lengths[row] for row in rows]) for step in range(25)]
    true = {row: next(step for step, rows in enumerate(steps, start=1) if row - 1 in rows) for row in BAD}
    assert {use.row for use in uses} == set(BAD) and [use.step for use in uses] == sorted(use.step for use in uses)
    for use in uses:
        assert use.earliest == (mode == {"length_aware": "window"})
        assert use.step <= true[use.row] if use.earliest else use.step == true[use.row]


def test_rows_that_no_step_uses_are_left_out(spec: TrainSpec, write_data: Callable[..., Path]) -> None:
    file = write_data(40)
    used = {row + 1 for step in range(3) for row in samples_of_step(step, spec, count=40, measure=lambda rows: [])}
    uses = find_uses(spec, resolve(spec.data), [problem(file, row) for row in range(1, 41)])
    assert {use.row for use in uses} == used and len(used) == 12
    assert find_uses(spec, resolve(spec.data), [problem(file, 0)]) == ()
    assert find_uses(replace(spec, stage=replace(spec.stage, kind="evaluate")), resolve(spec.data), [problem(file, 1)]) == ()


def test_of_a_row_with_several_conversations_the_earliest_one(spec: TrainSpec, write_data: Callable[..., Path], tmp_path: Path) -> None:
    file = write_data(20)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[:6], *rows[6:]]))
    (use,) = find_uses(replace(spec, steps=5), resolve(spec.data), [problem(file, 1)])
    steps = [samples_of_step(step, spec, count=20, measure=lambda rows: []) for step in range(5)]
    assert use.step == next(step for step, chosen in enumerate(steps, start=1) if set(chosen) & set(range(6)))
    assert examine_data(spec)[0].train_rows == 20
