"""Ranks wait for the data check before their first step."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.contract import DATA_PENDING_FILE, METRICS_FILE, RunFailed, TrainSpec
from trainer.programs import inputs
from trainer.programs.inputs import CHECKED_FIRST_ROWS, wait_for_data_check


def test_ranks_wait_until_the_data_check_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending, order = tmp_path / DATA_PENDING_FILE, list[str]()
    pending.touch()
    polls = iter(("poll", "poll", "passed"))

    def sleep(_: float) -> None:
        order.append(next(polls))
        if order[-1] == "passed":
            pending.unlink()

    monkeypatch.setattr(inputs.time, "sleep", sleep)
    wait_for_data_check(tmp_path, CHECKED_FIRST_ROWS)
    assert order == ["poll", "poll", "passed"]


def test_a_large_set_and_a_run_without_a_launcher_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.time, "sleep", lambda _: pytest.fail("waited"))
    wait_for_data_check(tmp_path, 1)
    (tmp_path / DATA_PENDING_FILE).touch()
    wait_for_data_check(tmp_path, CHECKED_FIRST_ROWS + 1)


def test_a_check_that_never_passes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / DATA_PENDING_FILE).touch()
    monkeypatch.setattr(inputs, "CHECK_TIMEOUT_S", 0.0)
    with pytest.raises(RunFailed, match=r"data\.pending: the data check has not passed .*python -m trainer data .*spec\.json"):
        wait_for_data_check(tmp_path, 1)


def test_a_run_takes_no_step_while_its_data_check_is_under_way(
    tiny_spec: Callable[..., TrainSpec], torchrun: Callable[..., object]
) -> None:
    """A real run of one rank beside a check that passes only when the rank is ready to take steps."""
    spec = tiny_spec()
    folder, seen = Path(spec.output), list[bool]()
    (folder / DATA_PENDING_FILE).touch()

    def check() -> None:
        while not (folder / "environment.json").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        seen.append((folder / METRICS_FILE).exists())
        (folder / DATA_PENDING_FILE).unlink()

    beside = threading.Thread(target=check, daemon=True)
    beside.start()
    ended = torchrun(spec)
    assert getattr(ended, "code", None) == 0, ended
    assert seen == [False] and (folder / METRICS_FILE).exists()
