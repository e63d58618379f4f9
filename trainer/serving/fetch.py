"""Fetch an image from an allowed host. The URL is parsed once and the name resolved once, and only that address is connected to."""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11

from trainer.contract import InputRefused
from trainer.contract.public_address import choose
from trainer.serving.refusal import RequestRefused, invalid

# The only URL parser: what does not match is refused, so that no second parser can read it differently. No user, no backslash, no non-ASCII
# letter, no escape in the host, no fragment. A numeric address matches as a name, but stage.serving.hosts cannot contain one.
URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]{1,253})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(?P<query>\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?"
)
MOST_URL = 2048  # characters
NAME = re.compile(
    r"(?=.{1,253}(?::|$))(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?(?::(?P<port>[0-9]{1,5}))?"
)
PORTS = {"https": 443, "http": 80}
PIECE_BYTES = 1 << 16

Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, kw_only=True)
class FetchTarget:
    scheme: str
    host: str
    port: int
    path: str


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of the name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """`hosts`: allowed names, with a port unless it is the default of the scheme. `resolve` and `connect`: replaced in tests."""

    hosts: frozenset[str]
    timeout_s: float
    most_bytes: int
    resolve: Resolve = resolve
    connect: Connect = asyncio.open_connection
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    async def fetch(self, url: str, param: str, reserve: Callable[[int], None]) -> bytes:
        """`reserve` is called with each number of bytes before they are kept. Raises RequestRefused."""
        target = self.read_url(url, param)
        try:
            async with asyncio.timeout(self.timeout_s):
                address = choose(await self.resolve(target.host, target.port))
                if address is None:
                    raise invalid(param, f"{target.host} has no address, or one that is not on the public internet", "image_not_fetched")
                return await self.get(target, address, param, reserve)
        except TimeoutError:
            raise invalid(param, f"{target.host} did not send the image within {self.timeout_s:g} s", "image_not_fetched") from None
        except (OSError, h11.RemoteProtocolError, asyncio.IncompleteReadError):  # name resolution, connection, certificate, protocol
            raise invalid(param, f"the image could not be fetched from {target.host}", "image_not_fetched") from None

    def read_url(self, url: str, param: str) -> FetchTarget:
        found = URL.fullmatch(url) if len(url) <= MOST_URL else None
        if found is None:
            raise invalid(param, "must be data:image/...;base64,... or a plain http or https URL", "image_not_fetched")
        scheme, host = found["scheme"], found["host"].lower()
        port = int(found["port"] or PORTS[scheme])
        if f"{host}:{port}" not in self.hosts and not (host in self.hosts and port == PORTS[scheme]):
            raise invalid(param, "images are not fetched from this host; send the image as data:image/png;base64,...", "host_not_allowed")
        return FetchTarget(scheme=scheme, host=host, port=port, path=(found["path"] or "/") + (found["query"] or ""))

    async def get(self, target: FetchTarget, address: str, param: str, reserve: Callable[[int], None]) -> bytes:
        """Connects to `address` only; a certificate must be valid for the name."""
        secure: dict[str, Any] = {"ssl": self.tls, "server_hostname": target.host} if target.scheme == "https" else {}
        reader, writer = await self.connect(address, target.port, **secure)
        try:
            protocol = h11.Connection(h11.CLIENT)
            default = target.port == PORTS[target.scheme]
            headers = [
                ("Host", target.host if default else f"{target.host}:{target.port}"),
                ("Accept", "image/png, image/jpeg, image/webp, image/gif"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", "omnilaunch"),
                ("Connection", "close"),
            ]
            request = protocol.send(h11.Request(method="GET", target=target.path, headers=headers))
            writer.write((request or b"") + (protocol.send(h11.EndOfMessage()) or b""))
            return await self.read_image(protocol, reader, param, reserve)
        finally:
            writer.transport.abort()  # nothing is left to send or to receive

    async def read_image(self, protocol: h11.Connection, reader: asyncio.StreamReader, param: str, reserve: Callable[[int], None]) -> bytes:
        content = bytearray()
        while True:
            event = protocol.next_event()
            if event is h11.NEED_DATA:
                protocol.receive_data(await reader.read(PIECE_BYTES))
            elif isinstance(event, h11.Response):
                self.check_response(event, param)
            elif isinstance(event, h11.Data):
                if len(content) + len(event.data) > self.most_bytes:
                    raise self.too_large(param)
                reserve(len(event.data))
                content += event.data
            elif not isinstance(event, h11.InformationalResponse):  # the end of the message
                return bytes(content)

    def check_response(self, response: h11.Response, param: str) -> None:
        headers = {name.lower(): value for name, value in response.headers}
        if 300 <= response.status_code < 400:
            raise invalid(param, "the URL redirects, and redirects are not followed: give the URL of the image itself", "image_not_fetched")
        if response.status_code != 200:
            raise invalid(param, f"the host answered with status {response.status_code}", "image_not_fetched")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise invalid(param, "the host sent a compressed body, which was not requested", "image_not_fetched")
        length = headers.get(b"content-length", b"0")
        if int(length[:20]) > self.most_bytes:  # h11 already refused a value that is not a number
            raise self.too_large(param)

    def too_large(self, param: str) -> RequestRefused:
        return invalid(param, f"the image has more than {self.most_bytes} bytes: use a smaller one", "image_too_large")


def read_hosts(hosts: tuple[str, ...]) -> frozenset[str]:
    """Raises InputRefused for an entry that is not a host name."""
    for host in hosts:
        found = NAME.fullmatch(host)
        if found is None or not 0 < int(found["port"] or 443) < 65536:
            raise InputRefused(
                f"stage.serving.hosts: {host!r} is not a lower-case host name with an optional port\n    write "
                "images.example.org or images.example.org:8443; numeric addresses are not allowed"
            )
    return frozenset(hosts)
