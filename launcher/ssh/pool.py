"""The SSH connections of this process: one to each node and jump host, kept open, opened anew when found dead."""

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
from launcher.ssh.log_writer import Pump
from launcher.ssh.ssh_config import Access, Login
from launcher.ssh.target import dial, find_route, node_of, start_proxy, watch_socket

DEAD = (SSHException, EOFError, OSError)  # what paramiko raises on a connection that is gone
# Handshakes at once: they are work for this machine's processor, and a crowd of them keeps the other threads from dialling: with 128 at
# once on two cores, connecting took 3.0 s in place of 2.2 s, and a dead host was named after 10.7 s in place of 9.3 s.
HANDSHAKES = 16
ADMINISTRATIVELY_PROHIBITED = 1  # RFC 4254, section 5.1


class PoolContext:
    """What all connections share: the login, the jump hosts, the thread that writes logs, the thread that looks after tunnels."""

    def __init__(self, access: Access) -> None:
        # What paramiko writes about a broken connection is said once, as NodeFailed; without a handler it would go to stderr as well.
        paramiko_log = logging.getLogger("paramiko")
        if not paramiko_log.handlers:
            paramiko_log.addHandler(logging.NullHandler())
        self.login, self.pump = Login(access), Pump()
        self._links: list[Link] = []
        self._jumps: dict[tuple[str, ...], Link] = {}
        self._lock = threading.Lock()
        self.handshakes = threading.BoundedSemaphore(HANDSHAKES)
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def link(self, node: Node) -> "Link":
        link = Link(node, self)
        with self._lock:
            self._links.append(link)
            if link.route.is_tunnelled and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch_tunnels, name="omnilaunch-tunnels", daemon=True)
                self._watcher.start()
        return link

    def jump(self, jumps: tuple[str, ...], seen: tuple[str, ...]) -> "Link":
        """The connection to the last of `jumps`, through those before it; one for all nodes behind it (sshd drops a crowd of logins)."""
        if jumps[-1] in seen:
            raise NodeFailed(
                f"the jump hosts go in a circle: {' -> '.join((*seen, jumps[-1]))}. Next: look at ProxyJump in {self.login.access.config}"
            )
        with self._lock:
            if jumps not in self._jumps:
                last = node_of(jumps[-1])
                via = Node(host=last.host, user=last.user, port=last.port, jump=",".join(jumps[:-1]))
                self._jumps[jumps] = Link(via, self, seen=(*seen, jumps[-1]))
            return self._jumps[jumps]

    def _watch_tunnels(self) -> None:
        """A cable pulled behind a jump host is not seen by this machine's kernel, so those nodes are asked for a sign of life."""
        pause_s = self.login.access.silence_s / 3
        while not self._closed.wait(pause_s):
            with self._lock:
                tunnelled = [link for link in self._links if link.route.is_tunnelled and link.is_open]
            for link in tunnelled:
                threading.Thread(target=link.check, args=(pause_s,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            links = [*self._links, *self._jumps.values()]
        for link in links:
            link.drop()
        self.pump.close()


class Link:
    """One connection. Safe for many threads: they wait for one attempt and share how it ended."""

    def __init__(self, node: Node, client: PoolContext, seen: tuple[str, ...] = ()) -> None:
        self.client, self.seen = client, seen
        self.route = find_route(node, client.login)
        self._connection: Connection | None = None
        self._proxy: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._failed_at, self._failure = 0.0, ""

    @property
    def is_open(self) -> bool:
        connection = self._connection
        return connection is not None and bool(connection.is_connected)

    def open(self) -> ParamikoTransport:
        """The open transport; NodeFailed when it cannot be had within the connect timeout."""
        asked = time.monotonic()
        with self._lock:
            if self._connection is not None and self._connection.is_connected:
                return self._connection.transport
            if self._failed_at >= asked:  # while this thread waited for another's attempt
                raise NodeFailed(self._failure)
            self._drop()
            try:
                self._connection = self._connect()
            except NodeFailed as error:
                self._drop()  # a ProxyCommand that was started for it
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            return self._connection.transport

    def session(self, timeout_s: float, *, reopens: bool = True) -> Channel:
        """A channel for one command. A connection that turns out to be dead is replaced once: nothing was asked of it yet. With
        `reopens` false it is NodeFailed at once."""
        if not reopens and not self.is_open:
            raise NodeFailed(f"{self.route.title}: the connection is closed")
        try:
            return self._session(timeout_s)
        except DEAD as error:
            if not reopens:
                raise NodeFailed(f"{self.route.title}: lost the connection: {error}") from error
        try:
            return self._session(timeout_s)
        except DEAD as error:
            raise NodeFailed(f"{self.route.title}: lost the connection again right after it was made: {error}") from error

    def tunnel(self, host: str, port: int, timeout_s: float) -> Channel:
        """A connection from this jump host to another host; NodeFailed when it cannot reach it."""
        transport = self.open()
        try:
            return transport.open_channel("direct-tcpip", (host, port), ("", 0), timeout=timeout_s)
        except ChannelException as error:
            why = "it forbids forwarding (AllowTcpForwarding)" if error.code == ADMINISTRATIVELY_PROHIBITED else error.text
            raise NodeFailed(
                f"the jump host {self.route.title} has no way to port {port} of {host}: {why}\n"
                f"  Next: ssh {self.route.target} ssh-keyscan -p {port} {host}"
            ) from error
        except DEAD as error:
            raise NodeFailed(
                f"the jump host {self.route.title} had no answer from port {port} of {host} within {timeout_s:g} s ({error}). Is it switched on?\n"
                f"  Next: ssh {self.route.target} ssh-keyscan -p {port} {host}"
            ) from error

    def check(self, timeout_s: float) -> None:
        """Drop the connection, and so end all that waits on it, unless the far side answers."""
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
        """Close the connection; the next call makes another. `transport`: the one that was found dead; where another has taken its place
        since, that one stays."""
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
                f"{self.route.title}: its sshd gives no further session to this connection ({error.text}). "
                f"Next: raise MaxSessions in its sshd_config (10 by default)"
            ) from error
        except DEAD:
            self.drop(transport)
            raise

    def _connect(self) -> Connection:
        timeout_s = self.client.login.access.connect_timeout_s
        jump = self.client.jump(self.route.jumps, self.seen) if self.route.jumps else None
        if jump is not None:
            jump.open()  # its time is not this node's
        started = time.monotonic()
        tunnel = self._tunnel(jump, timeout_s)
        wait_banner(self.route, tunnel, timeout_s=max(0.5, timeout_s - (time.monotonic() - started)))
        left_s = max(0.5, timeout_s - (time.monotonic() - started))
        with self.client.handshakes:
            return open_connection(self.route, self.client.login, tunnel, timeout_s=left_s)

    def _tunnel(self, jump: "Link | None", timeout_s: float) -> Any:
        if jump is not None:
            try:
                return jump.tunnel(self.route.host, self.route.port, timeout_s)
            except NodeFailed as error:
                raise NodeFailed(f"{self.route.title}: {error}") from error
        started = time.monotonic()
        try:
            if self.route.proxy_command:
                tunnel, self._proxy = start_proxy(self.route.proxy_command)
                return tunnel
            connection = dial(self.route.host, self.route.port, timeout_s=timeout_s)
        except OSError as error:
            raise NodeFailed(describe_dial(self.route, error, time.monotonic() - started)) from error
        watch_socket(connection, silence_s=self.client.login.access.silence_s)
        return connection
