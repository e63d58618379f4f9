"""One launcher at a time, and a stop that every launcher of the folder sees."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.record.lock import ask_to_stop, claim, is_asked_to_stop, is_claimed

HOLD = "import sys, time; from pathlib import Path; from launcher.record.lock import claim\nwith claim(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_launcher_is_told_who_has_it(tmp_path: Path) -> None:
    with subprocess.Popen((sys.executable, "-c", HOLD, str(tmp_path)), stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert is_claimed(tmp_path)
            with pytest.raises(ConfigRefused, match=rf"process {holder.pid} on .*omnilaunch stop {tmp_path.name}"), claim(tmp_path):
                raise AssertionError
        finally:
            holder.send_signal(signal.SIGKILL)
    assert not is_claimed(tmp_path), "the kernel gives it back, whatever ended the launcher"
    with claim(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "launcher.lock").read_text(encoding="utf-8")


def test_a_stop_is_seen(tmp_path: Path) -> None:
    assert not is_asked_to_stop(tmp_path)
    ask_to_stop(tmp_path, datetime.now(UTC))
    assert is_asked_to_stop(tmp_path)
