"""The process of one node of a run: a child of the launcher, or a container on a node that may become unreachable.

A detached container runs on without the launcher. While its log can be followed it is alive; only when the log ends is the engine asked for its
state. So a running container costs one open channel and no commands. A node that does not respond is asked again for `node_timeout_s`.
"""

import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from launcher.errors import NodeFailed
from launcher.plan.commands import FOLDER_VARIABLE, PART_VARIABLE, NodeCommand, data_env_file, data_name, env_file
from launcher.run.ask_ranks import ask_child, ask_container
from launcher.run.container import NO_CONTAINER, container_state, remove_containers, remove_env_file, send_secrets, write_env_file
from launcher.ssh.background import in_background
from launcher.ssh.transport import Result, Running, Transport, kill_processes, processes_with

PROBE_INTERVAL_S = 0.5  # an inspect costs the engine about 20 ms
CHILD_POLL_S = 0.02
START_LIMIT_S = 300.0  # for an engine to start a container
START_POLL_S = 0.1
REAP_S = 2  # for a killed process to end
KILL_LIMIT_S = 5.0  # for a node to respond to the kill of its container; then it counts as lost
LOG_TIMEOUT_S = 60  # for the rest of the log of a container that ended while its log was not followed
KILLED = 128 + signal.SIGKILL
LOST = 255  # the exit code that stands for a node that stopped responding


class NodeProcess(Protocol):
    """`poll` returns the exit code, or None while the process runs; it never waits for a node. `stop` asks it to save and end, and returns
    whether it may have something to save; `kill` ends it, `clear` also removes what it leaves on the node. `stopping`: it ran when it was asked
    to stop. `killed`: it ran when it was killed."""

    command: NodeCommand
    lost: bool
    stopping: bool
    killed: bool

    def poll(self) -> int | None: ...
    def stop(self) -> bool: ...
    def kill(self) -> None: ...
    def clear(self) -> None: ...


class ChildNodeProcess:
    """torchrun (`part` "ranks"), or the data check ("data"), as a child of the launcher."""

    lost = stopping = killed = False

    def __init__(
        self,
        command: NodeCommand,
        argv: tuple[str, ...],
        transport: Transport,
        log: Path,
        folder: Path,
        *,
        secrets: Mapping[str, str],
        part: str = "ranks",
    ) -> None:
        self.command, self.part = command, f"{part} {command.environment[FOLDER_VARIABLE]}"
        environment = {**command.environment, **secrets, PART_VARIABLE: self.part}
        self.running: Running = transport.start(argv, log=log, environment=environment, folder=folder)

    def poll(self) -> int | None:
        return self.running.poll()

    def stop(self) -> bool:
        self.stopping = True
        return ask_child(self.command, self.running)

    def kill(self) -> None:
        self.killed = self.killed or self.poll() is None
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        deadline = time.monotonic() + REAP_S
        while (left := processes_with(PART_VARIABLE, self.part)) and time.monotonic() < deadline:
            kill_processes(left)  # again, since a killed process may have started another one just before
            time.sleep(CHILD_POLL_S)
        self.running.wait(REAP_S)


class CheckNodeProcess:
    """The data check in a container that docker removes when it ends. When its connection is lost it is started again. Its node counts as lost only
    after twice `node_timeout_s`: while the ranks run, how they end says more."""

    stopping = killed = False

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, *, node_timeout_s: float) -> None:
        self.command, self.transport, self.log = command, transport, log
        self.limit_s, self.silent_since, self.lost = 2 * node_timeout_s, 0.0, False
        self.env_file = data_env_file(command.folder, command.node_rank)
        self.restarting: Future[None] | None = None
        self.start()

    def start(self) -> None:
        write_env_file(self.command, self.transport, self.env_file)
        self.running: Running = self.transport.start(self.command.prepare, log=self.log)

    def restart(self) -> None:
        self.clear()
        self.start()

    def poll(self) -> int | None:
        if self.lost:
            return LOST
        if self.restarting is None:
            try:
                return self.running.poll()
            except NodeFailed:
                self.silent_since = self.silent_since or time.monotonic()
                self.lost = time.monotonic() - self.silent_since > self.limit_s
                self.restarting = in_background(self.restart)
        elif self.restarting.done():
            with suppress(NodeFailed):  # still unreachable: the next poll finds that out
                self.restarting.result()
                self.silent_since = 0.0
            self.restarting = None
        return None

    def stop(self) -> bool:
        self.stopping = True
        self.kill()
        return False

    def kill(self) -> None:
        self.killed = True
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        remove_containers(self.command, self.transport, data_name(self.command.name))
        remove_env_file(self.transport, self.env_file)
        with suppress(NodeFailed):  # its log was cut off
            self.running.wait(REAP_S)


