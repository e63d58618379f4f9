"""How a container ended, as its node reports it or does not."""

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.run.gang import clear_and_report
from launcher.run.node_process import LOST, CheckNodeProcess, ContainerNodeProcess
from launcher.run.signals import StopRequest
from launcher.ssh.transport import Local, LocalProcess, Result


class Node(Local):
    """Answers every command with success, unless it is `silent`. `state`: of its container, as docker inspect prints it."""

    def __init__(self, *, silent: bool, state: str = "exited 5") -> None:
        super().__init__({}, "node")
        self.silent, self.state = silent, state

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        if self.silent:
            raise NodeFailed("node: no answer")
        return Result(argv=argv, code=0, output=self.state, errors="")


def container(tmp_path: Path, *, silent: bool, state: str = "exited 5") -> ContainerNodeProcess:
    command = NodeCommand(
        host="node", node_rank=0, runtime="docker", name="run-n0", folder=str(tmp_path), environment={}, prepare=(), start=(),
        remove=("docker", "rm", "--force", "run-n0"),
    )  # fmt: skip
    return ContainerNodeProcess(command, Node(silent=silent, state=state), tmp_path / "node0.log", node_timeout_s=20)


def test_a_node_that_responds_is_not_lost_when_its_container_is_killed(tmp_path: Path) -> None:
    running = container(tmp_path, silent=False, state="running 0")
    running.kill()
    assert (running.code, running.lost, running.killed) == (137, False, True)


@pytest.mark.parametrize("code", [0, 5, 137, 143])
def test_a_container_that_had_ended_by_itself_when_it_is_to_be_killed_keeps_its_code(tmp_path: Path, code: int) -> None:
    """It was not polled since. Its code says why the run failed."""
    ended = container(tmp_path, silent=False, state=f"exited {code}")
    ended.kill()
    assert (ended.code, ended.lost, ended.killed) == (code, False, False)


def test_a_node_that_does_not_respond_to_the_kill_is_lost(tmp_path: Path) -> None:
    """The other nodes failed at once because of its connections; it is the cause, although node_timeout_s is not over."""
    killed = container(tmp_path, silent=True)
    with pytest.raises(NodeFailed):
        killed.kill()
    assert (killed.code, killed.lost) == (LOST, True)


def test_a_container_that_had_ended_before_its_node_became_silent_keeps_its_code(tmp_path: Path) -> None:
    killed = container(tmp_path, silent=True)
    killed.code = 5
    with pytest.raises(NodeFailed):
        killed.kill()
    assert (killed.code, killed.lost) == (5, False)


def test_a_node_that_responds_late_to_the_kill_counts_as_lost_only_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.run.node_process.KILL_LIMIT_S", 0.1)
    killed, responds = container(tmp_path, silent=False), threading.Event()

    class Late(Node):
        def run(self, argv: tuple[str, ...], **options: Any) -> Result:
            responds.wait(20)
            return super().run(argv, **options)

    killed.transport = Late(silent=False, state="exited 5")
    thread = threading.Thread(target=killed.kill)
    thread.start()
    deadline = time.monotonic() + 20
    while killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (killed.code, killed.lost) == (LOST, True)
    responds.set()
    thread.join(20)
    assert (killed.code, killed.lost, killed.killed) == (5, False, False)


class Cut:
    """A followed log whose connection was lost."""

    pid = 1

    def poll(self) -> int | None:
        raise NodeFailed("node: lost the connection")

    def wait(self, timeout_s: float) -> int | None:
        raise NodeFailed("node: lost the connection")

    def signal(self, number: signal.Signals) -> None:
        raise NodeFailed("node: lost the connection")


