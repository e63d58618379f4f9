"""All nodes of a run together, with real processes: which end by themselves, which are ended, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import NodeFailed
from launcher.plan.commands import FOLDER_VARIABLE, NodeCommand
from launcher.record.record import NodeResult
from launcher.run.gang import StartContext, StopRequest, start_checks, start_trainers, watch
from launcher.ssh.transport import Local, Result, processes_with

ENVIRON = {"PATH": "/usr/bin:/bin"}
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
# torchrun gives each rank a session of its own: a group kill does not reach it.
WITH_CHILD = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session=True); time.sleep(60)"


def command(folder: Path, rank: int, code: str, program: str = sys.executable) -> NodeCommand:
    (folder / "logs").mkdir(exist_ok=True)
    return NodeCommand(
        host=f"host{rank}",
        node_rank=rank,
        runtime="process",
        name=f"run-n{rank}",
        folder=str(folder),
        environment={FOLDER_VARIABLE: str(folder)},
        prepare=(),
        start=(program, "-c", code),
    )


def context(folder: Path, nodes: int) -> StartContext:
    return StartContext(transports=(Local(ENVIRON),) * nodes, logs=folder / "logs", project=folder, secrets={}, node_timeout_s=5)


def run(
    folder: Path, *codes: str, stop: StopRequest | None = None, grace_s: float = 0.5, tick: object = lambda: None
) -> tuple[NodeResult, ...]:
    members = start_trainers(
        tuple(command(folder, rank, code) for rank, code in enumerate(codes)), context(folder, len(codes)), StopRequest()
    )
    return watch(members, stop or StopRequest(), tick, grace_s=lambda: grace_s)  # type: ignore[arg-type]


def test_all_finish(tmp_path: Path) -> None:
    results = run(tmp_path, "print('one')", "print('two')")
    assert [(r.host, r.code, r.killed) for r in results] == [("host0", 0, False), ("host1", 0, False)]
    assert (tmp_path / "logs/node1.log").read_text() == "two\n"


def test_first_failure_stops_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    results = run(tmp_path, "import time; time.sleep(60)", "import sys; sys.exit(5)")
    assert results[1].code == 5 and results[0].code == -15
    assert time.monotonic() - started < 10


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    stop = StopRequest()

    def tick() -> None:
        if not stop.count and all("deaf" in (tmp_path / f"logs/node{rank}.log").read_text() for rank in (0, 1)):
            stop.ask("SIGINT")

    results = run(tmp_path, DEAF, WITH_CHILD, stop=stop, tick=tick)
    assert results[0].killed
    assert processes_with(FOLDER_VARIABLE, str(tmp_path)) == ()


def test_a_second_request_kills_at_once(tmp_path: Path) -> None:
    stop = StopRequest()

    def tick() -> None:
        if stop.count or "deaf" in (tmp_path / "logs/node0.log").read_text():
            stop.ask("SIGINT")

    started = time.monotonic()
    results = run(tmp_path, DEAF, stop=stop, grace_s=60, tick=tick)
    assert results[0].killed and time.monotonic() - started < 20


def test_a_child_of_a_rank_that_ended_is_ended_too(tmp_path: Path) -> None:
    left = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session=True)"
    assert run(tmp_path, left)[0].code == 0
    assert processes_with(FOLDER_VARIABLE, str(tmp_path)) == ()


def test_the_end_of_the_ranks_does_not_end_the_data_check(tmp_path: Path) -> None:
    """A short run on a large data set: its check goes on for minutes after its last step."""
    checked = replace(command(tmp_path, 0, ""), prepare=(sys.executable, "-c", "import time; time.sleep(60)"))
    (check,) = start_checks((checked,), context(tmp_path, 1), StopRequest())
    assert run(tmp_path, "print('done')")[0].code == 0
    assert check.poll() is None
    check.kill()
    assert check.poll() == -9 and processes_with(FOLDER_VARIABLE, str(tmp_path)) == ()


def test_all_start_or_none(tmp_path: Path) -> None:
    commands = (command(tmp_path, 0, "import time; time.sleep(60)"), command(tmp_path, 1, "", program="/no/such/program"))
    with pytest.raises(NodeFailed, match="/no/such/program"):
        start_trainers(commands, context(tmp_path, len(commands)), StopRequest())
    assert processes_with(FOLDER_VARIABLE, str(tmp_path)) == ()


def test_nothing_is_left_after_an_error_of_the_launcher(tmp_path: Path) -> None:
    def tick() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        run(tmp_path, DEAF, tick=tick)
    assert processes_with(FOLDER_VARIABLE, str(tmp_path)) == ()


class Silent(Local):
    """Starts nothing, and then stops responding."""

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        raise NodeFailed("silent: no room")

    def run(self, argv: tuple[str, ...], **_: Any) -> Result:
        raise NodeFailed("silent: no answer\n  Next: ssh silent true")


def test_a_node_that_a_failed_start_could_not_clear_is_named(tmp_path: Path) -> None:
    """Its engine has the command to start the container, and may still do it."""
    containers = tuple(replace(command(tmp_path, rank, ""), runtime="docker") for rank in range(1))
    with pytest.raises(
        NodeFailed, match=r"no room\n  not cleared: host0: silent: no answer; when it responds: ssh host0 docker rm --force run-n0$"
    ):
        start_trainers(containers, replace(context(tmp_path, 1), transports=(Silent(ENVIRON),)), StopRequest())


class Scripted:
    """A node process that ends by itself with `code` after `seconds` (None: never), with `after_stop` when it is asked to stop (None: it
    ignores that), and with 137 when it is killed."""

    lost = False

    def __init__(self, folder: Path, rank: int, code: int | None, *, seconds: float = 0.0, after_stop: int | None = None) -> None:
        self.command, self.code, self.after_stop = command(folder, rank, ""), code, after_stop
        self.ends_at, self.killed, self.stopping = time.monotonic() + seconds, False, False

    def poll(self) -> int | None:
        if self.killed:
            return 137
        if self.stopping and self.after_stop is not None:
            return self.after_stop
        return self.code if self.code is not None and time.monotonic() >= self.ends_at else None

    def stop(self) -> bool:
        self.stopping = True
        return True

    def kill(self) -> None:
        self.killed = self.killed or self.poll() is None

    clear = kill


@pytest.mark.parametrize(
    ("first", "second", "codes", "killed"),
    [
        ((137, 0.0, None), (None, 0.0, None), (137, 137), (False, True)),
        ((143, 0.0, None), (None, 0.0, None), (143, 137), (False, True)),
        ((5, 0.0, None), (None, 0.0, 0), (5, 0), (False, False)),
        ((5, 0.0, None), (None, 0.0, 137), (5, 137), (False, False)),
    ],
    ids=["ended with 137", "ended with 143", "exit 0 after the stop", "killed by the kernel during the stop"],
)
def test_only_a_node_that_had_to_be_killed_is_recorded_as_killed(
    tmp_path: Path,
    first: tuple[int | None, float, int | None],
    second: tuple[int | None, float, int | None],
    codes: tuple[int, int],
    killed: tuple[bool, bool],
) -> None:
    """The exit code of the others says why the run failed. A third node ignores the stop, so that something is killed each time."""
    given = (*(first, second), (None, 0.0, None))
    processes = [Scripted(tmp_path, rank, code, seconds=s, after_stop=after) for rank, (code, s, after) in enumerate(given)]
    results = watch(tuple(processes), StopRequest(), lambda: None, grace_s=lambda: 0.3)
    assert [(result.code, result.killed) for result in results] == [*zip(codes, killed, strict=True), (137, True)]


# A container whose log has ended on a node that stopped responding: its engine is asked, and never answers.
SILENT = """
import sys, threading, time
from pathlib import Path
from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.run.gang import clear_all, watch
from launcher.run.node_process import CheckNodeProcess, ContainerNodeProcess
from launcher.run.signals import catch_stops
from launcher.ssh.transport import Local

