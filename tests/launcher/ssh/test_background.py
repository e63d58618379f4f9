"""A call in the background: its answer, its error, and that it does not delay the end of the program."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.ssh.background import in_background

HANGS = "import threading; from launcher.ssh.background import in_background; in_background(lambda: threading.Event().wait(60))"


def test_the_answer_and_the_error() -> None:
    assert in_background(lambda: 3).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result(10)


def test_a_call_that_hangs_does_not_delay_the_end_of_the_program() -> None:
    began = time.monotonic()
    subprocess.run((sys.executable, "-c", HANGS), cwd=Path(__file__).parents[3], check=True, timeout=50)
    assert time.monotonic() - began < 30


def test_no_executor_is_left_in_the_launcher() -> None:
    """The interpreter joins the threads of an executor at exit."""
    files = [path for path in (Path(__file__).parents[3] / "launcher").rglob("*.py") if path.name != "background.py"]
    assert len(files) > 100
    assert not [path for path in files if "ThreadPoolExecutor" in path.read_text(encoding="utf-8")]