class ContainerNodeProcess:
    """A detached container, started by this launcher or by an earlier one."""

    lost = stopping = killed = False

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, *, node_timeout_s: float) -> None:
        self.command, self.transport, self.log, self.node_timeout_s = command, transport, log, node_timeout_s
        self.logs: Running | None = None
        self.whole = False  # whether the log was followed to its end
        self.code: int | None = None
        self.answer: Future[int | None] | None = None
        self.asked_at, self.silent_since, self.kill_asked_at = 0.0, 0.0, 0.0

    def start(self, secrets: Mapping[str, str], given_up: Callable[[], bool] = lambda: False) -> None:
        """Raises NodeFailed, naming the node, when the container does not start, or when `given_up` becomes true before; the engine is then not
        asked to start it."""
        path = env_file(self.command.folder, self.command.node_rank)
        write_env_file(self.command, self.transport, path, waits_for=tuple(secrets))
        try:
            self.run_container(given_up)
        finally:
            remove_env_file(self.transport, path)
        if secrets:
            send_secrets(self.command, self.transport, secrets)
        self.follow()

    def run_container(self, given_up: Callable[[], bool]) -> None:
        what = f"{self.command.host}: starting container {self.command.name}"
        if given_up():
            raise NodeFailed(f"{what}: cancelled by a stop")
        output = self.log.with_name(f"start{self.command.node_rank}.log")
        running, deadline = self.transport.start(self.command.start, log=output), time.monotonic() + START_LIMIT_S
        while (code := running.wait(START_POLL_S)) is None:
            if given_up() or time.monotonic() > deadline:
                running.signal(signal.SIGKILL)
                running.wait(REAP_S)
                raise NodeFailed(
                    f"{what}: " + ("cancelled by a stop" if given_up() else f"docker did not return within {START_LIMIT_S:g} s")
                )
        text = output.read_text(encoding="utf-8", errors="replace")
        output.unlink()
        Result(argv=self.command.start, code=code, output="", errors=text).expect(what)

    def follow(self, since: str = "") -> Running:
        """Append the container's output to `log`, from the beginning or from the time `since`."""
        argv = (*self.command.logs[:-1], *(("--since", since) if since else ()), self.command.logs[-1])
        self.logs = logs = self.transport.start(argv, log=self.log)
        return logs

    def poll(self) -> int | None:
        """The engine is asked in the background, so that one node that stopped responding delays no other."""
        if self.code is None and self.kill_asked_at and time.monotonic() - self.kill_asked_at > KILL_LIMIT_S:
            self.code, self.lost = LOST, True
        if self.code is not None or self.is_followed():
            return self.code
        if self.answer is None:
            if time.monotonic() - self.asked_at >= PROBE_INTERVAL_S:
                self.asked_at = time.monotonic()
                self.answer = in_background(self.find_end)
        elif self.answer.done():
            answer, self.answer = self.answer, None
            try:
                self.code, self.silent_since = answer.result(), 0.0
            except NodeFailed:
                self.silent_since = self.silent_since or time.monotonic()
                if time.monotonic() - self.silent_since > self.node_timeout_s:
                    self.code, self.lost = LOST, True
        return self.code

    def is_followed(self) -> bool:
        if self.logs is None:
            return False
        try:
            ended = self.logs.poll() is not None
        except NodeFailed:  # the connection is lost, which says nothing about the container
            self.whole = False
            return False
        self.whole = ended
        return not ended

    def find_end(self) -> int | None:
        """The exit code, None while the container runs. The log of one that runs is followed again; that of one that ended is read to its end. A
        container that was removed has failed."""
        state = container_state(self.command, self.transport)
        code = end_code(state)
        if code is None:
            self.follow(since=self.silence())
        elif state != NO_CONTAINER and not self.whole:  # it ended while its log was not followed
            self.follow(since=self.silence()).wait(LOG_TIMEOUT_S)
        return code

    def silence(self) -> str:
        """How far back the log has to be read again, in docker's format: a second too much rather than too little."""
        if not self.log.exists():
            return ""
        return f"{max(1, int(time.time() - self.log.stat().st_mtime) + 1)}s"

    def stop(self) -> bool:
        self.stopping = True
        return ask_container(self.command, self.transport)

    def kill(self) -> None:
        """End and remove the container. One that has ended by itself since the last poll keeps its exit code. Raises NodeFailed when the node does
        not respond; it then counts as lost at once, since other ranks may have failed because of that before its time was over."""
        if self.code is None:
            self.kill_asked_at = time.monotonic()
            try:
                code = end_code(container_state(self.command, self.transport))
            except NodeFailed:
                self.code, self.lost = LOST, True
                raise
            if self.code is None or self.lost:  # `lost`: it responded after KILL_LIMIT_S
                self.lost, self.killed = False, code is None
                self.code = KILLED if code is None else code
        remove_containers(self.command, self.transport, self.command.name)

    def clear(self) -> None:
        """Remove the container. Raises NodeFailed when that cannot be made sure."""
        if self.code is None:
            self.kill()
        if self.logs is not None and not self.lost:
            with suppress(NodeFailed):  # a log that was cut off is no reason to leave the container
                self.logs.wait(REAP_S)  # for the last lines of a container that has ended
                self.unfollow()
        remove_containers(self.command, self.transport, self.command.name)

    def unfollow(self) -> None:
        """Raises NodeFailed."""
        if self.logs is not None:
            self.logs.signal(signal.SIGTERM)
            self.logs.wait(REAP_S)


def end_code(state: str) -> int | None:
    """The exit code in what `container_state` returned, None for a container that has not ended. One that was removed counts as killed."""
    if state == NO_CONTAINER:
        return KILLED
    status, code = state.split()
    return int(code) if status in ("exited", "dead") else None
