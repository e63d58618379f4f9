"""Opens one SSH connection, or reports why that is not possible. Unknown and changed host keys are refused."""

import contextlib
import errno
import select
import socket
import time
from typing import Any

from fabric import Config, Connection  # type: ignore[import-untyped]
from paramiko import IncompatiblePeer, SSHConfig, SSHException, Transport  # type: ignore[import-untyped]

from launcher.errors import NodeFailed
from launcher.ssh.hostkey_check import HostKeyCheck
from launcher.ssh.known_hosts import KINDS
from launcher.ssh.offer import find_gap, read_offer
from launcher.ssh.ssh_config import Authentication, SshFiles
from launcher.ssh.target import SshTarget

# The signature algorithms of an RSA key, whose kind names only the key.
SIGNATURES = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
# AES-GCM verifies a packet while it decrypts it; other ciphers need a second pass, in Python.
FIRST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
TICK_S = 1.0  # how often an idle transport thread wakes; paramiko's own 0.1 s costs 7 % of a core at 128 nodes
LEAVE_S = 1.0
OFFER_S = 5.0
CERTIFICATE = "-cert-v01@openssh.com"  # ends the name of a kind of host key that an authority has signed


def wait_banner(target: SshTarget, tunnel: Any, *, timeout_s: float) -> None:
    """Wait for the first bytes, which sshd sends; NodeFailed when there are none. A tunnel is not waited for."""
    if isinstance(tunnel, socket.socket):
        poll = select.poll()
        poll.register(tunnel, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            tunnel.close()
            raise NodeFailed(describe_failure(target, SSHException("no banner"), timeout_s))


def open_connection(target: SshTarget, files: SshFiles, tunnel: Any, *, timeout_s: float) -> Connection:
    """An open and authenticated Fabric connection over `tunnel` (a socket, or a channel of a jump host). Raises NodeFailed."""
    connection = Connection(
        target.host,
        user=target.user,
        port=target.port,
        # Only the ssh config decides how a node is reached, and `target` has read it: no fabric.yaml. Each connection has a config of its own,
        # since Fabric writes the connection's settings into it.
        config=Config(ssh_config=SSHConfig(), lazy=True),
        gateway=False,
        connect_kwargs={
            "sock": tunnel,
            "timeout": timeout_s,
            "banner_timeout": timeout_s,
            "auth_timeout": timeout_s,
            "channel_timeout": timeout_s,
            "transport_factory": transport_factory(target),
            "auth_strategy": Authentication(
                files,
                node=target.title,
                user=target.user,
                keys=target.keys,
                next_command=target.ssh_arguments,
                agent=target.agent,
                certificates=target.certificates,
            ),
        },
    )
    connection.client.set_missing_host_key_policy(HostKeyCheck(target=target))
    started = time.monotonic()
    try:
        connection.open()
    except (SSHException, EOFError, OSError) as error:
        close_connection(connection)
        raise NodeFailed(describe_failure(target, error, time.monotonic() - started)) from error
    except NodeFailed:
        close_connection(connection)
        raise
    connection.transport.sock.settimeout(TICK_S)
    return connection


def close_connection(connection: Connection) -> None:
    """Close it and wait for its thread, which may still send through the connection of a jump host, and that is closed next."""
    transport = connection.client.get_transport()
    if transport is not None:
        with contextlib.suppress(OSError):  # it is closed already
            transport.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which sleeps for a second at a time
        connection.client.close()
        transport.join(LEAVE_S)


def transport_factory(target: SshTarget) -> Any:
    """A transport that asks for the kinds of host key that are known, then for certificates if an authority is known, and for the cheapest
    cipher."""

    def make(tunnel: Any, **options: Any) -> Transport:
        transport = Transport(tunnel, **options)
        security = transport.get_security_options()
        plain = [
            name
            for kind in KINDS
            if any(key.kind == kind for key in target.known if not key.authority)
            for name in SIGNATURES.get(kind, (kind,))
        ]
        signed = any(key.authority for key in target.known)
        kinds = [*plain, *(f"{name}{CERTIFICATE}" for kind in KINDS for name in SIGNATURES.get(kind, (kind,)) if signed)]
        security.key_types = (*kinds, *(name for name in security.key_types if name not in kinds))
        security.ciphers = (*FIRST_CIPHERS, *(name for name in security.ciphers if name not in FIRST_CIPHERS))
        return transport

    return make


def describe_failure(target: SshTarget, error: Exception, seconds: float) -> str:
    """An error between the first packet and the login."""
    port = f"port {target.port} of {target.host}"
    next_step = f"  Next: ssh -v {target.ssh_arguments} true"
    if isinstance(error, IncompatiblePeer):
        return describe_gap(target, error)
    if isinstance(error, TimeoutError):
        return timeout_text(target, seconds)
    text = str(error) or type(error).__name__
    # paramiko reports a handshake that takes too long as a missing session
    if "banner" in text or "No existing session" in text or isinstance(error, EOFError | ConnectionResetError):
        return (
            f"{target.title}: {port} accepts connections but did not answer with SSH ({text}) within {seconds:.1f} s. Is it the port of "
            f"sshd, and is its sshd below its limit (MaxStartups)?\n{next_step}"
        )
    return f"{target.title}: no SSH connection: {text}\n{next_step}"


def describe_gap(target: SshTarget, error: IncompatiblePeer) -> str:
    """Which list has nothing in common, as the node itself says it."""
    offer = {} if target.is_tunnelled else read_offer(target.host, target.port, timeout_s=OFFER_S)
    gap, line = find_gap(offer)
    if not gap:
        return (
            f"{target.title}: its sshd and this machine have no algorithm in common ({error})\n  Next: ssh -v {target.ssh_arguments} true"
        )
    return (
        f"{target.title}: its sshd and this machine have no algorithm in common. {gap}\n"
        f"  Next: on the node, add the line `{line}` to /etc/ssh/sshd_config, and restart sshd; or reach it through a jump host that has one"
    )


def describe_dial(target: SshTarget, error: OSError, seconds: float) -> str:
    """An error before the first packet."""
    next_step = f"  Next: ssh -v {target.ssh_arguments} true"
    if isinstance(error, socket.gaierror):
        return (
            f"{target.title}: the name {target.host!r} could not be resolved ({error.strerror}). Write its address as `host` in the cluster "
            f"file, or as HostName in {target.config}\n  Next: getent hosts {target.host}"
        )
    if isinstance(error, TimeoutError):
        return timeout_text(target, seconds)
    if isinstance(error, FileNotFoundError):
        return f"{target.title}: the program of its ProxyCommand was not found: {target.proxy_command}\n  Next: correct ProxyCommand in {target.config}"
    if error.errno == errno.ECONNREFUSED:
        return (
            f"{target.title}: port {target.port} of {target.host} refused the connection. Does sshd run there, and is the port correct (cluster "
            f"file nodes[].port, or Port in {target.config})?\n{next_step}"
        )
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
        return f"{target.title}: {target.host} is not reachable ({error.strerror}). Is it on, and is there a route to its network?\n{next_step}"
    return f"{target.title}: no connection to port {target.port} of {target.host}: {error}\n{next_step}"


def timeout_text(target: SshTarget, seconds: float) -> str:
    return (
        f"{target.title}: no answer from port {target.port} of {target.host} within {seconds:.1f} s. Is it switched on, and does a firewall drop "
        f"the packets?\n  Next: ssh -v {target.ssh_arguments} true"
    )
