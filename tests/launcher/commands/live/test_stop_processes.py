"""`omnilaunch stop` for a run without containers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.plan.commands import FOLDER_VARIABLE
from launcher.record.lock import find_holder, is_locked, lock_run
from launcher.ssh.transport import processes_with

# A launcher that takes a second to end after Ctrl-C, and counts the requests.
LAUNCHER = """import sys, time
from pathlib import Path
from launcher.record.lock import lock_run
from launcher.run.signals import catch_stops
with lock_run(Path(sys.argv[1])), catch_stops() as stop:
    print('held', flush=True)
    while not stop.count:
        time.sleep(0.05)
    time.sleep(1)
    Path(sys.argv[1], 'asked').write_text(f'{stop.reason} {stop.count}')
"""
RANK = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); pathlib.Path('ready').touch(); time.sleep(60)"


@contextmanager
def launcher(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    root = Path(__file__).resolve().parents[4]
    with subprocess.Popen((sys.executable, "-c", LAUNCHER, str(folder)), stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_launcher_gets_the_signal_of_ctrl_c_once(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    with launcher(folder) as process:
        assert main(["stop", "R"]) == 0
        assert process.wait(30) == 0 and (folder / "asked").read_text() == "SIGINT 1"
    said = capsys.readouterr().out
    assert "run R was asked to stop: it is ending; before the first step there is nothing to save" in said
    assert said.rstrip().endswith("to go on: omnilaunch launch --resume R")


def test_a_second_stop_waits_and_does_not_end_the_run_without_saving(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    (folder / "stop.json").write_text("{}")
    with launcher(folder) as process:
        os.kill(process.pid, 2)
        assert main(["stop", "R"]) == 0
        assert process.wait(30) == 0 and (folder / "asked").read_text() == "SIGINT 1"
    assert "was asked to stop before" in capsys.readouterr().out


def test_ranks_without_a_launcher_are_asked_to_save(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    environment = {**os.environ, FOLDER_VARIABLE: str(folder)}
    with subprocess.Popen((sys.executable, "-c", RANK), cwd=folder, env=environment) as rank:
        while not (folder / "ready").exists():
            time.sleep(0.05)
        assert main(["status", "R"]) == 0
        assert "its launcher was killed, and its ranks still run. To let them save and end: omnilaunch stop R" in capsys.readouterr().out
        assert main(["stop", "R"]) == 0 and rank.wait(30) == 0
    assert processes_with(FOLDER_VARIABLE, str(folder)) == ()
    said = capsys.readouterr().out
    assert "still run without a launcher: they are asked to save and end" in said and "launch --resume R" in said


@pytest.mark.parametrize(("status", "resumed"), [("finished", False), ("stopped", True)])
def test_a_run_that_has_ended(run: Callable[..., Path], capsys: pytest.CaptureFixture[str], status: str, resumed: bool) -> None:
    folder = run("run.steps=300", status=status)
    assert main(["stop", "R"]) == 0
    said = capsys.readouterr().out
    assert "nothing of run R runs" in said and f"{status} at 20" in said and ("--resume R" in said) == resumed
    assert not (folder / "stop.json").exists(), "a record is not changed"


def test_a_server_is_not_resumed(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("stage=serve", "stage.checkpoint=/a", status="stopped")
    assert main(["stop", "R"]) == 0
    said = capsys.readouterr().out
    assert "--resume" not in said and "to start one again: omnilaunch launch" in said and "stage=serve" in said


def test_a_launcher_on_another_machine_is_named(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    with lock_run(folder):
        assert find_holder(folder) is not None
        (folder / "launcher.lock").write_text("process 1 on elsewhere\n")
        assert find_holder(folder) is None and is_locked(folder)
        assert main(["stop", "R"]) == 2
        assert "not by a process of this machine" in capsys.readouterr().err
        (folder / "launcher.lock").write_text(f"process {os.getppid()} on {os.uname().nodename}\n")
        assert find_holder(folder) is None, "an id that belongs to another process now"
