"""How a node is reached, by the cluster file and the ssh config together; and the socket to it."""

import contextlib
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.background import in_background
from launcher.ssh.config_keyword import find_ignored
from launcher.ssh.known_hosts import DEFAULT_PORT, KnownKey, keys_of, known_name
from launcher.ssh.ssh_config import SshFiles

NO_FILES = ("none", "/dev/null")  # an empty list of known hosts would refuse every node: the usual file is read


@dataclass(frozen=True, kw_only=True)
class SshTarget:
    """`host`: the address to connect to; `node`: the name in the cluster file. `jumps`: user@host:port, in the order of connecting."""

    node: str
    host: str
    port: int
    user: str
    jumps: tuple[str, ...]
    proxy_command: str
    keys: tuple[Path, ...]
    known: tuple[KnownKey, ...]
    known_hosts: Path  # the file that error messages advise to write to
    config: Path
    name: str = ""  # in known_hosts and certificates, without the port
    agent: str = ""  # the socket of its agent; '' = SSH_AUTH_SOCK, `none` = no agent
    certificates: tuple[Path, ...] = ()
    ignored: tuple[str, ...] = ()  # one line for each keyword of the ssh config that is not honoured

    @property
    def is_tunnelled(self) -> bool:
        """Whether the TCP connection of this machine ends at another machine or program than the node."""
        return bool(self.jumps or self.proxy_command)

    @property
    def title(self) -> str:
        return f"{self.node} ({self.user}@{self.host}:{self.port})" if self.node != self.host else f"{self.user}@{self.host}:{self.port}"

    @property
    def ssh_arguments(self) -> str:
        """The arguments of `ssh` with which a person reaches the node."""
        jumps = ("-J", ",".join(self.jumps)) if self.jumps else ()
        return shlex.join((*jumps, "-p", str(self.port), f"{self.user}@{self.node}"))

    @property
    def scan_prefix(self) -> str:
        """`ssh JUMP ` where only the last jump host reaches the node, '' otherwise."""
        if not self.jumps:
            return ""
        before = ("-J", ",".join(self.jumps[:-1])) if self.jumps[1:] else ()
        return shlex.join(("ssh", *before, f"ssh://{self.jumps[-1].removeprefix('ssh://')}")) + " "


def find_target(node: Node, files: SshFiles) -> SshTarget:
    """The cluster file overrides the ssh config."""
    settings = files.settings
    config = files.config.lookup(node.host)
    host = config.get("hostname", node.host)
    port = node.port if node.port is not None else int(config.get("port", DEFAULT_PORT))
    own_known = tuple(Path(word).expanduser() for word in shlex.split(config.get("userknownhostsfile", "")) if word not in NO_FILES)
    known_hosts = own_known + settings.known_hosts[1:] if own_known else settings.known_hosts
    name = config.get("hostkeyalias", known_name(host, port))
    identities = tuple(Path(path).expanduser() for path in config.get("identityfile", ()))
    configured = configured_jumps(config.get("proxyjump", ""), (node.host, node.port), (host, port))
    jumps = split_jumps(node.jump) if node.jump else configured  # `none` in the cluster file: a direct connection
    return SshTarget(
        node=node.host,
        host=host,
        port=port,
        user=node.user or config.get("user", settings.user),
        jumps=jumps,
        proxy_command="" if jumps or node.jump else config.get("proxycommand", ""),
        keys=identities if config.get("identitiesonly") == "yes" and identities else (*identities, *settings.keys),
        known=keys_of(name, files.known(known_hosts)),
        known_hosts=known_hosts[0],
        config=settings.config,
        name=config.get("hostkeyalias", host),
        agent=config.get("identityagent", ""),
        certificates=(Path(certificate).expanduser(),) if (certificate := config.get("certificatefile", "none")) not in NO_FILES else (),
        ignored=(*find_ignored(config), *files.remarks),
    )


def configured_jumps(text: str, *own: tuple[str, int | None]) -> tuple[str, ...]:
    """The ProxyJump of the ssh config; () for the jump host itself, which a ProxyJump under `Host *` applies to as well. `own`: name and
    address of the node."""
    jumps = split_jumps(text)
    first = node_of(jumps[0]) if jumps else None
    return () if first is not None and {(first.host, first.port), (first.host, first.port or DEFAULT_PORT)} & {*own} else jumps


def split_jumps(text: str) -> tuple[str, ...]:
    return () if text.strip().lower() in ("", "none") else tuple(part.strip() for part in text.split(","))


def node_of(jump: str) -> Node:
    """user@host:port, user@[v6]:port or a name in the ssh config, as a Node."""
    user, _, rest = jump.removeprefix("ssh://").rpartition("@")
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = rest.partition(":") if rest.count(":") == 1 else (rest, "", "")
    if not host or (port and not port.isdecimal()):
        raise NodeFailed(f"{jump!r} is not a jump host: write user@host:port (cluster file nodes[].jump, or ProxyJump in the ssh config)")
    return Node(host=host, user=user, port=int(port) if port else None)


def dial(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """A TCP connection to the first address that answers; raises OSError of the last one. The addresses share the time limit."""
    deadline = time.monotonic() + timeout_s
    addresses = find_addresses(host, port, timeout_s=timeout_s)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.1, (deadline - time.monotonic()) / (len(addresses) - index)))
            connection.connect(address)
        except OSError:
            connection.close()
            if index == len(addresses) - 1:
                raise
        else:
            return connection
    raise OSError(f"{host} has no address")


def find_addresses(host: str, port: int, *, timeout_s: float) -> list[Any]:
    """socket.getaddrinfo with a timeout: without one, name servers that do not answer take half a minute. Raises socket.gaierror."""
    with contextlib.suppress(socket.gaierror, UnicodeError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    try:
        return in_background(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)).result(timeout_s)
    except TimeoutError:
        raise socket.gaierror(socket.EAI_AGAIN, f"no answer from the name servers within {timeout_s:g} s") from None
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "not a valid host name") from error


def start_proxy(command: str) -> "tuple[socket.socket, subprocess.Popen[bytes]]":
    """A ProxyCommand, and the socket to its stdin and stdout. It is started without a shell. Raises OSError."""
    near, far = socket.socketpair()
    with far:
        try:
            return near, subprocess.Popen(shlex.split(command), stdin=far.fileno(), stdout=far.fileno())
        except OSError:
            near.close()
            raise


def watch_socket(connection: socket.socket, *, silence_s: float) -> None:
    """Let the kernel notice a lost node within `silence_s`: it asks after a third of it and gives up after two thirds. SSH keep-alive does not
    help: paramiko sends it, but ignores a missing answer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(silence_s / 3))),
        ("TCP_KEEPINTVL", max(1, round(silence_s / 6))),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", round(silence_s * 2000 / 3)),
    ):
        if hasattr(socket, name):  # macOS lacks some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
