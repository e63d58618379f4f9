"""A step that does not end: told by every rank, with stacks, and ended."""

import io
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainer.data.load
from tests.trainer.mortal import run_ranks
from trainer.contract import Exit, FailureReport, read
from trainer.watchdog import Watchdog, watch_steps


@pytest.fixture
def log(tmp_path: Path) -> Any:
    with (tmp_path / "log.txt").open("w+", encoding="utf-8") as file:
        yield file


def said(log: io.TextIOWrapper) -> str:
    log.flush()
    return Path(log.name).read_text(encoding="utf-8")


def test_a_step_that_is_too_long_is_told_once_with_stacks_and_then_ended(log: io.TextIOWrapper) -> None:
    ends: list[str] = []
    watchdog = Watchdog(timeout_s=100, rank=3, stream=log, end=ends.append)
    watchdog.begin(7, "data")
    watchdog.phase("update")
    began = time.monotonic()
    watchdog.look(began + 99)
    assert said(log) == ""
    for after_s in (101, 102):
        watchdog.look(began + after_s)
    assert said(log).count("omnilaunch: rank 3 has waited 101 s in step 7 (update)") == 1
    assert "has waited 102 s" not in said(log)
    assert "test_a_step_that_is_too_long_is_told_once" in said(log)  # this very stack
    watchdog.look(began + 201)
    assert ends == ["step 7 (update) has not ended in 201 s, twice run.hang_timeout_s"]
    watchdog.rest()


def test_between_steps_and_when_switched_off_it_sleeps(log: io.TextIOWrapper) -> None:
    for watchdog in (
        Watchdog(timeout_s=1, rank=0, stream=log, end=pytest.fail),
        Watchdog(timeout_s=0, rank=0, stream=log, end=pytest.fail),
    ):
        watchdog.begin(1, "data")
        watchdog.rest()
        watchdog.phase("saving")
        watchdog.look(time.monotonic() + 1000)
    never = Watchdog(timeout_s=0, rank=0, stream=log, end=pytest.fail)
    never.begin(1, "data")
    never.look(time.monotonic() + 1000)
    assert said(log) == ""


def test_every_step_has_the_whole_time(log: io.TextIOWrapper) -> None:
    with watch_steps(0.6, rank=0, stream=log, end=pytest.fail) as watchdog:
        for step in range(1, 6):
            watchdog.begin(step, "data")
            time.sleep(0.2)  # together longer than the limit
        watchdog.rest()
        time.sleep(0.7)
    assert said(log) == ""


def sleep_for_ever(*_: Any) -> None:
    time.sleep(600)


def hang_rank_1() -> None:
    """In the data of step 3."""
    collate, calls = trainer.data.load.collate, iter(range(1, 100))
    if os.environ["RANK"] == "1":
        trainer.data.load.collate = lambda *arguments: collate(*arguments) if next(calls) < 3 else sleep_for_ever()


def test_of_two_ranks_the_log_shows_which_one_hangs_and_the_run_ends(tiny_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    spec = tiny_spec(ranks=2, micro=4)
    gone = run_ranks(replace(spec, hang_timeout_s=4), meddle=hang_rank_1)
    assert Exit.HUNG in gone.codes, gone.text
    assert "omnilaunch: rank 1 has waited 4 s in step 3 (data)" in gone.text
    assert "omnilaunch: rank 0 has waited 4 s in step 3 (forward and backward)" in gone.text
    assert "in sleep_for_ever" in gone.text and "in all_reduce" in gone.text
    assert "(data) has not ended in 8 s" in gone.text or "(forward and backward) has not ended in 8 s" in gone.text
    reports = [read(FailureReport, path) for path in Path(spec.output).glob("failure-rank*.json")]
    assert reports and all((report.code, report.kind) == (Exit.HUNG, "Hung") and "step 3" in report.message for report in reports)
    assert gone.seconds < 60
