"""The address that the server listens on, and who may connect. Checked before the model is loaded."""

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
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "[::1]", "localhost"})  # in the Host header of a request from this machine
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::\d{1,5})?")
LEAST_TOKEN = 16  # characters
TOKEN = re.compile(r"[!-~]+")
BACKLOG = 1024  # connections that the kernel holds while this process is busy


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """`listener` is a bound socket. `token`: what every request must send, '' if none is required."""

    listener: socket.socket
    loopback: bool
    token: str

    @property
    def url(self) -> str:
        address, port = self.listener.getsockname()[:2]
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(address, address)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def open_endpoint(serving: Serving, environ: Mapping[str, str]) -> Endpoint:
    """Raises InputRefused for a public address without a token, an unusable token, and a port that is not available."""
    address = read_address(serving.address)
    token = read_token(serving.token, environ)
    if serving.address not in LOOPBACK and not token:
        raise InputRefused(
            f"stage.serving.address={serving.address} can be reached from other machines, but stage.serving.token is empty\n    export a "
            "token and set stage.serving.token=SERVE_TOKEN cluster.secrets=[SERVE_TOKEN] (the name of the variable), or listen on 127.0.0.1"
        )
    return Endpoint(listener=bind(address, serving.port), loopback=serving.address in LOOPBACK, token=token)


def read_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise InputRefused(
            f"stage.serving.address={text} is not an IP address\n    set 127.0.0.1 for this machine only, or 0.0.0.0 or :: for all of its networks"
        ) from None


def read_token(name: str, environ: Mapping[str, str]) -> str:
    """The value of the variable `name`. It is never part of a message."""
    if not name:
        return ""
    token = environ.get(name, "")
    advice = f"\n    run export {name}=$(openssl rand -hex 32), and set cluster.secrets=[{name}] to pass it to the server"
    if not token:
        raise InputRefused(f"stage.serving.token={name}: this environment variable is not set or empty{advice}")
    if len(token) < LEAST_TOKEN or not TOKEN.fullmatch(token):
        raise InputRefused(
            f"stage.serving.token={name}: the token must have at least {LEAST_TOKEN} characters, all printable ASCII{advice}"
        )
    return token


def bind(address: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputRefused(f"stage.serving.port={port} is not a port number\n    set one from 1024 to 65535, or 0 for any free port")
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else connections in TIME_WAIT prevent a restart
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
            f"stage.serving.port={port}: {where} is already in use\n    stop that program (ss -ltnp 'sport = :{port}' shows it), or set "
            f"stage.serving.port={port + 1 if port < 65535 else 8000}"
        )
    if error.errno == errno.EACCES:
        return f"stage.serving.port={port}: permission denied for {where}\n    set a port from 1024 to 65535"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"stage.serving.address={address}: this machine does not have this address\n    set one that `ip address` lists, or 127.0.0.1"
        )
    return f"stage.serving.address={address}, port={port}: cannot listen: {error.strerror}\n    set another address or port"


def tokens_match(token: str, given: str) -> bool:
    """Constant-time comparison."""
    return hmac.compare_digest(hashlib.sha256(token.encode()).digest(), hashlib.sha256(given.encode("latin-1")).digest())


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine. It does not after DNS rebinding: the page's own host name is sent then."""
    found = HOST.fullmatch(host)
    return found is not None and found[1].lower() in LOOPBACK_HOSTS
