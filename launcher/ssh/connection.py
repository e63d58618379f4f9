"""Opens one SSH connection, or says in the user's words why it cannot be had. Unknown and changed host keys are refused."""

import contextlib
import errno
import select
import socket
import time
from typing import Any

from fabric import Config, Connection  # type: ignore[import-untyped]
from paramiko import IncompatiblePeer, SSHConfig, SSHException, Transport  # type: ignore[import-untyped]

from launcher.errors import NodeFailed
from launcher.ssh.hostkey import KINDS, HostKeyCheck
from launcher.ssh.ssh_config import Authentication, Login
from launcher.ssh.target import Route

# The algorithms of an RSA key: its kind names the key, these the signature.
SIGNATURES = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
# AES-GCM checks a packet while it decrypts it; the others need a second pass, in Python.
FIRST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
TICK_S = 1.0  # how often an idle transport thread wakes; paramiko's own 0.1 s costs 7 % of a core at 128 nodes
LEAVE_S = 1.0


def wait_banner(route: Route, tunnel: Any, *, timeout_s: float) -> None:
    """Until the far side says something, as sshd does first; NodeFailed when it stays silent. A tunnel's end is not looked at."""
    if isinstance(tunnel, socket.socket):
        poll = select.poll()
        poll.register(tunnel, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            tunnel.close()
            raise NodeFailed(describe_failure(route, SSHException("no banner"), timeout_s))


def open_connection(route: Route, login: Login, tunnel: Any, *, timeout_s: float) -> Connection:
    """An open and authenticated Fabric connection over `tunnel` (a socket, or a channel of a jump host). NodeFailed otherwise."""
    connection = Connection(
        route.host,
        user=route.user,
        port=route.port,
        # No file of this machine but the ssh config, which `route` has read, says how a node is reached: no fabric.yaml. One for each
        # connection, since Fabric writes a connection's settings into its config.
        config=Config(ssh_config=SSHConfig(), lazy=True),
        gateway=False,
        connect_kwargs={
            "sock": tunnel,
            "timeout": timeout_s,
            "banner_timeout": timeout_s,
            "auth_timeout": timeout_s,
            "channel_timeout": timeout_s,
            "transport_factory": transport_factory(route),
            "auth_strategy": Authentication(login, node=route.title, user=route.user, keys=route.keys, next_command=route.target),
        },
    )
    connection.client.set_missing_host_key_policy(host_key_check(route))
    started = time.monotonic()
    try:
        connection.open()
    except (SSHException, EOFError, OSError) as error:
        close_connection(connection)
        raise NodeFailed(describe_failure(route, error, time.monotonic() - started)) from error
    except NodeFailed:
        close_connection(connection)
        raise
    connection.transport.sock.settimeout(TICK_S)
    return connection


def close_connection(connection: Connection) -> None:
    """Close it and see its thread end: that thread's last word may go through a jump host's connection, which is closed next."""
    transport = connection.client.get_transport()
    if transport is not None:
        with contextlib.suppress(OSError):  # gone already
            transport.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which sleeps for a second at a time
        connection.client.close()
        transport.join(LEAVE_S)


def host_key_check(route: Route) -> HostKeyCheck:
    return HostKeyCheck(
        node=route.title,
        host=route.host,
        port=route.port,
        known=route.known,
        file=route.known_hosts,
        scan_prefix=route.scan_prefix,
    )


def transport_factory(route: Route) -> Any:
    """Makes the transport ask for the kinds of host key that are known, and for the cheapest cipher."""

    def make(tunnel: Any, **options: Any) -> Transport:
        transport = Transport(tunnel, **options)
        security = transport.get_security_options()
        kinds = [name for kind in KINDS if any(key.kind == kind for key in route.known) for name in SIGNATURES.get(kind, (kind,))]
        security.key_types = (*kinds, *(name for name in security.key_types if name not in kinds))
        security.ciphers = (*FIRST_CIPHERS, *(name for name in security.ciphers if name not in FIRST_CIPHERS))
        return transport

    return make


def describe_failure(route: Route, error: Exception, seconds: float) -> str:
    """What went wrong between the first packet and the login."""
    place = f"port {route.port} of {route.host}"
    look = f"  Next: ssh -v {route.target} true"
    if isinstance(error, IncompatiblePeer):
        return f"{route.title}: its sshd and this machine have no algorithm in common ({error}). Is it very old?\n{look}"
    if isinstance(error, TimeoutError):
        return timeout_text(route, seconds)
    text = str(error) or type(error).__name__
    # paramiko goes on without a session when the handshake takes too long, and then finds that it has none
    if "banner" in text or "No existing session" in text or isinstance(error, EOFError | ConnectionResetError):
        return (
            f"{route.title}: {place} takes a connection but does not talk SSH ({text}) within {seconds:.1f} s. Is it really sshd's port, or "
            f"is its sshd at its limit (MaxStartups)?\n{look}"
        )
    return f"{route.title}: no SSH connection: {text}\n{look}"


def describe_dial(route: Route, error: OSError, seconds: float) -> str:
    """What went wrong before the first packet."""
    look = f"  Next: ssh -v {route.target} true"
    if isinstance(error, socket.gaierror):
        return (
            f"{route.title}: no address is known for the name {route.host!r} ({error.strerror}). Write its address as `host` in the cluster "
            f"file, or HostName in {route.config}\n  Next: getent hosts {route.host}"
        )
    if isinstance(error, TimeoutError):
        return timeout_text(route, seconds)
    if isinstance(error, FileNotFoundError):
        return f"{route.title}: the program of its ProxyCommand was not found: {route.proxy_command}\n  Next: look at {route.config}"
    if error.errno == errno.ECONNREFUSED:
        return (
            f"{route.title}: nothing listens on port {route.port} of {route.host} (connection refused). Does sshd run there, and is the port "
            f"right (cluster file nodes[].port, or Port in {route.config})?\n{look}"
        )
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
        return f"{route.title}: there is no way to {route.host} from here ({error.strerror}). Is it switched on and in a network that this machine reaches?\n{look}"
    return f"{route.title}: no connection to port {route.port} of {route.host}: {error}\n{look}"


def timeout_text(route: Route, seconds: float) -> str:
    return (
        f"{route.title}: no answer from port {route.port} of {route.host} within {seconds:.1f} s. Is it switched on, and does a firewall drop "
        f"the packets?\n  Next: ssh -v {route.target} true"
    )
