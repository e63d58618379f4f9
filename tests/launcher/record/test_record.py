"""A run's folder is written before the run, closed after it, and never overwritten."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.record.metrics import read_rows
from launcher.record.record import (
    AttemptOutcome,
    Failure,
    Record,
    SourceState,
    close_run,
    last_checkpoint,
    name_run,
    open_run,
    valid_run_id,
)
from launcher.run.progress import Growing
from trainer import contract
from trainer.contract import StepRow

CONF = Path(__file__).resolve().parents[3] / "conf"
SOURCE = SourceState(commit="c0ffee", dirty=True)
NOW = datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)
ROW = StepRow(step=1, steps=2, loss=1.5, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    return plan_for(f"cluster.root={tmp_path}", "cluster.devices_per_node=2")


def close(plan: Plan) -> object:
    return close_run(plan, SOURCE, AttemptOutcome(status="failed", code=5), started=NOW, ended=NOW + timedelta(seconds=2))


def test_the_plan_is_written_before_the_run_starts(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    assert {path.name for path in folder.iterdir()} == {
        "plan.json",
        "config.json",
        "Dockerfile",
        "source.json",
        "spec.json",
        "data.pending",
        "logs",
    }
    assert contract.read(contract.TrainSpec, folder / "spec.json") == plan.spec
    assert contract.read(SourceState, folder / "source.json") == SOURCE


def test_a_run_is_never_overwritten(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    with pytest.raises(ConfigRefused, match="exists already"):
        open_run(plan, SOURCE)
    assert (folder / "plan.json").exists()


@pytest.mark.parametrize("folder", ["file/R", "link/R", "/proc/omnilaunch/R", "n" * 300])
def test_a_folder_that_cannot_be_made_is_refused(plan: Plan, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    with pytest.raises(ConfigRefused, match=r"cannot be made: .*cluster\.root=FOLDER"):
        open_run(replace(plan, folder=str(tmp_path / folder)), SOURCE)


def test_credentials_in_a_failure_are_not_recorded(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    failure = Failure(host="launcher", rank=-1, code=3, message="no answer of https://ann:pa55@mirror", log="", tail=("http://b:pa55@c",))
    record = close_run(plan, SOURCE, AttemptOutcome(status="failed", code=3, failure=failure), started=NOW, ended=NOW)
    assert record.failure == replace(failure, message="no answer of https://***@mirror", tail=("http://***@c",))
    assert "pa55" not in (folder / "result.json").read_text() and contract.read(Record, folder / "result.json") == record


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


def test_a_torn_row_does_not_prevent_the_record(plan: Plan) -> None:
    """As after a full disk or a loss of power, when the file was continued later."""
    folder = open_run(plan, SOURCE)
    whole = json.dumps(ROW.__dict__).encode()
    (folder / contract.METRICS_FILE).write_bytes(whole[:20] + b"\n" + whole + b"\n\0\0\xff\n[1]\n{}\n")
    assert read_rows(folder / contract.METRICS_FILE) == Growing(folder / contract.METRICS_FILE).rows() == (ROW,)
    assert close(plan).final_loss == 1.5  # type: ignore[attr-defined]


def test_the_newest_checkpoint_is_that_of_the_last_step(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    for name in ("step-000010", "step-999999", "step-1000000", ".step-2000000.partial", "step-of-mine"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(folder) == "checkpoints/step-1000000"


def test_a_run_name_sorts_by_time_and_is_unique() -> None:
    config = compose(["stage=lora", "stage.checkpoint=x"], CONF)
    name = name_run(config, NOW, pid=7)
    assert re.fullmatch(r"20261121-010203-tiny_llava-lora-cpu-[0-9a-f]{4}", name) and valid_run_id(name) == name
    assert name_run(config, NOW, pid=7) == name
    assert len({name, name_run(config, NOW, pid=8), name_run(config, NOW + timedelta(microseconds=1), pid=7)}) == 3


@pytest.mark.parametrize("text", ["", "a/b", "..", ".hidden", "-x", "a b", "a\n", "ü", "n" * 101, "a:b"])
def test_an_invalid_run_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigRefused, match=r"--run-id"):
        valid_run_id(text)


@pytest.mark.parametrize("text", ["a", "monday", "20261121-1.2_x", "N" * 100])
def test_a_valid_run_id(text: str) -> None:
    assert valid_run_id(text) == text
