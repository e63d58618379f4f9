"""A node over SSH: Fabric opens the connection, and each command has a paramiko channel of its own. (Fabric's own `run` keeps four threads
per node and polls: 85 % of a core for 128 nodes that only wait, where channels take 7 %; it also puts variables unquoted into the command.)

A command has the environment of a login, plus `environment`, which is sent over stdin and is never in an argv. Its stdin is then empty.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from paramiko import Channel  # type: ignore[import-untyped]

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.background import in_background
from launcher.ssh.channel import (
    ConnectionLost,
    Exchange,
    Marker,
    StartFailed,
    collect,
    command_line,
    ended,
    environment_lines,
    has_ended,
    pieces,
)
from launcher.ssh.log_writer import FollowedCommand
from launcher.ssh.pool import DEAD, ConnectionPool
from launcher.ssh.transport import PIECE_BYTES, Result

SESSION_TIMEOUT_S = 10.0  # for an open connection to open a channel
START_TIMEOUT_S = 20.0  # for a login shell to start the command
KILL_TIMEOUT_S = 3.0
GET_TIMEOUT_S = 600.0
ERRORS_KEPT_BYTES = 1 << 16
SIGNAL_SCRIPT = 'kill -s "$1" -- "-$2"'
SLOWEST_BYTES_S = 1e6  # the time limit of a file assumes this speed, plus a minute
PUT_SCRIPT = Path(__file__).parent / "node_scripts" / "put_file.sh"
MISSING = (": No such file or directory", ": Not a directory")  # the end of cat's message with LC_ALL=C


class Ssh:
    """One node as a Transport. The first call connects; a connection that was lost is opened again, once per call. Thread-safe. Raises
    NodeFailed, which names the node: unreachable, login refused, missing program, timeout, connection lost."""

    def __init__(self, node: Node, pool: ConnectionPool) -> None:
        self.host, self.pool, self.connection = node.host, pool, pool.connection_to(node)
        self.title = self.connection.target.title

    @property
    def remarks(self) -> tuple[str, ...]:
        return self.connection.target.ignored

    def connect(self) -> None:
        self.connection.open()

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        """Run a command and wait for it; any exit code is a Result (-1: ended by a signal). At a timeout its process group is killed."""
        return result_of(argv, self._exchange(argv, environment=environment, timeout_s=timeout_s, folder=folder))

    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> "SshProcess":
        """Start a command and append its stdout and stderr to `log`, a file on this machine. A lost connection does not end it."""
        marker, first = Marker(), b""
        channel = self._execute(argv, environment=environment, folder=folder, one_output=True)
        with self._guard(argv, channel, marker, START_TIMEOUT_S):
            for output, _ in pieces(channel, timeout_s=START_TIMEOUT_S):
                first += marker.strip(output)
                if marker.pid is not None:
                    break
            self._found(argv, ended(self.title, channel, marker, first, b""))
            followed = FollowedCommand(channel, marker, log, first)
        self.pool.log_writer.follow(followed)
        return SshProcess(self, argv, followed)

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write the whole file or nothing; missing folders are created with mode 0755."""
        argv = ("sh", "-c", PUT_SCRIPT.read_text(encoding="utf-8"), "sh", path, f"{mode:04o}", str(len(content)))
        done = self.feed(argv, (content,), timeout_s=60 + len(content) / SLOWEST_BYTES_S)
        if done.code != 0:
            why = done.errors.strip() or f"not all of the {len(content)} bytes arrived"
            raise NodeFailed(f"{self.title}: {path} could not be written: {why}")

    def get(self, path: str) -> bytes | None:
        """The content of a file; None when it does not exist."""
        exchange = self._exchange(("env", "LC_ALL=C", "cat", "--", path), timeout_s=GET_TIMEOUT_S)
        if exchange.code == 0:
            return exchange.output
        errors = exchange.errors.decode(errors="replace").strip()
        if errors.endswith(MISSING):
            return None
        raise NodeFailed(f"{self.title}: {path} could not be read: {errors}")

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        """Send the chunks to the stdin of a command. When `chunks` raises, the command is killed before its stdin ends."""
        marker = Marker()
        channel = self._execute(argv, closes_input=False)
        with self._guard(argv, channel, marker, timeout_s):
            reader = in_background(lambda: collect(self.title, channel, timeout_s=timeout_s, marker=marker))
            try:
                send(channel, chunks, timeout_s)
            except (
                BaseException
            ):  # without its process id the command could not be killed, and would take the end of its input for a complete one
                wait_until(lambda: marker.pid is not None or reader.done(), START_TIMEOUT_S)
                raise
            exchange = reader.result()
        channel.close()
        return result_of(argv, self._found(argv, exchange))

    @contextlib.contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        """The stdout of a command in pieces, at most two MiB ahead of the reader. The iterator raises NodeFailed at the end when the command
        failed, and after `silence_s` without output. Leaving early kills the command."""
        marker = Marker()
        channel = self._execute(argv)
        try:
            yield self._streamed(argv, channel, marker, silence_s)
        finally:
            if not has_ended(channel):
                self._kill(marker, channel)
            channel.close()

    def close(self) -> None:
        self.connection.drop()

    def signal_group(self, pid: int, number: signal.Signals, *, reopens: bool = True) -> None:
        """Signal a command and its whole process group. It is not an error when they have ended."""
        argv = ("sh", "-c", SIGNAL_SCRIPT, "sh", number.name.removeprefix("SIG"), str(pid))
        channel = self._execute(argv, timeout_s=KILL_TIMEOUT_S, reopens=reopens)
        try:
            collect(self.title, channel, timeout_s=KILL_TIMEOUT_S, marker=Marker())
        except (TimeoutError, ConnectionLost) as error:
            raise NodeFailed(f"{self.title}: process {pid} could not be sent signal {number.name}: the node did not respond") from error
        finally:
            channel.close()

    def _exchange(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float, folder: Path | None = None
    ) -> Exchange:
        """The first command of a connection finds out whether the login shell is a POSIX shell: another one cannot read the line, and runs nothing
        of it."""
        try:
            return self._exchange_once(argv, environment=environment, timeout_s=timeout_s, folder=folder)
        except StartFailed as first:
            if self.connection.wraps is not None:
                raise
            self.connection.wraps = True
            try:
                return self._exchange_once(argv, environment=environment, timeout_s=timeout_s, folder=folder)
            except StartFailed:
                self.connection.wraps = None
                raise first from None

    def _exchange_once(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None, timeout_s: float, folder: Path | None
    ) -> Exchange:
        marker = Marker()
        channel = self._execute(argv, environment=environment, folder=folder, timeout_s=min(timeout_s, SESSION_TIMEOUT_S))
        with self._guard(argv, channel, marker, timeout_s):
            exchange = collect(self.title, channel, timeout_s=timeout_s, marker=marker)
        channel.close()
        self.connection.wraps = bool(self.connection.wraps)
        return self._found(argv, exchange)

    def _streamed(self, argv: tuple[str, ...], channel: Channel, marker: Marker, silence_s: float) -> Iterator[bytes]:
        errors = b""
        with self._guard(argv, channel, marker, silence_s):
            for output, said in pieces(channel, timeout_s=None, silence_s=silence_s):
                errors = (errors + said)[-ERRORS_KEPT_BYTES:]
                if content := marker.strip(output):
                    yield content
        exchange = self._found(argv, ended(self.title, channel, marker, b"", errors))
        result_of(argv, exchange).expect(f"{self.title}: reading the output of {argv[0]}")

    def _execute(
        self,
        argv: tuple[str, ...],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout_s: float = SESSION_TIMEOUT_S,
        one_output: bool = False,
        closes_input: bool = True,
        reopens: bool = True,
    ) -> Channel:
        """A channel on which the command is started."""
        line = command_line(argv, folder=folder, reads_environment=bool(environment), wraps=bool(self.connection.wraps))
        variables = environment_lines(environment or {})
        channel = self.connection.session(timeout_s, reopens=reopens)
        try:
            channel.set_combine_stderr(one_output)
            channel.exec_command(line)
            if closes_input:
                channel.settimeout(START_TIMEOUT_S)
                channel.sendall(variables)
                channel.shutdown_write()
        except DEAD as error:
            self.connection.drop(channel.get_transport())
            raise self._lost(argv) from error
        return channel

    @contextlib.contextmanager
    def _guard(self, argv: tuple[str, ...], channel: Channel, marker: Marker, timeout_s: float) -> Iterator[None]:
        """On any error inside, end the command, if the node can be reached, and close its channel."""
        try:
            yield
        except ConnectionLost as error:
            self.connection.drop(channel.get_transport())
            raise self._lost(argv) from error
        except BaseException as error:
            if not has_ended(channel):
                self._kill(marker, channel)
            channel.close()
            if isinstance(error, TimeoutError):
                raise NodeFailed(self._late(argv, marker, timeout_s)) from error
            raise

    def _kill(self, marker: Marker, channel: Channel) -> None:
        """A connection over which the kill cannot be sent is dropped."""
        if not marker.pid:
            return
        try:
            self.signal_group(marker.pid, signal.SIGKILL, reopens=False)
        except NodeFailed:
            self.connection.drop(channel.get_transport())

    def _late(self, argv: tuple[str, ...], marker: Marker, timeout_s: float) -> str:
        if marker.pid is not None:
            return f"{self.title}: no answer within {timeout_s:g} s: {' '.join(argv)}"
        said = marker.before.decode(errors="replace").strip()[-200:]
        return (
            f"{self.title}: no answer within {timeout_s:g} s: the login shell did not start a command: its login files (~/.bashrc, ~/.profile) take too long, or "
            f"wait for input{f'; it printed {said!r}' if said else ''}\n  Next: time ssh {self.connection.target.ssh_arguments} true"
        )

    def _lost(self, argv: tuple[str, ...]) -> NodeFailed:
        return NodeFailed(
            f"{self.title}: lost the connection during this command, which may still be running there: {' '.join(argv)}\n"
            f"  Next: ssh {self.connection.target.ssh_arguments} true"
        )

    def _found(self, argv: tuple[str, ...], exchange: Exchange) -> Exchange:
        if exchange.pid == 0:
            raise NodeFailed(f"{argv[0]!r} was not found on {self.title}, needed for: {' '.join(argv)}")
        return exchange


