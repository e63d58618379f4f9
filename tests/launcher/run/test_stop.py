"""A run has ended when its containers and processes are gone and its device memory is free."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from launcher.doctor.smi import NVIDIA_APPS_QUERY
from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.run.run_folder import WorkingNode
from launcher.run.stop import StopResult, end_run, state_of
from launcher.ssh.transport import Local, Result

NAME = "omnilaunch-r-n0"
ABSENT = "Error: No such object"
VERBS = {"inspect": ("docker", "inspect", NAME), "kill": ("docker", "kill", NAME), "rm": ("docker", "rm", "--force", NAME, f"{NAME}-data")}


class Engine(Local):
    """This machine with an engine that answers from a table; /proc is the real one. `gone_after`: looks until the container is gone."""

    def __init__(
        self, host: str, *, pids: str = "", apps: str = "", stays: bool = False, silent: bool = False, absent: str = ABSENT, gone_after: int = 0,
        refuses: str = "",
    ) -> None:  # fmt: skip
        super().__init__({"PATH": os.environ["PATH"]}, host)
        self.pids, self.apps, self.stays, self.silent, self.absent = pids, apps, stays, silent, absent
        self.asked: list[tuple[str, ...]] = []
        self.removed, self.looks, self.gone_after, self.refuses = False, 0, gone_after, refuses

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        self.asked.append(argv)
        if self.silent:
            raise NodeFailed(f"{self.host}: no route to host")
        answers: dict[tuple[str, ...], Callable[[], tuple[int, str, str]]] = {
            VERBS["inspect"]: self.inspect,
            ("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^({NAME}|{NAME}-data)$"): self.list,
            VERBS["kill"]: lambda: (0, NAME, ""),
            VERBS["rm"]: self.remove,
            ("docker", "top", NAME, "-eo", "pid"): lambda: (0, f"PID\n{self.pids}\n", ""),
            NVIDIA_APPS_QUERY: lambda: (0, self.apps, ""),
        }
        if argv not in answers:
            return super().run(argv, **options)
        code, output, errors = answers[argv]()
        return Result(argv=argv, code=code, output=output, errors=errors)

    def inspect(self) -> tuple[int, str, str]:
        return (1, "", f"{self.absent}: {NAME}") if self.removed else (0, "exited 0", "")

    def list(self) -> tuple[int, str, str]:
        self.looks += 1
        return 0, "" if self.removed and self.looks > self.gone_after else f"{NAME}\n", ""

    def remove(self) -> tuple[int, str, str]:
        self.removed = not self.stays
        return int(bool(self.refuses)), NAME, self.refuses


def node(engine: Engine) -> WorkingNode:
    command = NodeCommand(
        host=engine.host, node_rank=0, runtime="docker", name=NAME, folder="/r", environment={}, prepare=(), start=(),
        probe=VERBS["inspect"], stop=VERBS["kill"], remove=("docker", "rm", "--force", NAME),
    )  # fmt: skip
    return WorkingNode(command=command, transport=engine)


def end(*engines: Engine, accelerator: str = "cpu") -> tuple[StopResult, ...]:
    return end_run([node(engine) for engine in engines], accelerator=accelerator, grace_s=0)


@pytest.fixture
def dead_pid() -> str:
    process = subprocess.Popen((sys.executable, "-c", ""))
    process.wait()
    return str(process.pid)


def test_all_gone(dead_pid: str) -> None:
    engine = Engine("a", pids=dead_pid)
    assert end(engine) == (StopResult(host="a", left=""),)
    assert engine.asked.index(VERBS["kill"]) < engine.asked.index(VERBS["rm"]), "asked to save before it is removed"


def test_a_silent_node_is_reported_and_the_others_are_ended(dead_pid: str) -> None:
    there = Engine("a", pids=dead_pid)
    endings = end(Engine("dark", silent=True), there)
    assert "no route" in endings[0].left and endings[1].left == "" and there.removed


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Error: No such object", "no container"),  # docker's client up to 28
        ("error: no such object", "no container"),  # from 29 on
        ("Error response from daemon: No such container", "no container"),
        ("error during connect: dial tcp: lookup engine: no such host", None),
        ("dial unix /var/run/docker.sock: connect: no such file or directory", None),
    ],
)
def test_how_engines_report_a_missing_container(said: str, state: str | None, dead_pid: str) -> None:
    engine = Engine("a", pids=dead_pid, absent=said)
    engine.removed = True
    if state is None:
        with pytest.raises(NodeFailed, match="engine does not respond"):
            state_of(node(engine))
    else:
        assert state_of(node(engine)) == state
        assert end(engine) == (StopResult(host="a", left=""),), "a run that is gone is not reported as left"


def test_a_container_whose_removal_is_under_way(dead_pid: str) -> None:
    """By another client; docker rm returns before the container is gone."""
    engine = Engine("a", pids=dead_pid, gone_after=2)
    assert end(engine) == (StopResult(host="a", left=""),) and engine.looks == 3


def test_a_container_that_cannot_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.run.container.REMOVAL_S", 1.0)
    (ending,) = end(Engine("a", stays=True))
    assert "still there" in ending.left and f"docker rm --force {NAME}" in ending.left
    (ending,) = end(Engine("a", stays=True, refuses="Error response from daemon: permission denied"))
    assert ending.left.startswith(f"container {NAME} could not be removed: Error response from daemon: permission denied\n")


def test_a_process_that_still_runs() -> None:
    (ending,) = end(Engine("a", pids=str(os.getpid())))
    assert str(os.getpid()) in ending.left and "still run" in ending.left


def test_device_memory_that_is_still_held(dead_pid: str) -> None:
    apps = f"GPU-1, {dead_pid}, python, 20480\nGPU-1, 1, another, 10\n"
    (ending,) = end(Engine("a", pids=dead_pid, apps=apps), accelerator="cuda")
    assert "device memory" in ending.left and ending.left.endswith(dead_pid)
    (ending,) = end(Engine("a", pids=dead_pid, apps="GPU-1, 1, another, 10\n"), accelerator="cuda")
    assert ending.left == "", "the memory of another run is none of ours"


def test_without_the_device_tool_it_is_not_known_whether_memory_is_free(dead_pid: str) -> None:
    (ending,) = end(Engine("a", pids=dead_pid), accelerator="npu")
    assert "npu-smi" in ending.left
