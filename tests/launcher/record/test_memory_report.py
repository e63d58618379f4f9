"""`omnilaunch fit-report`: predicted memory compared with measured peaks."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.record.memory_report import PeakComparison, choose_folders, compare_runs, describe_comparisons
from launcher.record.record import AttemptOutcome, SourceState, close_run, open_run
from trainer.contract import RESULT_FILE, SCHEMA, PhasePeak, TrainResult, write

GIB = 2**30
NOW = datetime(2026, 11, 21, tzinfo=UTC)
SOURCE = SourceState(commit="", dirty=False)


@pytest.fixture
def record(plan_for: Callable[..., Plan], tmp_path: Path) -> Callable[..., Plan]:
    """A run that has ended, with the peaks that the trainer left."""

    def make(run_id: str, *peaks: PhasePeak, ended: bool = True, predicted: bool = True) -> Plan:
        plan = plan_for()
        plan = replace(plan, run_id=run_id, folder=str(tmp_path / run_id), memory=plan.memory if predicted else None)
        folder = open_run(plan, SOURCE)
        fields = {"seconds": 1.0, "samples_per_s": 1.0, "final_loss": 1.0, "checkpoint": "", "weights_sha256": "", "evaluation": {}}
        write(TrainResult(schema=SCHEMA, status="finished", steps=3, peaks=peaks, **fields), folder / RESULT_FILE)  # type: ignore[arg-type]
        if ended:
            close_run(plan, SOURCE, AttemptOutcome(status="finished", code=0), started=NOW, ended=NOW)
        return plan

    return make


def peak(phase: str, allocated: int, reserved: int = 0) -> PhasePeak:
    return PhasePeak(phase=phase, allocated_bytes=allocated, reserved_bytes=reserved)  # type: ignore[arg-type]


def test_the_peak_of_training_is_compared_with_the_plan(record: Callable[..., Plan], tmp_path: Path) -> None:
    plan = record("a", peak("load", 5 * GIB), peak("steps", 8 * GIB, 9 * GIB), peak("evaluation", 20 * GIB))
    (comparison,), left_out = compare_runs(choose_folders(tmp_path, ()))
    assert plan.memory is not None and left_out == ()
    assert (comparison.planned_bytes, comparison.measured_bytes) == (plan.memory.total_bytes, 8 * GIB)
    assert comparison.reserved_bytes == 9 * GIB
    assert comparison.error == pytest.approx(plan.memory.total_bytes / (8 * GIB) - 1)


def test_what_cannot_be_compared_is_named_with_its_reason(record: Callable[..., Plan], tmp_path: Path) -> None:
    record("running", peak("steps", GIB), ended=False)
    record("old", peak("steps", GIB), predicted=False)
    record("unmeasured")
    record("good", peak("steps", GIB))
    found, left_out = compare_runs(choose_folders(tmp_path, ()))
    assert [comparison.run_id for comparison in found] == ["good"]
    assert {line.partition(":")[0]: line.partition(": ")[2].split()[0] for line in left_out} == {
        "old": "its",
        "running": "it",
        "unmeasured": "it",
    }


def test_runs_are_chosen_by_name(record: Callable[..., Plan], tmp_path: Path) -> None:
    record("a", peak("steps", GIB))
    record("b", peak("steps", GIB))
    assert [folder.name for folder in choose_folders(tmp_path, ("b",))] == ["b"]
    with pytest.raises(ConfigRefused, match="no run 'c'"):
        choose_folders(tmp_path, ("b", "c"))


def comparison_of(planned: int, measured: int) -> PeakComparison:
    config = ("tiny", "full", "bf16", "zero2", "2048")
    sizes = {"planned_bytes": planned, "measured_bytes": measured, "reserved_bytes": measured}
    return PeakComparison(run_id="R", config=config, accelerator="cuda", **sizes)


@pytest.mark.parametrize("markdown", (True, False))
def test_the_table_ends_with_the_errors(markdown: bool) -> None:
    text = describe_comparisons((comparison_of(11 * GIB, 10 * GIB), comparison_of(19 * GIB, 20 * GIB)), ("x: why",), markdown=markdown)
    assert "cuda: 2 runs, mean error 7.5% of the measured peak, most above 10.0%, most below 5.0%" in text
    assert "left out: x: why" in text and "+10.0%" in text and "-5.0%" in text
    assert text.startswith("| run | model |") is markdown


def test_resident_memory_is_not_compared_with_tensors() -> None:
    """It said `cpu: mean error 91 %`, of a process whose interpreter takes most of its memory."""
    text = describe_comparisons((replace(comparison_of(GIB // 20, GIB // 2), accelerator="cpu"),), (), markdown=False)
    assert "cpu: 1 run, not compared: a CPU reports resident memory" in text and "%" not in text
    assert text.splitlines()[1].endswith("-")


def test_no_runs() -> None:
    assert describe_comparisons((), (), markdown=False) == "no run that can be compared"
