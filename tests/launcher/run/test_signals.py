"""Ctrl-C at every moment of a launch: nothing that was started is left, and no wait is long."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.run.prepare import start_all
from launcher.run.session import Session
from launcher.run.signals import Stopped, StopRequest, catch_stops, handler_for
from launcher.ssh.parallel import UNANSWERED, after, attempt_each
from launcher.ssh.transport import Local
from tests.launcher.fake_nodes import CPU, HOSTS, PlanFor

# An engine that takes its time where there is a file `slow`: a start, and then a removal too where there is `stuck`.
DOCKER = """#!/bin/sh
echo "$*" >>"$HOME/commands"
case "$1" in
  run) [ ! -f "$HOME/slow" ] || exec sleep 60; [ "$2" = --detach ] && echo "$4" >>"$HOME/up" ;;
  rm) [ ! -f "$HOME/stuck" ] || exec sleep 6; : >"$HOME/up" ;;
  ps) cat "$HOME/up" ;;
  logs) exec sleep 60 ;;
  inspect) echo running 0 ;;
esac
"""


class Machine(Local):
    def __init__(self, folder: Path, programs: Path, *files: str) -> None:
        folder.mkdir()
        for name in ("up", "commands", *files):
            (folder / name).touch()
        super().__init__({"HOME": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}, folder.name)
        self.folder = folder

    def commands(self, *words: str) -> list[str]:
        return [line for line in (self.folder / "commands").read_text().splitlines() if line.startswith(words)]


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    return lambda name, *files: Machine(tmp_path / name, programs, *files)


def start(plan_for: PlanFor, tmp_path: Path, machines: tuple[Machine, ...], stop: StopRequest) -> list[str]:
    """What is printed when two nodes start and a stop is requested meanwhile."""
    made, said = plan_for(*CPU), list[str]()
    output = str(tmp_path / "remote" / "r")
    plan = replace(
        made,
        folder=str(tmp_path / "mine"),
        commands=tuple(replace(command, folder=output) for command in made.commands),
    )
    (tmp_path / "mine/logs").mkdir(parents=True)
    (tmp_path / "remote").mkdir()
    session = Session(
        project=tmp_path, transports=machines, here=machines[0], secrets={}, say=said.append, terminal=False,
        move=lambda plan, lost: pytest.fail("nothing moves"),
    )  # fmt: skip
    with pytest.raises(Stopped):
        start_all(plan, session, stop)
    return said


def ask_when(condition: Callable[[], bool], stop: StopRequest, times: int = 1) -> None:
    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        for _ in range(times):
            stop.ask("SIGINT")
            time.sleep(0.5)

    threading.Thread(target=wait, daemon=True).start()


def test_a_stop_while_one_node_is_slow_to_start_ends_what_did_start(
    plan_for: PlanFor, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    fast, slow, stop = machine("fast"), machine("slow", "slow"), StopRequest()
    ask_when(lambda: bool((fast.folder / "up").read_text()) and bool(slow.commands("run")), stop)
    began = time.monotonic()
    assert start(plan_for, tmp_path, (fast, slow), stop) == []
    assert time.monotonic() - began < 8
    assert (fast.folder / "up").read_text() == "" and fast.commands("rm") and slow.commands("rm")
    assert not list((tmp_path / "remote").glob("*.env")), "no file with the environment is left"


def test_a_node_whose_engine_does_not_remove_the_container_is_named(
    plan_for: PlanFor, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    fast, stuck, stop = machine("fast"), machine("other", "slow", "stuck"), StopRequest()
    ask_when(lambda: bool(stuck.commands("run")), stop, times=2)
    began = time.monotonic()
    (line,) = start(plan_for, tmp_path, (fast, stuck), stop)
    assert time.monotonic() - began < 6, "asked twice, it does not wait for the rest"
    assert f"not cleared: {HOSTS[1]}" in line and UNANSWERED in line and "omnilaunch stop" in line
    assert (fast.folder / "up").read_text() == ""


def test_a_stop_before_the_start_starts_nothing(plan_for: PlanFor, tmp_path: Path, machine: Callable[..., Machine]) -> None:
    machines, stop = (machine("one"), machine("two")), StopRequest()
    stop.ask("SIGINT")
    start(plan_for, tmp_path, machines, stop)
    assert not any(one.commands("run") for one in machines)


def test_a_signal_between_two_phases_of_a_launch_is_not_lost() -> None:
    with catch_stops() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.count, stop.reason) == (1, "SIGTERM")
        with pytest.raises(Stopped), stop.interrupting():
            pytest.fail("it was asked to stop before")
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.count, stop.interrupts) == (2, False)


def test_a_signal_interrupts_at_once_when_there_is_nothing_to_save() -> None:
    began = time.monotonic()
    with catch_stops() as stop, pytest.raises(Stopped), stop.interrupting():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    assert time.monotonic() - began < 5


def test_the_default_action_of_a_signal_can_be_restored_meanwhile() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with catch_stops():
        mine = signal.getsignal(signal.SIGHUP)
        with handler_for((signal.SIGHUP,), signal.SIG_DFL):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == mine
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_call_that_hangs_is_not_waited_for() -> None:
    over = threading.Event()
    began = time.monotonic()
    answers = attempt_each(lambda item: over.wait(30) if item else "well", [0, 1], until=after(0.3))
    over.set()
    assert answers[0] == "well" and isinstance(answers[1], NodeFailed) and time.monotonic() - began < 5


def test_a_terminal_that_is_closed_after_ctrl_c_is_no_second_request() -> None:
    with catch_stops() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.count == 1, "the run is being saved"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.count == 2


def test_ctrl_c_is_heard_where_a_script_started_the_launcher_in_the_background() -> None:
    """A shell without job control starts it with SIGINT ignored; SIGHUP stays ignored, as nohup asks for."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        with catch_stops() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.count == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.count == 1
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
