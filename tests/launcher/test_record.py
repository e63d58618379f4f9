"""A run's folder: written before, closed after, never overwritten."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.compose import compose
from launcher.errors import ConfigRefused
from launcher.gang import NodeResult
from launcher.plan import Plan
from launcher.record import SourceState, close_run, find_failure, last_checkpoint, name_run, open_run, read_rows, resolve_checkpoint
from trainer import contract
from trainer.contract import SCHEMA, FailureReport, StepRow

SOURCE = SourceState(commit="c0ffee", dirty=True)
NOW = datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)
ROW = StepRow(step=1, steps=2, loss=1.5, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    return plan_for(f"cluster.root={tmp_path}", "cluster.devices_per_node=2")


def close(plan: Plan, nodes: tuple[NodeResult, ...] = ()) -> object:
    return close_run(
        plan, SOURCE, "failed", 5, started=NOW, ended=NOW + timedelta(seconds=2), nodes=nodes, failure=find_failure(plan, nodes)
    )


def report(rank: int, unix_s: float) -> FailureReport:
    return FailureReport(
        schema=SCHEMA, rank=rank, hostname="h", unix_s=unix_s, code=5, kind="RunFailed", message=f"rank {rank} broke", traceback="a\nb\n"
    )


def test_everything_is_there_before_anything_happens(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    assert {path.name for path in folder.iterdir()} == {"plan.json", "config.json", "Dockerfile", "source.json", "spec.json", "logs"}
    assert contract.read(contract.TrainSpec, folder / "spec.json") == plan.spec
    assert json.loads((folder / "source.json").read_text()) == {"commit": "c0ffee", "dirty": True}


def test_a_run_is_never_overwritten(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    with pytest.raises(ConfigRefused, match="is there already"):
        open_run(plan, SOURCE)
    assert (folder / "plan.json").exists()


def test_a_run_that_left_nothing_has_a_record(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    record = close(plan)
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert record.steps == 0 and record.seconds == 2.0 and record.final_loss is None  # type: ignore[attr-defined]


def test_rows_that_were_written_count_and_half_a_row_does_not(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    whole = json.dumps(ROW.__dict__)
    (folder / contract.METRICS_FILE).write_text(f"{whole}\n{whole[:20]}")
    assert read_rows(folder / contract.METRICS_FILE) == (ROW,)
    assert close(plan).final_loss == 1.5  # type: ignore[attr-defined]


def test_the_rank_that_failed_first_is_named(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    for rank, unix_s in ((0, 20.0), (1, 10.0)):
        contract.write(report(rank, unix_s), folder / contract.FAILURE_FILES.format(rank=rank))
    failure = find_failure(plan, ())
    assert failure is not None and (failure.rank, failure.message, failure.tail) == (1, "rank 1 broke", ("a", "b"))


def test_without_a_report_the_nodes_last_lines_tell(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    (folder / "logs/node0.log").write_text("\n".join(f"line {i}" for i in range(40)))
    failure = find_failure(plan, (NodeResult(host="localhost", node_rank=0, code=-9, seconds=1.0, killed=False),))
    assert failure is not None and failure.rank == -1 and failure.tail[-1] == "line 39" and len(failure.tail) == 15


def test_a_run_id_stands_for_its_newest_checkpoint(plan: Plan, tmp_path: Path) -> None:
    folder = open_run(plan, SOURCE)
    config = compose([f"stage.checkpoint={plan.run_id}", "stage=lora"], Path(__file__).resolve().parents[2] / "conf")
    with pytest.raises(ConfigRefused, match="saved no checkpoint"):
        resolve_checkpoint(config, tmp_path / "runs")
    for name in ("step-000010", "step-000200", ".step-000300.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(folder) == "checkpoints/step-000200"
    assert resolve_checkpoint(config, tmp_path / "runs").stage.checkpoint == str(folder / "checkpoints/step-000200")
    elsewhere = replace(config, stage=replace(config.stage, checkpoint="some/folder"))
    assert resolve_checkpoint(elsewhere, tmp_path / "runs") == elsewhere


def test_a_name_sorts_by_time_and_says_what_it_is() -> None:
    config = compose(["stage=lora", "stage.checkpoint=x"], Path(__file__).resolve().parents[2] / "conf")
    assert name_run(config, NOW) == "20261121-010203-tiny_llava-lora-cpu"
