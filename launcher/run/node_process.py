"""One node's part of a run: a child process of the launcher, or a detached container on a node that may go away.

A container needs nobody: while its log can be followed it is alive, and only when the log ends is the engine asked why. So a member
that runs costs one open channel and no commands. A node that does not answer is asked again until `node_timeout_s` is over.
"""

import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.errors import NodeFailed
from launcher.plan.commands import FOLDER_VARIABLE, NodeCommand, data_env_file, data_name, env_file, env_lines, is_absent
from launcher.ssh.transport import Result, Running, Transport, kill_processes, processes_with

PROBE_INTERVAL_S = 0.5  # an inspect costs the engine about 20 ms
LOOK_AGAIN_S = 0.02
START_LIMIT_S = 300.0  # for an engine to start a container
START_LOOK_S = 0.1
REAP_S = 2  # for a process that was killed to be gone
LOG_TIMEOUT_S = 60  # for the rest of the log of a container that ended while nobody watched
LOST = 255  # exit code of a node that does not answer any more
SECRETS_VARIABLE = "OMNILAUNCH_SECRETS"  # both read by images/entrypoint.sh
SECRETS_PIPE = "/dev/shm/omnilaunch-secrets"


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """How one node's part ended. `killed`: it did not end by itself within the grace time. `lost`: the node did not answer any more.
    `left`: why it could not be made sure that nothing of the run is left there, '' where it was."""

    host: str
    node_rank: int
    code: int
    seconds: float
    killed: bool
    lost: bool = False
    left: str = ""


class NodeProcess(Protocol):
    """`poll` gives the exit code or None and never waits for a node. `lost`: the node did not answer until the end of its time."""

    command: NodeCommand
    lost: bool

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def clear(self) -> None: ...


class ChildNodeProcess:
    """torchrun, or the data check, as a child of the launcher."""

    lost = False

    def __init__(
        self, command: NodeCommand, argv: tuple[str, ...], transport: Transport, log: Path, folder: Path, *, secrets: Mapping[str, str]
    ) -> None:
        self.command = command
        self.running: Running = transport.start(argv, log=log, environment={**command.environment, **secrets}, folder=folder)

    def poll(self) -> int | None:
        return self.running.poll()

    def stop(self) -> None:
        self.running.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        deadline = time.monotonic() + REAP_S
        while (left := processes_with(FOLDER_VARIABLE, self.command.environment[FOLDER_VARIABLE])) and time.monotonic() < deadline:
            kill_processes(left)  # again, since one that was killed may have started another just before
            time.sleep(LOOK_AGAIN_S)
        self.running.wait(REAP_S)


class CheckNodeProcess:
    """The data check in a container that is followed and removed by itself. One whose connection was lost is made again; its node counts as
    lost after twice the time that it has for its ranks, whose own end says more while they run."""

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, asker: ThreadPoolExecutor, *, node_timeout_s: float) -> None:
        self.command, self.transport, self.log, self.asker = command, transport, log, asker
        self.limit_s, self.silent_since, self.lost = 2 * node_timeout_s, 0.0, False
        self.env_file = data_env_file(command.folder, command.node_rank)
        self.beginning: Future[None] | None = None
        self.begin()

    def begin(self) -> None:
        write_env_file(self.command, self.transport, self.env_file)
        self.running: Running = self.transport.start(self.command.prepare, log=self.log)

    def begin_again(self) -> None:
        self.clear()
        self.begin()

    def poll(self) -> int | None:
        if self.lost:
            return LOST
        if self.beginning is None:
            try:
                return self.running.poll()
            except NodeFailed:
                self.silent_since = self.silent_since or time.monotonic()
                self.lost = time.monotonic() - self.silent_since > self.limit_s
                self.beginning = self.asker.submit(self.begin_again)
        elif self.beginning.done():
            try:
                self.beginning.result()
                self.silent_since = 0.0
            except NodeFailed:  # it is still away: the next poll finds that out
                pass
            self.beginning = None
        return None

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.clear()

    def clear(self) -> None:
        self.transport.run(("docker", "rm", "--force", data_name(self.command.name)))
        remove_env_file(self.transport, self.env_file)
        with suppress(NodeFailed):  # a log that was cut off
            self.running.wait(REAP_S)


