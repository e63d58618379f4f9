"""A node over SSH: Fabric opens the connection, one paramiko channel carries each command. (Fabric's own `run` keeps four threads a
node and polls: 85 % of a core for 128 nodes that only wait, where channels take 7 %; it also puts variables unquoted into the command.)

The far side's environment is that of a login, plus `environment`, which goes over stdin and is in no argv. Stdin of a command is empty.
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
    collect,
    command_line,
    ended,
    environment_lines,
    has_ended,
    pieces,
)
from launcher.ssh.log_writer import Followed
from launcher.ssh.pool import DEAD, PoolContext
from launcher.ssh.transport import PIECE_BYTES, Result

SESSION_TIMEOUT_S = 10.0  # for an open connection to give a command its channel
START_TIMEOUT_S = 20.0  # for a login shell to come to the command
KILL_TIMEOUT_S = 3.0
GET_TIMEOUT_S = 600.0
ERRORS_KEPT_BYTES = 1 << 16
SIGNAL_SCRIPT = 'kill -s "$1" -- "-$2"'
SLOWEST_BYTES_S = 1e6  # a file is given this much time, and a minute
# Written aside and renamed, and only when all bytes came: a connection that breaks looks like the end of the input.
PUT_SCRIPT = """set -e
umask 022
case "$1" in */*) mkdir -p -- "${1%/*}/" ;; esac
[ ! -d "$1" ] || { echo "it is a folder" >&2; exit 1; }
umask 077
part="$1.part.$$"
trap 'rm -f -- "$part"' EXIT
cat >"$part"
[ "$(wc -c <"$part")" -eq "$3" ]
chmod -- "$2" "$part"
mv -f -- "$part" "$1"
"""
GONE = (": No such file or directory", ": Not a directory")  # how cat ends its complaint with LC_ALL=C


class Ssh:
    """One node as a Transport. Connected by the first call and kept so; a connection found dead is made anew, once a call. Safe for
    many threads. Raises NodeFailed, naming the node: unreachable, not let in, a missing program, a timeout, a lost connection."""

    def __init__(self, node: Node, client: PoolContext) -> None:
        self.host, self.client, self.link = node.host, client, client.link(node)
        self.title = self.link.route.title

    def connect(self) -> None:
        self.link.open()

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        """Wait for a command; any exit code is a Result (-1: ended by a signal). At a timeout its process group is killed."""
        return result_of(argv, self._exchange(argv, environment=environment, timeout_s=timeout_s, folder=folder))

    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> "SshProcess":
        """Start a command whose stdout and stderr are appended to `log`, a file of this machine. Losing the connection does not end it."""
        marker, first = Marker(), b""
        channel = self._execute(argv, environment=environment, folder=folder, one_output=True)
        with self._guard(argv, channel, marker, START_TIMEOUT_S):
            for output, _ in pieces(channel, timeout_s=START_TIMEOUT_S):
                first += marker.strip(output)
                if marker.pid is not None:
                    break
            self._found(argv, ended(self.title, channel, marker, first, b""))
            followed = Followed(channel, marker, log, first)
        self.client.pump.follow(followed)
        return SshProcess(self, argv, followed)

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file whole or not at all; missing folders are made with mode 0755."""
        argv = ("sh", "-c", PUT_SCRIPT, "sh", path, f"{mode:04o}", str(len(content)))
        done = self.feed(argv, (content,), timeout_s=60 + len(content) / SLOWEST_BYTES_S)
        if done.code != 0:
            why = done.errors.strip() or f"not all of its {len(content)} bytes arrived"
            raise NodeFailed(f"{self.title}: {path} could not be written: {why}")

    def get(self, path: str) -> bytes | None:
        """The content of a file; None when there is none."""
        exchange = self._exchange(("env", "LC_ALL=C", "cat", "--", path), timeout_s=GET_TIMEOUT_S)
        if exchange.code == 0:
            return exchange.output
        errors = exchange.errors.decode(errors="replace").strip()
        if errors.endswith(GONE):
            return None
        raise NodeFailed(f"{self.title}: {path} could not be read: {errors}")

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        """Give a command the chunks as its stdin. When `chunks` raises, the command is killed before it sees its stdin end."""
        marker = Marker()
        channel = self._execute(argv, closes_input=False)
        with self._guard(argv, channel, marker, timeout_s):
            reader = in_background(lambda: collect(self.title, channel, timeout_s=timeout_s, marker=marker))
            try:
                send(channel, chunks, timeout_s)
            except BaseException:  # without its process id the command could not be killed, and would take the end of its input for a complete one
                wait_until(lambda: marker.pid is not None or reader.done(), START_TIMEOUT_S)
                raise
            exchange = reader.result()
        channel.close()
        return result_of(argv, self._found(argv, exchange))

    @contextlib.contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        """The stdout of a command piece by piece, at most two MiB ahead of the reader. In place of its end the iterator raises NodeFailed
        when the command fails, and so it does after `silence_s` without output. Leaving early kills the command."""
        marker = Marker()
        channel = self._execute(argv)
        try:
            yield self._streamed(argv, channel, marker, silence_s)
        finally:
            if not has_ended(channel):
                self._kill(marker, channel)
            channel.close()

    def close(self) -> None:
        self.link.drop()

    def signal_group(self, pid: int, number: signal.Signals, *, reopens: bool = True) -> None:
        """To a command and all of its process group; one that is gone already is no error."""
        argv = ("sh", "-c", SIGNAL_SCRIPT, "sh", number.name.removeprefix("SIG"), str(pid))
        channel = self._execute(argv, timeout_s=KILL_TIMEOUT_S, reopens=reopens)
        try:
            collect(self.title, channel, timeout_s=KILL_TIMEOUT_S, marker=Marker())
        except (TimeoutError, ConnectionLost) as error:
            raise NodeFailed(f"{self.title}: no answer to signal {number.name} for process {pid}") from error
        finally:
            channel.close()

    def _exchange(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float, folder: Path | None = None
    ) -> Exchange:
        marker = Marker()
        channel = self._execute(argv, environment=environment, folder=folder, timeout_s=min(timeout_s, SESSION_TIMEOUT_S))
        with self._guard(argv, channel, marker, timeout_s):
            exchange = collect(self.title, channel, timeout_s=timeout_s, marker=marker)
        channel.close()
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
        """A channel on which the command has been asked for."""
        line = command_line(argv, folder=folder, reads_environment=bool(environment))
        variables = environment_lines(environment or {})
        channel = self.link.session(timeout_s, reopens=reopens)
        try:
            channel.set_combine_stderr(one_output)
            channel.exec_command(line)
            if closes_input:
                channel.settimeout(START_TIMEOUT_S)
                channel.sendall(variables)
                channel.shutdown_write()
        except DEAD as error:
            self.link.drop(channel.get_transport())
            raise self._lost(argv) from error
        return channel

    @contextlib.contextmanager
    def _guard(self, argv: tuple[str, ...], channel: Channel, marker: Marker, timeout_s: float) -> Iterator[None]:
        """Whatever goes wrong inside ends the command, as far as it can be reached, and its channel."""
        try:
            yield
        except ConnectionLost as error:
            self.link.drop(channel.get_transport())
            raise self._lost(argv) from error
        except BaseException as error:
            if not has_ended(channel):
                self._kill(marker, channel)
            channel.close()
            if isinstance(error, TimeoutError):
                raise NodeFailed(f"{self.title}: no answer within {timeout_s:g} s: {' '.join(argv)}") from error
            raise

    def _kill(self, marker: Marker, channel: Channel) -> None:
        """A node that cannot even be asked to kill is one whose connection is of no use."""
        if not marker.pid:
            return
        try:
            self.signal_group(marker.pid, signal.SIGKILL, reopens=False)
        except NodeFailed:
            self.link.drop(channel.get_transport())

    def _lost(self, argv: tuple[str, ...]) -> NodeFailed:
        return NodeFailed(
            f"{self.title}: lost the connection while this ran there, and it may still run: {' '.join(argv)}\n"
            f"  Next: ssh {self.link.route.target} true"
        )

    def _found(self, argv: tuple[str, ...], exchange: Exchange) -> Exchange:
        if exchange.pid == 0:
            raise NodeFailed(f"{argv[0]!r} was not found on {self.title}, needed for: {' '.join(argv)}")
        return exchange


class SshProcess:
    """A command that was started on a node, as a Running. `pid` is its id there, and its process group's."""

    def __init__(self, ssh: Ssh, argv: tuple[str, ...], followed: Followed) -> None:
        self.ssh, self.argv, self.followed, self.pid = ssh, argv, followed, followed.marker.pid or 0

    def poll(self) -> int | None:
        """NodeFailed when the connection was lost, or the log cannot be written."""
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
    """All chunks, then the end. A command that stops reading is no error here: how it ended says more."""
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
