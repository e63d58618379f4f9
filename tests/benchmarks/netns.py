"""Lightweight hosts: network namespaces on one bridge, each with its own sshd, host key, address and empty home. Needs root, ip and sshd.

with light_hosts(32, folder) as hosts: ...
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213"
BRIDGE_ADDRESS = f"{NETWORK}.0.1/16"
DEAD_ADDRESS = f"{NETWORK}.255.1"  # frames to it are dropped, as for a host that is off behind a router
DEAD_LLADDR = "02:00:00:00:00:fe"
PORT = 22
# ip netns exec creates a mount namespace: an empty home keeps the login files of this machine out of the measurement.
START = 'mount -t tmpfs none /root && exec /usr/sbin/sshd -D -f "$1" -E "$2"'


@dataclass(frozen=True, kw_only=True)
class Host:
    name: str
    link: str  # the end of its veth pair on this machine
    address: str
    folder: Path

    def unplug(self) -> None:
        run("ip", "link", "set", self.link, "down")


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """`key`: the private key of root on all hosts. `known_hosts`: hashed, as ssh-keyscan -H writes it."""

    all: tuple[Host, ...]
    key: Path
    known_hosts: Path


def run(*argv: str, text: str = "") -> None:
    subprocess.run(argv, input=text, text=True, check=True, capture_output=True)


def address_of(number: int) -> str:
    return f"{NETWORK}.{1 + number // 250}.{1 + number % 250}"


@contextlib.contextmanager
def light_hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """Start `count` hosts, and in any case stop each of them at the end, by its pid and name."""
    tag = f"{os.getpid() % 0xFFFF:x}"
    bridge, processes = f"olb{tag}", []
    hosts = tuple(
        Host(name=f"ol{tag}-{number}", link=f"olv{tag}n{number}", address=address_of(number), folder=folder / f"host{number}")
        for number in range(count)
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    try:
        make_bridge(bridge)
        for host in hosts:
            plug_in(host, bridge)
        run(
            "ip", "neigh", "add", DEAD_ADDRESS, "lladdr", DEAD_LLADDR, "dev", bridge, "nud", "permanent"
        )  # a bridge loses it when it gets its first port
        processes = [start_sshd(host, folder / "key.pub") for host in hosts]
        wait_ready(hosts)
        yield Hosts(all=hosts, key=folder / "key", known_hosts=write_known_hosts(hosts, folder / "known_hosts"))
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for host in hosts:
            for pid in subprocess.run(("ip", "netns", "pids", host.name), capture_output=True, text=True).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            # the veth pair first: a namespace exists longer than its name while a socket in it waits for an answer
            subprocess.run(("ip", "link", "del", host.link), capture_output=True)
            subprocess.run(("ip", "netns", "del", host.name), capture_output=True)
        subprocess.run(("ip", "link", "del", bridge), capture_output=True)


def make_bridge(bridge: str) -> None:
    run("ip", "link", "add", bridge, "type", "bridge")
    run("ip", "addr", "add", BRIDGE_ADDRESS, "dev", bridge)
    run("ip", "link", "set", bridge, "up")


def plug_in(host: Host, bridge: str) -> None:
    run("ip", "netns", "add", host.name)
    run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    run("ip", "link", "set", host.link, "master", bridge, "up")
    inside = f"link set lo up\naddr add {host.address}/16 dev eth0\nlink set eth0 up\n"
    run("ip", "-n", host.name, "-batch", "-", text=inside)


def start_sshd(host: Host, public_key: Path) -> "subprocess.Popen[bytes]":
    host.folder.mkdir()
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "host"))
    lines = (
        f"ListenAddress {host.address}",
        f"Port {PORT}",
        f"HostKey {host.folder / 'host'}",
        f"AuthorizedKeysFile {public_key}",
        f"PidFile {host.folder / 'pid'}",
        "StrictModes no",
        "UsePAM no",
        "UseDNS no",
    )
    (host.folder / "config").write_text("\n".join(lines) + "\n")
    argv = ("ip", "netns", "exec", host.name, "sh", "-c", START, "sh", str(host.folder / "config"), str(host.folder / "log"))
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL)


def wait_ready(hosts: tuple[Host, ...]) -> None:
    """sshd writes its pid file when it is listening."""
    deadline = time.monotonic() + 60
    for host in hosts:
        while not (host.folder / "pid").exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"{host.name}: sshd did not start within 60 s: {(host.folder / 'log').read_text()}")
            time.sleep(0.02)


def write_known_hosts(hosts: tuple[Host, ...], path: Path) -> Path:
    keys = [(host.address, (host.folder / "host.pub").read_text().split()[:2]) for host in hosts]
    path.write_text("".join(f"{address} {' '.join(key)}\n" for address, key in keys))
    run("ssh-keygen", "-q", "-H", "-f", str(path))
    return path
