"""What an sshd offers before a login: the lists of its first packet (RFC 4253, section 7.1). Asked only when no algorithm is common."""

import contextlib
import socket
import struct
from collections.abc import Sequence

from paramiko import Transport  # type: ignore[import-untyped]

# The lists in the order of the packet, and the keyword of sshd_config that has each.
LISTS = ("KexAlgorithms", "HostKeyAlgorithms", "Ciphers", "Ciphers", "MACs", "MACs")
KEXINIT = 20
COOKIE_BYTES = 16
MOST_BYTES = 64 * 1024
NAME = b"SSH-2.0-omnilaunch\r\n"
SHOWN = 4


def read_offer(host: str, port: int, *, timeout_s: float) -> dict[str, tuple[str, ...]]:
    """Keyword -> algorithms of an sshd; {} where it does not send them. For a node that is reached directly."""
    with contextlib.suppress(OSError, struct.error, ValueError), socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(NAME)
        text = b""
        while len(text) < MOST_BYTES:
            if lists := parse_offer(text):
                return lists
            if not (piece := connection.recv(MOST_BYTES)):
                break
            text += piece
    return {}


def parse_offer(text: bytes) -> dict[str, tuple[str, ...]]:
    """From the bytes that an sshd has sent so far; {} while they are not complete."""
    start = text.find(b"SSH-")
    end = text.find(b"\n", start)
    packet = text[end + 1 :]
    if start < 0 or end < 0 or len(packet) < 6:
        return {}
    length, _, kind = struct.unpack(">IBB", packet[:6])
    if kind != KEXINIT or len(packet) < 4 + length:
        return {}
    place, found = 6 + COOKIE_BYTES, dict[str, tuple[str, ...]]()
    for keyword in LISTS:
        (size,) = struct.unpack(">I", packet[place : place + 4])
        found.setdefault(keyword, tuple(packet[place + 4 : place + 4 + size].decode("ascii").split(",")))
        place += 4 + size
    return found


def own_offer() -> dict[str, tuple[str, ...]]:
    """What this machine's SSH library can do."""
    lists = (Transport._preferred_kex, Transport._key_info, Transport._preferred_ciphers, Transport._preferred_macs)
    return {keyword: tuple(names) for keyword, names in zip(dict.fromkeys(LISTS), lists, strict=True)}


def find_gap(server: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """(what has no algorithm in common, a line of sshd_config that adds one); '' where there is no gap."""
    own = own_offer()
    for keyword, names in server.items():
        if not set(names) & set(own[keyword]):
            addition = preferred(keyword, own[keyword])
            return f"{keyword}: the node allows only {shorten(names)}; omnilaunch can do {shorten(own[keyword])}", f"{keyword} +{addition}"
    return "", ""


def preferred(keyword: str, names: Sequence[str]) -> str:
    """The safest that can be added: authenticated encryption, and a MAC over the encrypted packet."""
    return next((name for name in names if "gcm" in name or "-etm" in name), names[0])


def shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