class Silent(Local):
    def run(self, *given, **named):
        print("asked", flush=True)
        threading.Event().wait(60)

class Lost:
    pid = 1
    def poll(self):
        raise NodeFailed("lost the connection")
    signal = wait = lambda self, *given: self.poll()

class Follows(Silent):
    def put(self, *given, **named):
        pass
    def start(self, *given, **named):
        return Lost()

folder = Path(sys.argv[1])
command = NodeCommand(host="a", node_rank=0, runtime="docker", name="c", folder=str(folder), environment={}, prepare=(), start=())
if sys.argv[2] == "ranks":
    process = ContainerNodeProcess(command, Silent({}), folder / "node0.log", node_timeout_s=600)
else:
    process = CheckNodeProcess(command, Follows({}), folder / "data0.log", node_timeout_s=600)
with catch_stops() as stop:
    if sys.argv[2] == "ranks":
        watch((process,), stop, lambda: None, grace_s=lambda: 600)
    else:
        while stop.count < 2:
            process.poll()
            time.sleep(0.1)
        clear_all((process,), stop)
print("ended", flush=True)
"""


@pytest.mark.parametrize("kind", ["ranks", "check"])
def test_a_silent_node_does_not_hold_up_the_end_after_two_interrupts(tmp_path: Path, kind: str) -> None:
    argv = (sys.executable, "-c", SILENT, str(tmp_path), kind)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    output, _ = process.communicate(timeout=120)
    assert output.endswith("ended\n") and process.returncode == 0
    assert time.monotonic() - began < 25, "a command may take 60 s"
