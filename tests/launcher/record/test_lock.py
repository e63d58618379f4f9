"""One launcher at a time, and a stop that every launcher of the folder sees."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.record.lock import ask_to_stop, is_asked_to_stop, is_locked, lock_run

HOLD = """import sys, time
from pathlib import Path
from launcher.record.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_second_launcher_is_refused_with_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    with subprocess.Popen((sys.executable, "-c", HOLD, str(tmp_path)), stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert is_locked(tmp_path)
            with pytest.raises(ConfigRefused, match=rf"process {holder.pid} on .*omnilaunch stop {tmp_path.name}"), lock_run(tmp_path):
                raise AssertionError
        finally:
            holder.send_signal(signal.SIGKILL)
    assert not is_locked(tmp_path), "the kernel gives it back, whatever ended the launcher"
    with lock_run(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "launcher.lock").read_text(encoding="utf-8")


LOOK = """import sys
from pathlib import Path
from launcher.record.lock import is_locked
print('looking', flush=True)
while True:
    is_locked(Path(sys.argv[1]))
"""


def test_looking_at_a_lock_never_takes_it(tmp_path: Path) -> None:
    """Beside a process that looks all the time, every launcher gets the lock at its first try."""
    with lock_run(tmp_path):
        pass
    with subprocess.Popen((sys.executable, "-c", LOOK, str(tmp_path)), stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as looker:
        try:
            assert looker.stdout is not None and looker.stdout.readline() == "looking\n"
            refused = 0
            for _ in range(300):
                try:
                    with lock_run(tmp_path):
                        assert is_locked(tmp_path)
                except ConfigRefused:
                    refused += 1
            assert refused == 0 and looker.poll() is None
        finally:
            looker.kill()


def test_a_lock_ends_with_its_process_although_a_forked_child_lives_on(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        with lock_run(tmp_path):
            if os.fork() == 0:  # the child: it outlives its parent and touches a file when it sees that
                while os.getppid() == int((tmp_path / "launcher.lock").read_text().split()[1]):
                    time.sleep(0.01)
                (tmp_path / "child").write_text("locked" if is_locked(tmp_path) else "free")
                os._exit(0)
            os._exit(0)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 30
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / "child").read_text() == "free" and not is_locked(tmp_path)


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert is_locked(tmp_path)
        with pytest.raises(ConfigRefused, match="supervised by another launcher"), lock_run(tmp_path):
            raise AssertionError
    assert not is_locked(tmp_path)


def test_a_run_without_a_lock_file_is_not_locked_and_looking_makes_none(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir())


def test_a_stop_is_seen(tmp_path: Path) -> None:
    assert not is_asked_to_stop(tmp_path)
    ask_to_stop(tmp_path, datetime.now(UTC))
    assert is_asked_to_stop(tmp_path)
