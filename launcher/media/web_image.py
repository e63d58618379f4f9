"""Get one image over HTTP. The host's name is resolved once, and only that address is connected to; redirects are followed by the same rules.

Addresses that are not on the public internet are refused: a row that somebody else wrote could name a service of this machine or its network.
Proxies of the environment are not used, since they would resolve the name again.
"""

import hashlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from trainer.contract.public_address import choose

PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 5
PIECE_BYTES = 2**16
HEAD_BYTES = 32
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that may be another one later
# Beginnings of files -> the ending of the name.
MAGICS: tuple[tuple[bytes, str], ...] = (
    *((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF87a", "gif"), (b"GIF89a", "gif"), (b"BM", "bmp")),
    *((b"II*\x00", "tif"), (b"MM\x00*", "tif"), (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "jp2")),
)
BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}  # ISO/IEC 14496-12, at byte 8


class NotFetched(Exception):
    """Why an image could not be fetched; `passing`: it may succeed later."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`timeout_s`: without a byte; `whole_s`: of one image. `private`: addresses of this machine and of private networks are allowed."""

    most_bytes: int = 64 * 2**20
    timeout_s: float = 30.0
    whole_s: float = 300.0
    private: bool = False
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)


@dataclass(frozen=True, kw_only=True)
class FetchedImage:
    """`sha256`, `bytes` and `kind`, the ending of its name, of what was written."""

    sha256: str
    bytes: int
    kind: str


def fetch_image(url: str, target: Path, limits: Limits, take: Callable[[int], None] = lambda _: None) -> FetchedImage:
    """Write the image to `target`. `take` is called with each number of bytes before they are written, and may raise. Raises NotFetched, and OSError
    for the file."""
    until = time.monotonic() + limits.whole_s
    for _ in range(MOST_REDIRECTS + 1):
        connection, headers, path = choose_connection(url, limits)
        try:
            answer = ask(connection, url, path, headers, limits)
            if answer.status not in REDIRECTS:
                check_answer(answer, limits)
                return receive(answer, target, limits, until, take)
            before, url = url, urljoin(url, answer.headers.get("Location", ""))
            if before.lower().startswith("https:") and not url.lower().startswith("https:"):
                raise NotFetched("redirects from https to an address that is not encrypted")
        finally:
            connection.close()
    raise NotFetched(f"redirects more than {MOST_REDIRECTS} times")


def choose_connection(url: str, limits: Limits) -> tuple[http.client.HTTPConnection, dict[str, str], str]:
    """(connection to an address that was chosen, headers, path and query). Raises NotFetched."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise NotFetched(f"is no valid URL: {error}") from error
    if parts.scheme not in PORTS:
        raise NotFetched(f"the scheme {parts.scheme or 'of it'!r} is not fetched: http and https are")
    if not parts.hostname or parts.username is not None:
        raise NotFetched("names a user: URLs with credentials are not fetched" if parts.hostname else "has no host")
    try:
        host = parts.hostname.encode("idna").decode()
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port or PORTS[parts.scheme], type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise NotFetched(f"{parts.hostname} has no address ({getattr(error, 'strerror', None) or error})", passing=True) from error
    address = choose_address(parts.hostname, addresses, limits)
    path = quote(parts.path or "/", safe=SAFE_PATH) + (f"?{quote(parts.query, safe=SAFE_QUERY)}" if parts.query else "")
    named = f"[{host}]" if ":" in host else host
    headers = {"Host": f"{named}:{port}" if port else named, "User-Agent": "omnilaunch", "Accept": "image/*", "Accept-Encoding": "identity"}
    return http.client.HTTPConnection(address, port or PORTS[parts.scheme], timeout=limits.timeout_s), headers, path


def ask(connection: http.client.HTTPConnection, url: str, path: str, headers: dict[str, str], limits: Limits) -> http.client.HTTPResponse:
    """The answer; a certificate must be valid for the name in the URL. Raises NotFetched."""
    host = str(urlsplit(url).hostname)
    try:
        connection.connect()
        if urlsplit(url).scheme == "https":
            connection.sock = limits.tls.wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotFetched(describe(error, host), passing=not isinstance(error, ssl.SSLCertVerificationError)) from error


SAFE_PATH = "/%:@!$&'()*+,;=~-._"
SAFE_QUERY = "/%:@!$&'()*+,;=~-._?"


def choose_address(host: str, addresses: Sequence[str], limits: Limits) -> str:
    """Raises NotFetched."""
    address = addresses[0] if limits.private and addresses else choose(addresses)
    if address is None:
        raise NotFetched(f"{host} is an address of this machine or of a private network; --allow-private fetches from it")
    return address


def check_answer(answer: http.client.HTTPResponse, limits: Limits) -> None:
    """Raises NotFetched."""
    if answer.status != 200:
        raise NotFetched(f"the host answered {answer.status} {answer.reason}", passing=answer.status in PASSING)
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise NotFetched("the host sent a compressed answer, which was not asked for")
    length = answer.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > limits.most_bytes:
        raise NotFetched(f"has {int(length):,} bytes, more than the limit of {limits.most_bytes:,} (--max-bytes)")


def receive(answer: http.client.HTTPResponse, target: Path, limits: Limits, until: float, take: Callable[[int], None]) -> FetchedImage:
    """Raises NotFetched, OSError."""
    digest, size, head = hashlib.sha256(), 0, b""
    with target.open("wb") as file:
        while piece := read_piece(answer):
            size += len(piece)
            if size > limits.most_bytes:
                raise NotFetched(f"has more than the limit of {limits.most_bytes:,} bytes (--max-bytes)")
            if time.monotonic() > until:
                raise NotFetched(f"did not arrive within {limits.whole_s:g} s", passing=True)
            take(len(piece))
            head = head if len(head) >= HEAD_BYTES else (head + piece)[:HEAD_BYTES]
            digest.update(piece)
            file.write(piece)
    if answer.length:  # bytes that the host announced and did not send
        raise NotFetched(f"ended {answer.length:,} bytes early", passing=True)
    kind = kind_of(head)
    if not kind:
        said = answer.headers.get("Content-Type", "no type").partition(";")[0]
        raise NotFetched(f"is no image: it begins with {head[:12]!r}, and its type is {said}" if size else "is empty")
    return FetchedImage(sha256=digest.hexdigest(), bytes=size, kind=kind)


def read_piece(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(PIECE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise NotFetched(describe(error, "the host"), passing=True) from error


def kind_of(head: bytes) -> str:
    """'' for what is none of the formats that are read."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "")
    return next((kind for magic, kind in MAGICS if head.startswith(magic)), "")


def describe(error: Exception, host: str) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer of {host} in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {host} is not valid: {error.verify_message}"
    return f"{host} could not be reached: {getattr(error, 'strerror', None) or error or type(error).__name__}"
