"""A step that does not end: reported by every rank, with stacks, and ended."""

import io
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainer.data.batch.load
import trainer.train.watchdog
from launcher.check.hardware import HANG_GRACE_S
from launcher.run.hang import judge_hang
from tests.trainer.mortal import run_ranks
from trainer.contract import Exit, FailureReport, read
from trainer.train.watchdog import Watchdog, watch_steps


@pytest.fixture
def log(tmp_path: Path) -> Any:
    with (tmp_path / "log.txt").open("w+", encoding="utf-8") as file:
        yield file


def said(log: io.TextIOWrapper) -> str:
    log.flush()
    return Path(log.name).read_text(encoding="utf-8")


def test_a_step_that_takes_too_long_is_reported_once_with_stacks_and_then_ended(log: io.TextIOWrapper) -> None:
    ends: list[str] = []
    watchdog = Watchdog(timeout_s=100, rank=3, stream=log, end=ends.append)
    watchdog.begin(7, "data")
    watchdog.phase("update")
    began = time.monotonic()
    watchdog.check(began + 99)
    assert said(log) == ""
    for after_s in (101, 102):
        watchdog.check(began + after_s)
    assert said(log).count("omnilaunch: rank 3 has waited 101 s in step 7 (update)") == 1
    assert "has waited 102 s" not in said(log)
    assert "test_a_step_that_takes_too_long_is_reported_once" in said(log)  # this very stack
    watchdog.check(began + 129)
    assert ends == []
    watchdog.check(began + 131)
    assert ends == ["step 7 (update) has not ended in 131 s; run.hang_timeout_s is 100"]
    watchdog.pause()


def test_between_steps_and_when_switched_off_it_sleeps(log: io.TextIOWrapper) -> None:
    for watchdog in (
        Watchdog(timeout_s=1, rank=0, stream=log, end=pytest.fail),
        Watchdog(timeout_s=0, rank=0, stream=log, end=pytest.fail),
    ):
        watchdog.begin(1, "data")
        watchdog.pause()
        watchdog.phase("saving")
        watchdog.check(time.monotonic() + 1000)
    never = Watchdog(timeout_s=0, rank=0, stream=log, end=pytest.fail)
    never.begin(1, "data")
    never.check(time.monotonic() + 1000)
    assert said(log) == ""


def test_a_save_that_takes_too_long_is_reported_and_continues(log: io.TextIOWrapper) -> None:
    watchdog = Watchdog(timeout_s=100, rank=0, stream=log, end=pytest.fail)
    watchdog.begin(2, "update")
    watchdog.check(time.monotonic() + 101)
    watchdog.pause()
    watchdog.begin(2, "saving", ends=False)
    watchdog.check(time.monotonic() + 1000)
    watchdog.pause()
    assert "in step 2 (update)" in said(log) and "rank 0 has waited 1000 s in step 2 (saving)" in said(log)


def test_a_long_timeout_is_looked_at_every_second(log: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return super().wait(0.01)

    monkeypatch.setattr(trainer.train.watchdog.threading, "Event", Clock)
    with watch_steps(1500, rank=0, stream=log, end=pytest.fail):
        time.sleep(0.05)
    assert set(waits) - {0.0} == {1.0}


def test_the_launcher_orders_its_timeouts_by_the_same_grace() -> None:
    assert HANG_GRACE_S == trainer.train.watchdog.GRACE_S


def test_every_step_has_the_whole_time(log: io.TextIOWrapper) -> None:
    with watch_steps(0.6, rank=0, stream=log, end=pytest.fail) as watchdog:
        for step in range(1, 6):
            watchdog.begin(step, "data")
            time.sleep(0.2)  # together longer than the limit
        watchdog.pause()
        time.sleep(0.7)
    assert said(log) == ""


def sleep_for_ever(*_: Any) -> None:
    time.sleep(600)


def hang_rank_1() -> None:
    """In the data of step 3."""
    trainer.train.watchdog.GRACE_S = 3.0
    collate, calls = trainer.data.batch.load.collate, iter(range(1, 100))
    if os.environ["RANK"] == "1":
        trainer.data.batch.load.collate = lambda *arguments: collate(*arguments) if next(calls) < 3 else sleep_for_ever()


def test_of_two_ranks_the_log_shows_which_one_hangs_and_the_run_ends(tiny_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    spec = tiny_spec(ranks=2, micro=4)
    gone = run_ranks(replace(spec, hang_timeout_s=4), meddle=hang_rank_1)
    assert Exit.HUNG in gone.codes, gone.text
    assert "omnilaunch: rank 1 has waited 4 s in step 3 (data)" in gone.text
    assert "omnilaunch: rank 0 has waited 4 s in step 3 (forward and backward)" in gone.text
    assert re.search(r"^\[rank 1\] .* in sleep_for_ever$", gone.text, re.MULTILINE) and re.search(
        r"^\[rank 0\] .* in all_reduce$", gone.text, re.MULTILINE
    )
    assert re.search(r"\((data|forward and backward)\) has not ended in [78] s; run.hang_timeout_s is 4", gone.text)
    verdict = judge_hang([gone.text], 2)
    assert verdict is not None and verdict.rank == 1 and "in sleep_for_ever" in verdict.message, "the rank that the other one waits for"
    reports = [read(FailureReport, path) for path in Path(spec.output).glob("failure-rank*.json")]
    first = min(reports, key=lambda report: report.unix_s)  # another rank may still tell that it has lost this one
    assert (first.code, first.kind) == (Exit.HUNG, "Hung") and "step 3" in first.message
    assert all(report.kind == "Hung" for report in reports if report.rank == 1)
    assert gone.seconds < 60
