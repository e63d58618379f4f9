"""Where a server listens and who may come in, judged before a model is loaded."""

import errno
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.contract import InputRefused, Serving

LOOPBACK = ("127.0.0.1", "::1")
OWN_NAMES = frozenset({"127.0.0.1", "[::1]", "localhost"})  # by which a browser on this machine calls it
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::\d{1,5})?")
LEAST_TOKEN = 16  # characters
TOKEN = re.compile(r"[!-~]+")
BACKLOG = 1024  # connections that the kernel holds while this process is busy


@dataclass(frozen=True, kw_only=True)
class Door:
    """`listener` is bound. `token`: what every request must carry, '' for none."""

    listener: socket.socket
    loopback: bool
    token: str

    @property
    def url(self) -> str:
        address, port = self.listener.getsockname()[:2]
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(address, address)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def open_door(serving: Serving, environ: Mapping[str, str]) -> Door:
    """Raises InputRefused for an address without a token, a token that is none, and a port that cannot be had."""
    address = read_address(serving.address)
    token = read_token(serving.token, environ)
    if serving.address not in LOOPBACK and not token:
        raise InputRefused(
            f"stage.serving.address={serving.address} can be reached from other machines, and stage.serving.token is empty\n    export a "
            "token and name its variable: stage.serving.token=SERVE_TOKEN cluster.secrets=[SERVE_TOKEN]; or listen on 127.0.0.1"
        )
    return Door(listener=bind(address, serving.port), loopback=serving.address in LOOPBACK, token=token)


def read_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise InputRefused(
            f"stage.serving.address={text} is no IP address\n    set 127.0.0.1 for this machine alone, 0.0.0.0 or :: for all of its networks"
        ) from None


def read_token(name: str, environ: Mapping[str, str]) -> str:
    """The token itself is never said."""
    if not name:
        return ""
    token = environ.get(name, "")
    advice = f"\n    export {name}=$(openssl rand -hex 32), and name it in cluster.secrets=[{name}], so that it reaches the server"
    if not token:
        raise InputRefused(f"stage.serving.token={name}: there is no such variable here, or it is empty{advice}")
    if len(token) < LEAST_TOKEN or not TOKEN.fullmatch(token):
        raise InputRefused(f"stage.serving.token={name}: its value is not {LEAST_TOKEN} or more printable ASCII characters{advice}")
    return token


def bind(address: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputRefused(f"stage.serving.port={port} is no port\n    set one from 1024 to 65535, or 0 for any that is free")
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended a minute ago do not hold up a restart
    try:
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InputRefused(describe_bind(error, address, port)) from error
    return listener


def describe_bind(error: OSError, address: str, port: int) -> str:
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"stage.serving.port={port}: another program listens on {where}\n    end it (ss -ltnp 'sport = :{port}' names it), or set "
            f"stage.serving.port={port + 1 if port < 65535 else 8000}"
        )
    if error.errno == errno.EACCES:
        return f"stage.serving.port={port}: this user may not listen on {where}\n    set a port from 1024 to 65535"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"stage.serving.address={address}: this machine has no such address\n    take one of `ip address`, or 127.0.0.1"
    return f"stage.serving.address={address}, port={port}: cannot listen there: {error.strerror}\n    set others"


def knows(token: str, given: str) -> bool:
    """Whether they are equal, in a time that tells nothing of where they differ."""
    return hmac.compare_digest(hashlib.sha256(token.encode()).digest(), hashlib.sha256(given.encode("latin-1")).digest())


def names_us(host: str) -> bool:
    """Whether a Host header is that of a request to this machine: a page elsewhere whose name leads here carries its own name."""
    found = HOST.fullmatch(host)
    return found is not None and found[1].lower() in OWN_NAMES
