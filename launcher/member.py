"""One node's part of a run: a child process of the launcher, or a detached container on a node that may go away.

A container needs nobody: while its log can be followed it is alive, and only when the log ends is the engine asked why. So a member
that runs costs one open channel and no commands. A node that does not answer is asked again until `node_timeout_s` is over.
"""

import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from launcher.errors import NodeFailed
from launcher.start import FOLDER_VARIABLE, NodeCommand, env_file_of
from launcher.transport import Running, Transport, kill_processes, processes_with

PROBE_INTERVAL_S = 0.5  # an inspect costs the engine about 20 ms
REAP_S = 2  # for a process that was killed to be gone
LOST = 255  # exit code of a node that does not answer any more


class Member(Protocol):
    """`poll` gives the exit code or None and never waits for a node. `lost`: the node did not answer until the end of its time."""

    command: NodeCommand
    lost: bool

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def clear(self) -> None: ...


class ProcessMember:
    """torchrun, or the data check, as a child of the launcher."""

    lost = False

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
        kill_processes(processes_with(FOLDER_VARIABLE, self.command.environment[FOLDER_VARIABLE]))
        self.running.wait(REAP_S)


class CheckMember:
    """The data check in a container that is followed and removed by itself."""

    lost = False

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, secrets: Mapping[str, str]) -> None:
        self.command, self.transport = command, transport
        write_env_file(command, transport, secrets)
        self.running: Running = transport.start(command.prepare, log=log)

    def poll(self) -> int | None:
        return self.running.poll()

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        self.transport.run(("docker", "rm", "--force", f"{self.command.name}-data"))
        remove_env_file(self.command, self.transport)
        self.running.wait(REAP_S)


class ContainerMember:
    """A detached container. `attached` takes one up again that is there already."""

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, asker: ThreadPoolExecutor, *, node_timeout_s: float) -> None:
        self.command, self.transport, self.log, self.asker, self.node_timeout_s = command, transport, log, asker, node_timeout_s
        self.logs: Running | None = None
        self.code: int | None = None
        self.lost = False
        self.answer: Future[int | None] | None = None
        self.asked_at, self.silent_since = 0.0, 0.0

    def start(self, secrets: Mapping[str, str]) -> None:
        """Raises NodeFailed, naming the node, when the container does not start."""
        write_env_file(self.command, self.transport, secrets)
        try:
            self.transport.run(self.command.start, timeout_s=300).expect(f"starting container {self.command.name} on {self.command.host}")
        finally:
            remove_env_file(self.command, self.transport)
        self.follow()

    def follow(self, since: str = "") -> None:
        """Append the container's output to `log`, from the beginning or from the time `since`."""
        argv = (*self.command.logs[:-1], *(("--since", since) if since else ()), self.command.logs[-1])
        self.logs = self.transport.start(argv, log=self.log)

    def poll(self) -> int | None:
        """A future does the asking, so that a node that is gone holds up no other."""
        if self.code is not None or self.followed():
            return self.code
        if self.answer is None:
            if time.monotonic() - self.asked_at >= PROBE_INTERVAL_S:
                self.asked_at = time.monotonic()
                self.answer = self.asker.submit(self.ask)
        elif self.answer.done():
            answer, self.answer = self.answer, None
            try:
                self.code, self.silent_since = answer.result(), 0.0
            except NodeFailed:
                self.silent_since = self.silent_since or time.monotonic()
                if time.monotonic() - self.silent_since > self.node_timeout_s:
                    self.code, self.lost = LOST, True
        return self.code

    def followed(self) -> bool:
        try:
            return self.logs is not None and self.logs.poll() is None
        except NodeFailed:  # the connection is gone, which says nothing of the container
            return False

    def ask(self) -> int | None:
        """The container's exit code; None while it runs, with its log followed again. A container that is gone has failed."""
        found = self.transport.run(self.command.probe)
        if found.code:
            if "No such" in found.errors:
                return 128 + signal.SIGKILL
            found.expect(f"asking for container {self.command.name} on {self.command.host}")
        status, code = found.output.split()
        if status in ("exited", "dead"):
            return int(code)
        self.follow(since=self.silence())
        return None

    def silence(self) -> str:
        """How far back the log has to be read again, as docker takes it: a little too much rather than too little."""
        if not self.log.exists():
            return ""
        return f"{max(1, int(time.time() - self.log.stat().st_mtime) + 1)}s"

    def stop(self) -> None:
        self.transport.run(self.command.stop)  # a container that has just ended is no error

    def kill(self) -> None:
        self.code = self.code if self.code is not None else 128 + signal.SIGKILL
        self.transport.run(self.command.remove)

    def clear(self) -> None:
        """Nothing of the container is left behind; NodeFailed where that cannot be made sure."""
        if self.code is None:
            self.kill()
        if self.logs is not None and not self.lost:
            self.logs.wait(REAP_S)  # the last lines of a container that has ended
            self.logs.signal(signal.SIGTERM)
        self.transport.run(self.command.remove)


def write_env_file(command: NodeCommand, transport: Transport, secrets: Mapping[str, str]) -> None:
    """`KEY=value` lines as `docker run --env-file` reads them: no quotes, the rest of the line is the value. Mode 0600, on the node
    only while a docker client reads it; secrets are nowhere else."""
    lines = "".join(f"{key}={value}\n" for key, value in sorted({**command.environment, **secrets}.items()))
    transport.put(lines.encode(), env_file_of(command), mode=0o600)


def remove_env_file(command: NodeCommand, transport: Transport) -> None:
    transport.run(("rm", "-f", "--", env_file_of(command)))
