"""A stop reaches the ranks themselves: torchrun would kill them 30 s after its own signal, and a large state takes longer to write."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import NodeFailed
from launcher.plan.commands import FOLDER_VARIABLE, TORCHRUN, NodeCommand
from launcher.run.ask_ranks import NO_RANKS, SCRIPT, ask_container, ask_orphans, may_save
from launcher.run.gang import start_children, watch
from launcher.run.signals import StopRequest
from launcher.ssh.transport import Local, Result, processes_with
from tests.launcher.run.test_gang import context

# A rank that takes a second to save, and a torchrun that kills it at once when it is asked to end.
RANK = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""
RUN = f"""
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), sys.exit(1)))
sys.exit(rank.wait())
"""
ALONE = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(60)"


def torchrun(folder: Path, code: str) -> NodeCommand:
    return NodeCommand(
        host="here", node_rank=0, runtime="process", name="run-n0", folder=str(folder), environment={FOLDER_VARIABLE: str(folder)},
        prepare=(), start=(sys.executable, "-c", code, TORCHRUN),
    )  # fmt: skip


def stopping(folder: Path, stop: StopRequest) -> Callable[[], None]:
    def tick() -> None:
        if not stop.count and (folder / "ready").exists():
            stop.ask("SIGINT")

    return tick


def test_a_rank_has_the_time_that_the_launcher_gives_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    stop = StopRequest()
    processes = start_children((torchrun(tmp_path, RUN),), context(tmp_path, 1))
    (result,) = watch(processes, stop, stopping(tmp_path, stop), grace_s=lambda: 30.0)
    assert (tmp_path / "saved").exists() and (result.code, result.killed) == (0, False)


def test_torchrun_without_ranks_is_not_waited_for(tmp_path: Path) -> None:
    """There is nothing to save."""
    (tmp_path / "logs").mkdir()
    stop = StopRequest()
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {ALONE}"
    began = time.monotonic()
    (result,) = watch(
        start_children((torchrun(tmp_path, deaf),), context(tmp_path, 1)), stop, stopping(tmp_path, stop), grace_s=lambda: 600.0
    )
    assert result.killed and time.monotonic() - began < 60


def test_ranks_without_a_launcher_are_asked_too(tmp_path: Path) -> None:
    assert not ask_orphans(str(tmp_path)), "there are none"
    with subprocess.Popen(
        (sys.executable, "-c", RUN, TORCHRUN), cwd=tmp_path, env={**os.environ, FOLDER_VARIABLE: str(tmp_path)}, start_new_session=True
    ) as run:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        assert len(processes_with(FOLDER_VARIABLE, str(tmp_path))) == 2
        assert ask_orphans(str(tmp_path))
        assert run.wait(30) == 0 and (tmp_path / "saved").exists()


class Engine(Local):
    """Ends a script in the container with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__({}, "node")
        self.code, self.ran = code, list[tuple[str, ...]]()

    def run(self, argv: tuple[str, ...], **_: Any) -> Result:
        self.ran.append(argv)
        return Result(argv=argv, code=0, output="", errors="")

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        self.ran.append(argv)
        assert b"".join(chunks) == SCRIPT.read_bytes()
        return Result(argv=argv, code=self.code, output="", errors="")


@pytest.mark.parametrize(
    ("code", "stopped", "saves"), [(0, False, True), (NO_RANKS, True, False), (1, True, True)], ids=("asked", "no ranks", "no container")
)
def test_a_container_is_asked_by_its_ranks(tmp_path: Path, code: int, stopped: bool, saves: bool) -> None:
    engine, command = Engine(code), torchrun(tmp_path, RUN)
    assert ask_container(command, engine) == saves
    assert engine.ran[0][:3] == ("docker", "exec", "--interactive") and (command.stop in engine.ran) == stopped


def test_a_node_that_does_not_answer_may_have_something_to_save() -> None:
    assert may_save([False, NodeFailed("no answer")]) and may_save([False, True]) and not may_save([False, False])


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs a namespace of processes")
def test_the_script_asks_the_children_of_the_first_process(tmp_path: Path) -> None:
    """As in a container: the first process, its rank, and a child of the rank, which is left alone."""
    child = "import pathlib, signal, time; signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('wrong').touch()); time.sleep(1.5)"
    rank = f"""
import pathlib, signal, subprocess, sys
helper = subprocess.Popen([sys.executable, "-c", {child!r}])
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("asked").touch())
pathlib.Path("ready").touch()
helper.wait()
"""
    first = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True); sys.exit(p.wait())"
    own = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
    if subprocess.run((*own, "true"), capture_output=True).returncode:
        pytest.skip("this machine allows no namespace of processes")
    with subprocess.Popen((*own, sys.executable, "-c", first), cwd=tmp_path) as run:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        (inside,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        enter = ("nsenter", "--target", inside, "--pid", "--mount", "sh", "-s")
        assert subprocess.run(enter, input=SCRIPT.read_bytes()).returncode == 0
        assert run.wait(30) == 0
    assert (tmp_path / "asked").exists() and not (tmp_path / "wrong").exists()