class ContainerNodeProcess:
    """A detached container. `attached` takes one up again that is there already."""

    def __init__(self, command: NodeCommand, transport: Transport, log: Path, asker: ThreadPoolExecutor, *, node_timeout_s: float) -> None:
        self.command, self.transport, self.log, self.asker, self.node_timeout_s = command, transport, log, asker, node_timeout_s
        self.logs: Running | None = None
        self.whole = False  # whether the log was followed to its end
        self.code: int | None = None
        self.lost = False
        self.answer: Future[int | None] | None = None
        self.asked_at, self.silent_since = 0.0, 0.0

    def start(self, secrets: Mapping[str, str], given_up: Callable[[], bool] = lambda: False) -> None:
        """Raises NodeFailed, naming the node, when the container does not start, or when `given_up` comes true before it has; then nobody
        tells the engine to start it any more."""
        path = env_file(self.command.folder, self.command.node_rank)
        write_env_file(self.command, self.transport, path, waits_for=tuple(secrets))
        try:
            self.run_container(given_up)
        finally:
            remove_env_file(self.transport, path)
        if secrets:
            hand_secrets(self.command, self.transport, secrets)
        self.follow()

    def run_container(self, given_up: Callable[[], bool]) -> None:
        what, said = (
            f"starting container {self.command.name} on {self.command.host}",
            self.log.with_name(f"start{self.command.node_rank}.log"),
        )
        if given_up():
            raise NodeFailed(f"{what} was given up")
        running, deadline = self.transport.start(self.command.start, log=said), time.monotonic() + START_LIMIT_S
        while (code := running.wait(START_LOOK_S)) is None:
            if given_up() or time.monotonic() > deadline:
                running.signal(signal.SIGKILL)
                running.wait(REAP_S)
                raise NodeFailed(f"{what} " + ("was given up" if given_up() else f"gave no answer within {START_LIMIT_S:g} s"))
        text = said.read_text(encoding="utf-8", errors="replace")
        said.unlink()
        Result(argv=self.command.start, code=code, output="", errors=text).expect(what)

    def follow(self, since: str = "") -> Running:
        """Append the container's output to `log`, from the beginning or from the time `since`."""
        argv = (*self.command.logs[:-1], *(("--since", since) if since else ()), self.command.logs[-1])
        self.logs = logs = self.transport.start(argv, log=self.log)
        return logs

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
        if self.logs is None:
            return False
        try:
            ended = self.logs.poll() is not None
        except NodeFailed:  # the connection is gone, which says nothing of the container
            self.whole = False
            return False
        self.whole = ended
        return not ended

    def ask(self) -> int | None:
        """The container's exit code; None while it runs, with its log followed again. A container that is gone has failed."""
        found = self.transport.run(self.command.probe)
        if found.code:
            if is_absent(found.errors):
                return 128 + signal.SIGKILL
            found.expect(f"asking for container {self.command.name} on {self.command.host}")
        status, code = found.output.split()
        if status in ("exited", "dead"):
            if not self.whole:  # it ended while nobody watched, or the connection was lost
                self.follow(since=self.silence()).wait(LOG_TIMEOUT_S)
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
        """Raises NodeFailed where the node does not answer, which then counts as lost: what its end did to other ranks may have been seen
        long before its time was over."""
        running = self.code is None
        if running:
            self.code = 128 + signal.SIGKILL
        try:
            self.transport.run(self.command.remove)
        except NodeFailed:
            if running:
                self.code, self.lost = LOST, True
            raise

    def clear(self) -> None:
        """Nothing of the container is left behind; NodeFailed where that cannot be made sure."""
        if self.code is None:
            self.kill()
        if self.logs is not None and not self.lost:
            with suppress(NodeFailed):  # a log that was cut off is no reason to leave the container
                self.logs.wait(REAP_S)  # the last lines of a container that has ended
                self.unfollow()
        self.transport.run(self.command.remove)

    def unfollow(self) -> None:
        """Raises NodeFailed."""
        if self.logs is not None:
            self.logs.signal(signal.SIGTERM)
            self.logs.wait(REAP_S)


def write_env_file(command: NodeCommand, transport: Transport, path: str, *, waits_for: tuple[str, ...] = ()) -> None:
    """`KEY=value` lines as `docker run --env-file` reads them: no quotes, the rest of the line is the value. Mode 0600, on the node
    only while a docker client reads it. Of secrets it has the names, for which the container then waits."""
    waiting = {SECRETS_VARIABLE: " ".join(waits_for)} if waits_for else {}
    transport.put(env_lines({**command.environment, **waiting}).encode(), path, mode=0o600)


def hand_secrets(command: NodeCommand, transport: Transport, secrets: Mapping[str, str]) -> None:
    """Through a pipe in the container's memory, where entrypoint.sh waits for them in this order: in no file, argv or `docker inspect`."""
    inside, what = ("docker", "exec", "--interactive", command.name), f"handing the secrets to {command.name} on {command.host}"
    transport.run((*inside, "mkfifo", "-m", "600", SECRETS_PIPE))  # there already where the container was faster
    values = "".join(f"{value}\0" for value in secrets.values()).encode()
    transport.feed((*inside, "dd", f"of={SECRETS_PIPE}", "conv=nocreat,notrunc", "status=none"), (values,), timeout_s=60).expect(what)


def remove_env_file(transport: Transport, path: str) -> None:
    transport.run(("rm", "-f", "--", path))
