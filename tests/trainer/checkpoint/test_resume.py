"""What a start refuses, and what it takes from an earlier attempt."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import trainer.contract
import trainer.programs.train
from tests.trainer.mortal import Death, expect, run_ranks
from trainer.contract import CHECKPOINTS, METRICS_FILE, RESULT_FILE, Exit, FailureReport, TrainResult, TrainSpec, read

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def half_done(tiny_spec: Any) -> TrainSpec:
    """Killed in step 4 of 6, with checkpoints of steps 1, 2 and 3."""
    spec: TrainSpec = tiny_spec(changes={"steps": 6, "save_every": 1, "keep_checkpoints": 3})
    run_ranks(spec, Death(place="backward", call=4))
    return spec


def test_steps_whose_rows_are_lost_do_not_make_a_run_faster(half_done: TrainSpec) -> None:
    run = Path(half_done.output)
    (run / METRICS_FILE).unlink()
    gone = expect(run_ranks(half_done), 0)
    assert f"{METRICS_FILE} has rows of 0 of these steps only" in gone.text
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5, 6]
    measured = sum(row["samples"] for row in rows) / sum(row["seconds"] for row in rows)
    assert read(TrainResult, run / RESULT_FILE).samples_per_s == pytest.approx(measured)


def test_a_newer_version_s_checkpoint_is_not_passed_over_for_an_older_one(half_done: TrainSpec) -> None:
    """The run would do its step again, and write over it."""
    run = Path(half_done.output)
    path = run / CHECKPOINTS / "step-000003" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": trainer.contract.SCHEMA + 1, "what": "is new"}))
    before = path.read_bytes()
    gone = expect(run_ranks(half_done), Exit.USAGE)
    assert f"written with schema {trainer.contract.SCHEMA + 1}, this version reads {trainer.contract.SCHEMA}" in gone.text
    assert read(FailureReport, run / "failure-rank0.json").kind == "InputRefused"
    assert path.read_bytes() == before and (run / METRICS_FILE).read_text().count("\n") == 3


def test_a_rank_with_other_rows_says_so_before_the_first_step(tiny_spec: Any) -> None:
    """It would train on other samples than it is dealt."""
    spec = tiny_spec(ranks=2, micro=4)
    gone = run_ranks(spec, meddle=change_rows_of_rank_1)
    report = read(FailureReport, Path(spec.output) / "failure-rank1.json")
    assert gone.codes[1] == Exit.USAGE and report.kind == "InputRefused"
    assert "rank 1 on" in report.message and "has other training rows than rank 0" in report.message
    assert not (Path(spec.output) / METRICS_FILE).exists()


def change_rows_of_rank_1() -> None:
    """As on a node with an older copy of the file."""
    if os.environ["RANK"] == "1":
        trainer.programs.train.hash_sources = lambda *_: "0" * 64
