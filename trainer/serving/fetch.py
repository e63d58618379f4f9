"""An image from a host of the list: parsed once, resolved once, and fetched from that very address, with a bound on everything."""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11

from trainer.contract import InputRefused
from trainer.serving.address import choose
from trainer.serving.refusal import RequestRefused, wrong

# The one parser: what does not match is refused, so that no other reads it in another way. No user, no backslash, no letter beyond ASCII, no
# escape in the host, no fragment; an address in digits is a name like any other, which no list may hold.
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
    """Every address that the name has."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """`hosts`: names, with a port where it is not the scheme's own. `resolve` and `connect` are the network's."""

    hosts: frozenset[str]
    timeout_s: float
    most_bytes: int
    resolve: Resolve = resolve
    connect: Connect = asyncio.open_connection
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    async def fetch(self, url: str, param: str, take: Callable[[int], None]) -> bytes:
        """`take` is told each number of bytes before they are kept. Raises RequestRefused."""
        target = self.read_url(url, param)
        try:
            async with asyncio.timeout(self.timeout_s):
                address = choose(await self.resolve(target.host, target.port))
                if address is None:
                    raise wrong(param, f"{target.host} has an address that is not of the public internet", "image_not_fetched")
                return await self.get(target, address, param, take)
        except TimeoutError:
            raise wrong(param, f"{target.host} did not give the image within {self.timeout_s:g} s", "image_not_fetched") from None
        except (
            OSError,
            h11.RemoteProtocolError,
            asyncio.IncompleteReadError,
        ):  # a name without address, no connection, no such certificate
            raise wrong(param, f"the image could not be had from {target.host}", "image_not_fetched") from None

    def read_url(self, url: str, param: str) -> FetchTarget:
        found = URL.fullmatch(url) if len(url) <= MOST_URL else None
        if found is None:
            raise wrong(param, "is neither data:image/...;base64,... nor a plain URL of http or https", "image_not_fetched")
        scheme, host = found["scheme"], found["host"].lower()
        port = int(found["port"] or PORTS[scheme])
        if f"{host}:{port}" not in self.hosts and not (host in self.hosts and port == PORTS[scheme]):
            raise wrong(param, "images are not fetched from this host; send them as data:image/png;base64,...", "host_not_allowed")
        return FetchTarget(scheme=scheme, host=host, port=port, path=(found["path"] or "/") + (found["query"] or ""))

    async def get(self, target: FetchTarget, address: str, param: str, take: Callable[[int], None]) -> bytes:
        """Asks `address` and no other; a certificate must be that of the name."""
        secure: dict[str, Any] = {"ssl": self.tls, "server_hostname": target.host} if target.scheme == "https" else {}
        reader, writer = await self.connect(address, target.port, **secure)
        try:
            talk = h11.Connection(h11.CLIENT)
            default = target.port == PORTS[target.scheme]
            headers = [
                ("Host", target.host if default else f"{target.host}:{target.port}"),
                ("Accept", "image/png, image/jpeg, image/webp, image/gif"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", "omnilaunch"),
                ("Connection", "close"),
            ]
            asked = talk.send(h11.Request(method="GET", target=target.path, headers=headers))
            writer.write((asked or b"") + (talk.send(h11.EndOfMessage()) or b""))
            return await self.read_image(talk, reader, param, take)
        finally:
            writer.transport.abort()  # there is nothing to say any more, and nothing to wait for

    async def read_image(self, talk: h11.Connection, reader: asyncio.StreamReader, param: str, take: Callable[[int], None]) -> bytes:
        content = bytearray()
        while True:
            event = talk.next_event()
            if event is h11.NEED_DATA:
                talk.receive_data(await reader.read(PIECE_BYTES))
            elif isinstance(event, h11.Response):
                self.check_response(event, param)
            elif isinstance(event, h11.Data):
                if len(content) + len(event.data) > self.most_bytes:
                    raise self.too_large(param)
                take(len(event.data))
                content += event.data
            elif not isinstance(event, h11.InformationalResponse):  # the end
                return bytes(content)

    def check_response(self, response: h11.Response, param: str) -> None:
        headers = {name.lower(): value for name, value in response.headers}
        if 300 <= response.status_code < 400:
            raise wrong(param, "it leads elsewhere, and that is not followed: give the address of the image itself", "image_not_fetched")
        if response.status_code != 200:
            raise wrong(param, f"its host answered with status {response.status_code}", "image_not_fetched")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise wrong(param, "its host sends it compressed, which was not asked for", "image_not_fetched")
        length = headers.get(b"content-length", b"0")
        if int(length[:20]) > self.most_bytes:  # h11 has seen to it that it is a number
            raise self.too_large(param)

    def too_large(self, param: str) -> RequestRefused:
        return wrong(param, f"it has more than {self.most_bytes} bytes: give a smaller one", "image_too_large")


def read_hosts(hosts: tuple[str, ...]) -> frozenset[str]:
    """Raises InputRefused for what is no name of a host."""
    for host in hosts:
        found = NAME.fullmatch(host)
        if found is None or not 0 < int(found["port"] or 443) < 65536:
            raise InputRefused(
                f"stage.serving.hosts: {host!r} is no name of a host in small letters, with a port where it is not 443 or 80\n    write "
                "names as images.example.org or images.example.org:8443; addresses in digits are never fetched from"
            )
    return frozenset(hosts)