def test_the_rest_of_a_log_is_read_when_the_container_ended_while_the_connection_was_lost(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    class Telling(Node):
        def run(self, argv: tuple[str, ...], **options: Any) -> Result:
            asked.append(argv)
            return super().run(argv, **options)

        def start(self, argv: tuple[str, ...], *, log: Path, **_: Any) -> LocalProcess:
            asked.append(argv)
            return Local({"PATH": "/usr/bin:/bin"}).start(("echo", "its last words"), log=log)

    ended = container(tmp_path, silent=False)
    ended.transport, ended.logs = Telling(silent=False), Cut()
    ended.command = replace(ended.command, logs=("docker", "logs", "--follow", "run-n0"))
    deadline = time.monotonic() + 20
    while ended.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.clear()
    assert ended.code == 5 and (tmp_path / "node0.log").read_text(encoding="utf-8") == "its last words\n"
    assert asked[-1] == ("docker", "rm", "--force", "run-n0")


class Away(Node):
    """Its commands are lost with their connection; while it is silent it cannot be asked."""

    def start(self, argv: tuple[str, ...], *, log: Path, **_: Any) -> Any:
        return Cut()

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        if self.silent:
            raise NodeFailed("node: no answer")


def polled(check: CheckNodeProcess, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while (code := check.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return code


def test_a_data_check_whose_node_stays_silent_is_not_waited_for_forever(tmp_path: Path) -> None:
    """A run that was faster than its check waits only for that."""
    command, node = container(tmp_path, silent=False).command, Away(silent=False)
    check = CheckNodeProcess(command, node, tmp_path / "data0.log", node_timeout_s=0.2)
    node.silent = True
    assert polled(check, 5) == LOST and check.lost


def test_a_data_check_is_started_again_on_a_node_that_responds_in_time(tmp_path: Path) -> None:
    command, node = container(tmp_path, silent=False).command, Away(silent=False)
    check = CheckNodeProcess(command, node, tmp_path / "data0.log", node_timeout_s=0.2)
    node.silent = True
    assert polled(check, 0.3) is None and check.silent_since
    node.silent = False
    node.start = lambda argv, *, log, **_: Local({"PATH": "/usr/bin:/bin"}).start(("true",), log=log)  # type: ignore[method-assign]
    assert polled(check, 5) == 0 and not check.lost


def test_a_bug_in_the_thread_that_restarts_a_check_is_raised(tmp_path: Path) -> None:
    command, node = container(tmp_path, silent=False).command, Away(silent=False)
    check = CheckNodeProcess(command, node, tmp_path / "data0.log", node_timeout_s=20)

    def broken(*_: object, **__: object) -> None:
        raise OSError("no room for the log")

    node.start = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="no room"):
        polled(check, 2)


class Holding(Node):
    """An engine that does not remove its containers, and says why."""

    SAID = "Error response from daemon: could not kill: tried to kill container, but did not receive an exit event"

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        if argv[:2] == ("docker", "rm"):
            return Result(argv=argv, code=1, output="", errors=f"{self.SAID}\n")
        if argv[:2] == ("docker", "ps"):
            return Result(argv=argv, code=0, output="run-n0\nrun-n0-data\n", errors="")
        return super().run(argv, **options)


@pytest.mark.parametrize("state", ["running 0", "exited 5"])
@pytest.mark.parametrize("end", ["kill", "clear"])
def test_a_container_that_stays_is_reported_with_what_docker_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, end: str
) -> None:
    monkeypatch.setattr("launcher.run.container.REMOVAL_S", 0.2)
    stays = container(tmp_path, silent=False)
    stays.transport = Holding(silent=False, state=state)
    with pytest.raises(NodeFailed) as caught:
        getattr(stays, end)()
    first, following = str(caught.value).split("\n")
    assert first == f"node: container run-n0 could not be removed: {Holding.SAID}"
    assert following == "  Next: ssh node docker rm --force run-n0" and not stays.lost


def test_a_data_check_that_stays_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.run.container.REMOVAL_S", 0.2)
    node = Away(silent=False)
    check = CheckNodeProcess(container(tmp_path, silent=False).command, node, tmp_path / "data0.log", node_timeout_s=20)
    check.transport = Holding(silent=False)
    with pytest.raises(NodeFailed, match=f"node: container run-n0-data could not be removed: {Holding.SAID}"):
        check.clear()


def test_what_could_not_be_cleared_is_printed() -> None:
    class Staying:
        def clear(self) -> None:
            raise NodeFailed("node: container run-n0-data could not be removed: device busy")

    printed: list[str] = []
    clear_and_report([Staying()], StopRequest(), printed.append)  # type: ignore[list-item]
    assert printed == ["not cleared: node: container run-n0-data could not be removed: device busy"]


def test_a_container_that_another_client_removes_is_waited_for(tmp_path: Path) -> None:
    class Removing(Holding):
        SAID = "Error response from daemon: removal of container run-n0 is already in progress"
        looks = 0

        def run(self, argv: tuple[str, ...], **options: Any) -> Result:
            if argv[:2] == ("docker", "ps"):
                self.looks += 1
                return Result(argv=argv, code=0, output="run-n0\n" if self.looks < 3 else "", errors="")
            return super().run(argv, **options)

    ended = container(tmp_path, silent=False)
    ended.transport = removing = Removing(silent=False, state="running 0")
    ended.clear()
    assert removing.looks == 4 and ended.code == 137
