"""All nodes of a run as one: started together, watched together, stopped together. The first failure ends every member."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.errors import NodeFailed
from launcher.start import RUN_VARIABLE, NodeCommand, env_file_of
from launcher.transport import Running, Transport, kill_processes, processes_with

PROBE_INTERVAL_S = 0.5  # an inspect costs the engine about 20 ms
TICK_S = 0.1
REAP_S = 2  # for a process that was killed to be gone


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """How one node's part ended. `killed`: it did not end by itself within the grace time."""

    host: str
    node_rank: int
    code: int
    seconds: float
    killed: bool


class StopRequest:
    """How often the user, or something that went wrong, has asked the run to stop. The second time kills."""

    def __init__(self) -> None:
        self.count, self.reason = 0, ""

    def ask(self, reason: str) -> None:
        self.count += 1
        self.reason = self.reason or reason


class Member(Protocol):
    """One node's part of a run."""

    command: NodeCommand

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def clear(self) -> None: ...


class ProcessMember:
    """torchrun as a child of the launcher."""

    def __init__(self, command: NodeCommand, argv: tuple[str, ...], transport: Transport, log: Path, folder: Path) -> None:
        self.command = command
        self.running: Running = transport.start(argv, log=log, environment=command.environment, folder=folder)

    def poll(self) -> int | None:
        return self.running.poll()

    def stop(self) -> None:
        self.running.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        kill_processes(processes_with(RUN_VARIABLE, self.command.environment[RUN_VARIABLE]))
        self.running.wait(REAP_S)


class ContainerMember:
    """A detached container; `docker logs` is followed beside it and may be lost without harm."""

    def __init__(self, command: NodeCommand, transport: Transport, log: Path) -> None:
        self.command, self.transport = command, transport
        write_env_file(command)
        transport.run(command.start).expect(f"starting container {command.name} on {command.host}")
        self.logs: Running = transport.start(command.logs, log=log)
        self.probed_at, self.code = 0.0, None

    code: int | None

    def poll(self) -> int | None:
        if self.code is None and time.monotonic() - self.probed_at >= PROBE_INTERVAL_S:
            self.probed_at = time.monotonic()
            status, code = self.transport.run(self.command.probe).expect(f"asking for container {self.command.name}").output.split()
            self.code = int(code) if status in ("exited", "dead") else None
        return self.code

    def stop(self) -> None:
        self.transport.run(self.command.stop)  # a container that has just ended is no error

    def kill(self) -> None:
        self.code = self.code if self.code is not None else 128 + signal.SIGKILL
        self.transport.run(self.command.remove)

    def clear(self) -> None:
        if self.code is None:
            self.kill()
        self.logs.wait(REAP_S)  # the last lines of a container that has ended
        self.logs.signal(signal.SIGTERM)
        self.logs.wait(REAP_S)
        self.transport.run(self.command.remove)


class PrepareMember:
    """The data check of one node, in the same runtime as the run."""

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, folder: Path) -> None:
        self.command, self.transport = command, transport
        environment = command.environment
        if command.runtime == "docker":
            write_env_file(command)
            environment = {}
        self.running: Running = transport.start(command.prepare, log=log, environment=environment, folder=folder)

    def poll(self) -> int | None:
        return self.running.poll()

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        if self.command.runtime == "docker":
            self.transport.run(("docker", "rm", "--force", f"{self.command.name}-data"))
        else:
            kill_processes(processes_with(RUN_VARIABLE, self.command.environment[RUN_VARIABLE]))
        self.running.wait(REAP_S)


def start_members(commands: tuple[NodeCommand, ...], transport: Transport, folder: Path) -> tuple[Member, ...]:
    """Start every node or none: when one does not start, those that did are ended and the error goes on."""
    started: list[Member] = []
    try:
        for command in commands:
            log = node_log(command)
            member: Member = (
                ContainerMember(command, transport, log)
                if command.runtime == "docker"
                else ProcessMember(command, command.start, transport, log, folder)
            )
            started.append(member)
    except NodeFailed:
        for member in started:
            member.kill()
        raise
    return tuple(started)


def start_preparation(commands: tuple[NodeCommand, ...], transport: Transport, folder: Path) -> tuple[Member, ...]:
    return tuple(
        PrepareMember(command, transport, Path(command.folder) / "logs" / f"data{command.node_rank}.log", folder) for command in commands
    )


def watch(members: tuple[Member, ...], stop: StopRequest, tick: Callable[[], None], *, grace_s: float) -> tuple[NodeResult, ...]:
    """Until every member has ended. One that fails, or a request to stop, stops all; `grace_s` later, or at a second request,
    they are killed. Whatever happens here, nothing of the run is left behind."""
    started, asked_at, killed = time.monotonic(), 0.0, False
    ended: dict[int, float] = {}
    try:
        while True:
            codes = [member.poll() for member in members]
            tick()
            for rank, code in enumerate(codes):
                if code is not None:
                    ended.setdefault(rank, time.monotonic() - started)
            if None not in codes:
                break
            now = time.monotonic()
            if not asked_at and (stop.count or any(codes)):
                asked_at = now
                for member, code in zip(members, codes, strict=True):
                    if code is None:
                        member.stop()
            if asked_at and not killed and (stop.count > 1 or now - asked_at > grace_s):
                killed = True
                for member, code in zip(members, codes, strict=True):
                    if code is None:
                        member.kill()
            time.sleep(TICK_S)
    finally:
        for member in members:
            member.clear()
    return tuple(
        NodeResult(
            host=member.command.host,
            node_rank=member.command.node_rank,
            code=member.poll() or 0,
            seconds=round(ended[rank], 3),
            killed=killed,
        )
        for rank, member in enumerate(members)
    )


def node_log(command: NodeCommand) -> Path:
    """Everything that the node's ranks print, whole."""
    return Path(command.folder) / "logs" / f"node{command.node_rank}.log"


def write_env_file(command: NodeCommand) -> None:
    """`KEY=value` lines as `docker run --env-file` reads them: no quotes, the rest of the line is the value. Mode 0600."""
    path = env_file_of(command)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in command.environment.items())
