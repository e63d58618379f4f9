"""The SSH connections of this process: one to each node and jump host, kept open, and opened again after they were lost."""

import logging
import subprocess
import threading
import time
from typing import Any

from fabric import Connection  # type: ignore[import-untyped]
from paramiko import Channel, ChannelException, SSHException, Transport as ParamikoTransport  # type: ignore[import-untyped]

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.connection import close_connection, describe_dial, open_connection, wait_banner
from launcher.ssh.log_writer import LogWriter
from launcher.ssh.ssh_config import SshFiles, SshSettings
from launcher.ssh.target import dial, find_target, node_of, start_proxy, watch_socket

DEAD = (SSHException, EOFError, OSError)  # what paramiko raises on a connection that is gone
# Handshakes at the same time. They load the processor of this machine and delay the other threads: with 128 at a time on two cores,
# connecting took 3.0 s instead of 2.2 s, and a dead host was reported after 10.7 s instead of 9.3 s.
HANDSHAKES = 16
ADMINISTRATIVELY_PROHIBITED = 1  # RFC 4254, section 5.1


class ConnectionPool:
    """What all connections share: settings and keys, jump hosts, the thread that writes logs, the thread that supervises tunnels."""

    def __init__(self, settings: SshSettings) -> None:
        # A lost connection is reported once, as NodeFailed; without a handler paramiko's own messages would go to stderr as well.
        paramiko_log = logging.getLogger("paramiko")
        if not paramiko_log.handlers:
            paramiko_log.addHandler(logging.NullHandler())
        self.files, self.log_writer = SshFiles(settings), LogWriter()
        self._connections: list[PooledConnection] = []
        self._jumps: dict[tuple[str, ...], PooledConnection] = {}
        self._lock = threading.Lock()
        self.handshakes = threading.BoundedSemaphore(HANDSHAKES)
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def connection_to(self, node: Node) -> "PooledConnection":
        connection = PooledConnection(node, self)
        with self._lock:
            self._connections.append(connection)
            if connection.target.is_tunnelled and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch_tunnels, name="omnilaunch-tunnels", daemon=True)
                self._watcher.start()
        return connection

    def jump(self, jumps: tuple[str, ...], seen: tuple[str, ...]) -> "PooledConnection":
        """The connection to the last of `jumps`, through the others; shared by all nodes behind it, since sshd drops many simultaneous logins."""
        if jumps[-1] in seen:
            raise NodeFailed(
                f"the jump hosts form a loop: {' -> '.join((*seen, jumps[-1]))}. Next: correct ProxyJump in {self.files.settings.config}"
            )
        with self._lock:
            if jumps not in self._jumps:
                last = node_of(jumps[-1])
                via = Node(host=last.host, user=last.user, port=last.port, jump=",".join(jumps[:-1]))
                self._jumps[jumps] = PooledConnection(via, self, seen=(*seen, jumps[-1]))
            return self._jumps[jumps]

    def _watch_tunnels(self) -> None:
        """The kernel of this machine does not notice a node that is lost behind a jump host, so those nodes are asked for an answer."""
        pause_s = self.files.settings.silence_s / 3
        while not self._closed.wait(pause_s):
            with self._lock:
                tunnelled = [connection for connection in self._connections if connection.target.is_tunnelled and connection.is_open]
            for connection in tunnelled:
                threading.Thread(target=connection.check, args=(pause_s,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            connections = [*self._connections, *self._jumps.values()]
        for connection in connections:
            connection.drop()
        self.log_writer.close()


class PooledConnection:
    """One connection. Thread-safe: threads that need it wait for one attempt to connect, and share its result."""

    def __init__(self, node: Node, pool: ConnectionPool, seen: tuple[str, ...] = ()) -> None:
        self.pool, self.seen = pool, seen
        self.target = find_target(node, pool.files)
        self.wraps: bool | None = None  # whether the login shell is no POSIX shell; None: not known yet
        self._connection: Connection | None = None
        self._proxy: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._failed_at, self._failure = 0.0, ""

    @property
    def is_open(self) -> bool:
        connection = self._connection
        return connection is not None and bool(connection.is_connected)

    def open(self) -> ParamikoTransport:
        """The open transport. Raises NodeFailed when it cannot be opened within the connect timeout."""
        asked = time.monotonic()
        with self._lock:
            if self._connection is not None and self._connection.is_connected:
                return self._connection.transport
            if self._failed_at >= asked:  # while this thread waited for the attempt of another
                raise NodeFailed(self._failure)
            self._drop()
            try:
                self._connection = self._connect()
            except NodeFailed as error:
                self._drop()  # ends a ProxyCommand that was started for it
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            return self._connection.transport

    def session(self, timeout_s: float, *, reopens: bool = True) -> Channel:
        """A channel for one command. A connection that was lost is opened again once, since no command was sent yet. With `reopens` false,
        NodeFailed is raised at once."""
        if not reopens and not self.is_open:
            raise NodeFailed(f"{self.target.title}: the connection is closed")
        try:
            return self._session(timeout_s)
        except DEAD as error:
            if not reopens:
                raise NodeFailed(f"{self.target.title}: lost the connection: {error}") from error
        try:
            return self._session(timeout_s)
        except DEAD as error:
            raise NodeFailed(f"{self.target.title}: lost the connection again right after it was opened: {error}") from error

    def tunnel(self, host: str, port: int, timeout_s: float) -> Channel:
        """A connection from this jump host to another host. Raises NodeFailed when the jump host cannot reach it."""
        transport = self.open()
        try:
            return transport.open_channel("direct-tcpip", (host, port), ("", 0), timeout=timeout_s)
        except ChannelException as error:
            why = "it forbids forwarding (AllowTcpForwarding)" if error.code == ADMINISTRATIVELY_PROHIBITED else error.text
            raise NodeFailed(
                f"the jump host {self.target.title} cannot reach port {port} of {host}: {why}\n"
                f"  Next: ssh {self.target.ssh_arguments} ssh-keyscan -p {port} {host}"
            ) from error
        except DEAD as error:
            raise NodeFailed(
                f"the jump host {self.target.title} got no answer from port {port} of {host} within {timeout_s:g} s ({error}). Is {host} switched on?\n"
                f"  Next: ssh {self.target.ssh_arguments} ssh-keyscan -p {port} {host}"
            ) from error

    def check(self, timeout_s: float) -> None:
        """Drop the connection, which ends everything that waits for it, unless the node answers."""
        connection = self._connection
        if connection is None:
            return
        transport = connection.transport
        try:
            transport.open_session(timeout=timeout_s).close()
        except ChannelException:
            return  # a refusal is an answer
        except DEAD:
            self.drop(transport)

    def drop(self, transport: ParamikoTransport | None = None) -> None:
        """Close the connection; the next call opens another. `transport`: the lost one; a connection that replaced it is kept."""
        with self._lock:
            if transport is None or (self._connection is not None and self._connection.transport is transport):
                self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            close_connection(connection)
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            proxy.kill()
            proxy.wait()

    def _session(self, timeout_s: float) -> Channel:
        transport = self.open()
        try:
            return transport.open_session(timeout=timeout_s)
        except ChannelException as error:
            raise NodeFailed(
                f"{self.target.title}: its sshd refuses another session on this connection ({error.text}). "
                f"Next: raise MaxSessions in its sshd_config (default 10)"
            ) from error
        except DEAD:
            self.drop(transport)
            raise

    def _connect(self) -> Connection:
        timeout_s = self.pool.files.settings.connect_timeout_s
        jump = self.pool.jump(self.target.jumps, self.seen) if self.target.jumps else None
        if jump is not None:
            jump.open()  # has a timeout of its own
        started = time.monotonic()
        tunnel = self._tunnel(jump, timeout_s)
        wait_banner(self.target, tunnel, timeout_s=max(0.5, timeout_s - (time.monotonic() - started)))
        left_s = max(0.5, timeout_s - (time.monotonic() - started))
        with self.pool.handshakes:
            return open_connection(self.target, self.pool.files, tunnel, timeout_s=left_s)

    def _tunnel(self, jump: "PooledConnection | None", timeout_s: float) -> Any:
        if jump is not None:
            try:
                return jump.tunnel(self.target.host, self.target.port, timeout_s)
            except NodeFailed as error:
                raise NodeFailed(f"{self.target.title}: {error}") from error
        started = time.monotonic()
        try:
            if self.target.proxy_command:
                tunnel, self._proxy = start_proxy(self.target.proxy_command)
                return tunnel
            connection = dial(self.target.host, self.target.port, timeout_s=timeout_s)
        except OSError as error:
            raise NodeFailed(describe_dial(self.target, error, time.monotonic() - started)) from error
        watch_socket(connection, silence_s=self.pool.files.settings.silence_s)
        return connection
