"""Reads the text that a node's commands printed into facts. Pure; the commands are in `questions`."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from math import inf
from typing import Any

from launcher.config.schema import Accelerator
from launcher.doctor.network import Interface, IpRoute, NetworkView
from launcher.doctor.node_facts import GIB, Clock, Container, DiskSpace, Docker, FileMode, NodeFacts, PathDigest, RdmaPort
from launcher.doctor.smi import SmiDevice, UnreadableTable, nvidia_remarks, read_npu, read_npu_driver, read_nvidia
from launcher.doctor.smi_fault import SHOWN, SmiFault, find_faults
from launcher.errors import ImageFailed
from launcher.image.docker import read_image
from launcher.ssh.transport import Result

MARK = "=omnilaunch="
PATH_QUESTION = "content"  # and a number: the question for one path of the data or model
PODMAN = "the docker command on the node is podman's, not a Docker engine's"
TIMED_OUT = (124, 137)  # exit codes of coreutils' timeout: ended by TERM, by KILL
KIB_PER_GIB = 2**20
DEFAULT_ROUTE = "0.0.0.0/0"
LISTENING = "0A"  # the state of a listening socket in /proc/net/tcp


@dataclass(frozen=True, kw_only=True)
class CommandOutput:
    code: int
    output: str
    errors: str

    @property
    def good(self) -> str:
        """The output, or '' when the command failed."""
        return self.output if self.code == 0 else ""

    @property
    def failure(self) -> str:
        """Why it failed, in one line."""
        if self.code in TIMED_OUT:
            return "no answer in time: the command hangs"
        said = " ".join((self.errors or self.output).split())
        return said or f"exit code {self.code}"


NOT_ASKED = CommandOutput(code=127, output="", errors="was not asked")


def read_answers(done: Result) -> dict[str, CommandOutput]:
    """Name of the question -> its output: the two streams of the script, cut at the marks."""
    errors = dict(split_at_marks(done.errors))
    answers = {}
    for name, text in split_at_marks(done.output):
        output, _, code = text.rpartition(f"\n{MARK}code ")
        answers[name] = CommandOutput(code=int(code) if code.strip().isdigit() else 255, output=output, errors=errors.get(name, "").strip())
    return answers


def read_clock(text: str, *, sent_s: float, received_s: float) -> Clock:
    """From `date +%s.%N`, asked between the two times. Whole seconds where the node's date does not support %N; no bounds without an
    answer."""
    seconds, _, fraction = text.strip().partition(".")
    if not seconds.isdigit():
        return Clock(behind_s=-inf, ahead_s=inf)
    early_s, late_s = (float(f"{seconds}.{fraction}"),) * 2 if fraction.isdigit() else (float(seconds), float(seconds) + 1)
    return Clock(behind_s=early_s - received_s, ahead_s=late_s - sent_s)


def split_at_marks(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(f"\n{MARK} ")[1:]:
        name, _, rest = part.partition("\n")
        yield name, rest


def read_facts(
    host: str, accelerator: Accelerator, contents: tuple[str, ...], answers: Mapping[str, CommandOutput], clock: Clock
) -> NodeFacts:
    """All answers as facts. `contents`: the paths asked about, in order. An answer that is missing or unreadable leaves its fact empty."""

    def said(name: str) -> CommandOutput:
        return answers.get(name, NOT_ASKED)

    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB$", said("memory").good, re.MULTILINE))
    devices, faults = read_devices(accelerator, said("devices"), said("apps"))
    shell, _, connection = said("shell").good.partition("\n")
    return NodeFacts(
        host=host,
        machine=said("machine").good.strip(),
        kernel=said("kernel").good.strip(),
        hostname=said("hostname").good.strip(),
        boot=said("boot").good.strip(),
        user=said("user").good.strip(),
        shell=shell.strip(),
        memory_total_gib=int(memory.get("MemTotal", 0)) * 1024 / GIB,
        memory_available_gib=int(memory.get("MemAvailable", 0)) * 1024 / GIB,
        shm=read_disk_space("/dev/shm", said("shm").good),
        memlock_kib=int(said("memlock").good) if said("memlock").good.strip().isdigit() else None,
        root=read_root(said("root").good),
        clock=clock,
        docker=read_docker(answers) if "docker" in answers else None,
        containers=tuple(read_containers(said("containers").good)),
        image_id=read_image_id(said("image").good),
        ports=read_ports(said("tcp").output),
        **read_ephemeral(said("ephemeral").good),
        network=read_network(connection, said("addresses").good, said("routes").good, said("links").output),
        devices=devices,
        device_faults=faults,
        driver=read_driver(accelerator, devices, said("driver").good, said("devices").output),
        files=tuple(line for line in said("files").output.splitlines() if line.startswith("/")),
        **read_rdma(said("rdma").good),
        modes=dict(read_modes(said("modes").output)),
        contents={path: read_digest(said(f"{PATH_QUESTION}{index}")) for index, path in enumerate(contents)},
    )


# ---------------------------------------------------------------------------------------------------- disks, docker, data


def read_disk_space(path: str, text: str, *, writable: bool = True, inodes: int | None = None) -> DiskSpace | None:
    """From `df -Pk`; None when it has no line with numbers."""
    lines = [line.split() for line in text.splitlines() if len(line.split()) >= 6 and line.split()[3].isdigit()]
    return DiskSpace(path=path, free_gib=int(lines[-1][3]) / KIB_PER_GIB, writable=writable, inodes=inodes) if lines else None


def read_root(text: str) -> DiskSpace | None:
    """From the output of free_space.sh: the folder, whether it is writable, `df -Pk` and `df -Pi`."""
    path, writable, *rest = (*text.splitlines(), "", "")
    sizes = [line for line in rest if line and not line.startswith("Filesystem")]
    if len(sizes) != 2:
        return None
    total, _, free = (*sizes[1].split(), "", "", "")[1:4]  # btrfs and some network file systems print 0 or -
    inodes = int(free) if free.isdigit() and total not in ("0", "-") else None
    return read_disk_space(path, sizes[0], writable=writable == "yes", inodes=inodes)


def read_image_id(answer: str) -> str:
    """'' where the node does not have the image, or its docker printed something else."""
    with suppress(ImageFailed):
        return read_image(answer).id
    return ""


def read_docker(answers: Mapping[str, CommandOutput]) -> Docker:
    said, client = answers["docker"], answers["docker_client"]
    try:
        facts: dict[str, Any] = json.loads(said.output or "{}")
    except json.JSONDecodeError:
        facts = {}
    engine = str(facts.get("ServerVersion") or "")
    error = " ".join(facts.get("ServerErrors") or ()) or said.failure
    security = {str(option).partition(",")[0] for option in facts.get("SecurityOptions") or ()}
    if "host" in facts and not engine:  # the output of podman's `info`
        error = PODMAN
    return Docker(
        client=found.group(1) if (found := re.match(r"\S+ version ([^\s,]+)", client.good)) else "",
        engine=engine,
        error="" if engine else error,
        runtimes=tuple(sorted(facts.get("Runtimes") or ())),
        storage_driver=str(facts.get("Driver") or ""),
        space=read_disk_space(str(facts.get("DockerRootDir") or ""), answers["docker_room"].good),
        toolkit=bool(answers["toolkit"].output.strip()),
        file_system=answers.get("docker_disk", NOT_ASKED).good.strip(),
        rootless="name=rootless" in security,
        remapped="name=userns" in security,
        proxy=str(facts.get("HttpsProxy") or facts.get("HttpProxy") or ""),
    )


def read_containers(text: str) -> Iterator[Container]:
    for line in text.splitlines():
        name, state, run_id = (*line.split("\t"), "", "")[:3]
        yield Container(name=name, state=state, run_id=run_id)


def read_digest(said: CommandOutput) -> PathDigest:
    kind, _, digest = said.output.strip().partition("\n")
    if said.code == 0 and digest:
        return PathDigest(kind=kind, digest=digest.split()[0])
    return PathDigest(kind="", digest="", error="took too long to hash" if said.code in TIMED_OUT else said.failure)


# --------------------------------------------------------------------------------------------------------------- devices


def read_devices(accelerator: Accelerator, said: CommandOutput, apps: CommandOutput) -> tuple[tuple[SmiDevice, ...], tuple[SmiFault, ...]]:
    """The devices, and what the tool warns of, or why there are none. Devices that were printed before a failure which makes them unusable are
    left out."""
    if accelerator == "cpu":
        return (), ()
    try:
        if accelerator == "cuda":
            devices, faults = (
                read_nvidia(said.output, apps.good),
                find_faults("nvidia-smi", said.code, nvidia_remarks(said.output + said.errors)),
            )
        else:
            faults = find_faults("npu-smi", said.code, (said.output + said.errors).splitlines())
            devices = () if said.code else read_npu(said.output)
    except UnreadableTable as error:
        return (), (SmiFault(evidence=str(error)),)
    if not devices and not faults:
        printed = " ".join(said.output.split())[:SHOWN]
        return (), (SmiFault(evidence=f"no devices are listed: {printed!r}" if printed else "no devices are listed"),)
    return (devices, faults) if all(fault.warning for fault in faults) else ((), faults)


def read_modes(text: str) -> Iterator[tuple[str, FileMode]]:
    """From `stat -c '%n %a %u %g'`."""
    for name, bits, uid, gid in (row for row in map(str.split, text.splitlines()) if len(row) == 4):
        yield name, FileMode(bits=int(bits, 8), uid=int(uid), gid=int(gid))


def read_rdma(text: str) -> dict[str, Any]:
    """`rdma_ports` and `rdma_files` from the output of rdma.sh. A kernel without link layers has InfiniBand alone."""
    rows = [(line.split(), line) for line in text.splitlines()]
    ports = (row for row, _ in rows if len(row) >= 4 and row[0] == "port")
    return {
        "rdma_ports": tuple(RdmaPort(device=row[1], number=row[2], state=row[3], kind="".join(row[4:5]) or "InfiniBand") for row in ports),
        "rdma_files": tuple(line.removeprefix("file ") for _, line in rows if line.startswith("file /")),
    }


def read_driver(accelerator: Accelerator, devices: tuple[SmiDevice, ...], version_info: str, banner: str) -> str:
    """NVIDIA: from nvidia-smi. Ascend: from version.info (`Version=`), else from the banner of npu-smi."""
    if accelerator == "npu":
        found = re.search(r"^Version=(\S+)", version_info, re.MULTILINE)
        return found.group(1) if found else read_npu_driver(banner)
    return next((device.driver for device in devices if device.driver), "")


# --------------------------------------------------------------------------------------------------------------- network


def read_ports(text: str) -> tuple[int, ...]:
    """TCP ports in use for listening, from /proc/net/tcp and tcp6."""
    rows = (line.split() for line in text.splitlines())
    return tuple(sorted({int(row[1].rpartition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == LISTENING}))


def read_ephemeral(text: str) -> dict[str, Any]:
    """`ephemeral_ports`, (0, 0) when it could not be read, and `reserved_ports`, the ranges that the kernel leaves out of it."""
    first, _, second = text.partition("\n")
    bounds = [int(word) for word in first.split() if word.isdigit()]
    spans = [span.split("-") for span in second.strip().split(",") if span]
    return {
        "ephemeral_ports": (bounds[0], bounds[1]) if len(bounds) == 2 else (0, 0),
        "reserved_ports": tuple((int(span[0]), int(span[-1])) for span in spans if span[0].isdigit()),
    }


def read_network(connection: str, addresses: str, routes: str, links: str) -> NetworkView:
    """`connection`: SSH_CONNECTION, which is the client's address and port, then the node's own."""
    return NetworkView(
        interfaces=tuple(read_interfaces(addresses, routes, links)),
        routes=tuple(read_routes(routes)),
        reached_at=(*connection.split(), "", "", "")[2],
    )


def read_routes(text: str) -> Iterator[IpRoute]:
    """From /proc/net/route, which has addresses in little-endian hex."""
    for row in (line.split() for line in text.splitlines()[1:]):
        if len(row) >= 8:
            network = IPv4Network(f"{from_hex(row[1])}/{from_hex(row[7])}", strict=False)
            yield IpRoute(interface=row[0], network=str(network), metric=int(row[6]))


def from_hex(word: str) -> IPv4Address:
    return IPv4Address(int.from_bytes(bytes.fromhex(word), "little"))


def read_interfaces(addresses: str, routes: str, links: str) -> Iterator[Interface]:
    """The node's own addresses (/proc/net/fib_trie), each with the interface whose connected route contains it."""
    state = {row[0]: row[1:] for row in (line.split() for line in links.splitlines()) if len(row) >= 3}
    connected = [(IPv4Network(route.network), route) for route in read_routes(routes) if route.network != DEFAULT_ROUTE]
    found = re.findall(r"\|-- (\S+)\n\s*/32 host LOCAL", addresses)
    for address in sorted(set(found), key=IPv4Address):
        holding = [(network.prefixlen, route.interface) for network, route in connected if IPv4Address(address) in network]
        if not holding:
            continue
        prefix, name = max(holding)
        operstate, mtu, *speed = state.get(name, ["unknown", "0"])
        yield Interface(
            name=name,
            address=address,
            prefix=prefix,
            up=operstate != "down",  # tunnels and some virtual drivers report unknown
            mtu=int(mtu) if mtu.isdigit() else 0,
            speed_mb_s=int(speed[0]) if speed and speed[0].isdigit() else None,
        )