class SshProcess:
    """A command that was started on a node, as a Running. `pid`: its id there, also of its process group."""

    def __init__(self, ssh: Ssh, argv: tuple[str, ...], followed: FollowedCommand) -> None:
        self.ssh, self.argv, self.followed, self.pid = ssh, argv, followed, followed.marker.pid or 0

    def poll(self) -> int | None:
        """Raises NodeFailed when the connection was lost, or the log cannot be written."""
        if not self.followed.done.is_set():
            return None
        if self.followed.lost:
            raise self.ssh._lost(self.argv)
        if self.followed.failure:
            raise NodeFailed(f"{self.ssh.title}: {self.followed.failure}")
        return self.followed.code

    def signal(self, number: signal.Signals) -> None:
        if not self.followed.done.is_set() or self.followed.lost:
            self.ssh.signal_group(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        self.followed.done.wait(timeout_s)
        return self.poll()


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def result_of(argv: tuple[str, ...], exchange: Exchange) -> Result:
    output, errors = (text.decode("utf-8", errors="replace") for text in (exchange.output, exchange.errors))
    return Result(argv=argv, code=exchange.code, output=output, errors=errors)


def send(channel: Channel, chunks: Iterable[bytes], timeout_s: float) -> None:
    """Send all chunks, then end the stdin. A command that stops reading is not an error here: its exit code decides."""
    channel.settimeout(timeout_s)
    for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):
            try:
                channel.sendall(chunk[start : start + PIECE_BYTES])
            except TimeoutError:
                raise
            except OSError:
                return
    channel.shutdown_write()
