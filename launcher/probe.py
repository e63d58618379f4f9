"""What is asked of a node before a launch, and how its answers become facts.

One script a node and one question for its clock, so that 128 nodes cost as little as one. The script needs a POSIX shell, coreutils and
/proc, and nothing that a node might lack: what is missing is an answer, too. It writes no file and starts no container.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from launcher.accelerator import ASCEND_MANAGERS, ASCEND_MOUNTS, ASCEND_NETWORK_MOUNTS
from launcher.errors import NodeFailed
from launcher.network import Interface, IpRoute, View
from launcher.schema import Accelerator
from launcher.smi import NPU_QUERY, NVIDIA_APPS_QUERY, NVIDIA_QUERY, Device, UnreadableTable, read_npu, read_npu_driver, read_nvidia
from launcher.start import RUN_LABEL
from launcher.transport import Result, Transport

MARK = "=omnilaunch="
QUESTION_TIMEOUT_S = 10
HASH_TIMEOUT_S = 120
PROBE_TIMEOUT_S = 300.0
CLOCK = ("date", "+%s.%N")
HDK_FILE = "/usr/local/Ascend/driver/version.info"
GIB = 2**30

# Each question ends with a line that holds its exit code. The second argument is its limit: a dead NFS mount or a driver that hangs
# must not take the other answers with it. npu-smi lies in /usr/local/sbin on some hosts, which a login without a profile lacks.
ASK = f"""export LC_ALL=C PATH="$PATH:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin"
ask() {{
  printf '\\n{MARK} %s\\n' "$1"; printf '\\n{MARK} %s\\n' "$1" >&2
  limit=$2; shift 2
  timeout -k 1 "$limit" "$@" </dev/null
  printf '\\n{MARK}code %s\\n' "$?"
}}
"""
# The nearest folder above that exists: is it writable, and how many KiB and inodes are free there?
ROOM = (
    'p=$1; while [ ! -e "$p" ]; do p=${p%/*}; p=${p:-/}; done; [ -w "$p" ] && w=yes || w=no; echo "$p"; echo "$w"; df -Pk "$p"; df -Pi "$p"'
)
DOCKER_ROOM = 'd=$(docker info --format "{{.DockerRootDir}}") && df -Pk "$d"'
LINKS = 'cd /sys/class/net && for i in *; do echo "$i $(cat "$i/operstate") $(cat "$i/mtu") $(cat "$i/speed" 2>/dev/null)"; done'
# A file by its content; a folder by the names and sizes of all that is in it.
DIGEST = 'if [ -d "$1" ]; then echo folder; ls -lnR -- "$1" | awk \'{print $5, $9}\' | sha256sum; else echo file; sha256sum <"$1"; fi'
TOOLKIT = "command -v nvidia-container-runtime-hook nvidia-container-runtime nvidia-ctk"
CONTAINER_FORMAT = f'{{{{.Names}}}}\t{{{{.State}}}}\t{{{{.Label "{RUN_LABEL}"}}}}'

QUESTIONS: dict[str, tuple[str, ...]] = {
    "machine": ("uname", "-m"),
    "kernel": ("uname", "-r"),
    "hostname": ("uname", "-n"),
    "boot": ("cat", "/proc/sys/kernel/random/boot_id"),
    "user": ("id", "-un"),
    "shell": ("sh", "-c", 'echo "$SHELL"; echo "$SSH_CONNECTION"'),
    "memory": ("cat", "/proc/meminfo"),
    "shm": ("df", "-Pk", "/dev/shm"),
    "memlock": ("sh", "-c", "ulimit -l"),
    "tcp": ("cat", "/proc/net/tcp", "/proc/net/tcp6"),
    "ephemeral": ("cat", "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/ip_local_reserved_ports"),
    "links": ("sh", "-c", LINKS),
    "routes": ("cat", "/proc/net/route"),
    "addresses": ("cat", "/proc/net/fib_trie"),
}
DOCKER_QUESTIONS: dict[str, tuple[str, ...]] = {
    "docker": ("docker", "info", "--format", "{{json .}}"),
    "docker_client": ("docker", "version", "--format", "{{.Client.Version}}"),
    "docker_room": ("sh", "-c", DOCKER_ROOM),
    "containers": ("docker", "ps", "--all", "--filter", f"label={RUN_LABEL}", "--format", CONTAINER_FORMAT),
    "toolkit": ("sh", "-c", TOOLKIT),
}
DEVICE_QUESTIONS: dict[Accelerator, dict[str, tuple[str, ...]]] = {
    "cpu": {},
    "cuda": {"devices": NVIDIA_QUERY, "apps": NVIDIA_APPS_QUERY, "files": ("sh", "-c", "ls -d /dev/nvidia*")},
    "npu": {
        "devices": NPU_QUERY,
        "driver": ("cat", HDK_FILE),
        # what there is of them, one a line; a missing one is on stderr
        "files": ("sh", "-c", 'ls -d /dev/davinci[0-9]* "$@"', "sh", *ASCEND_MANAGERS, *ASCEND_MOUNTS, *ASCEND_NETWORK_MOUNTS),
    },
}


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, kw_only=True)
class Room:
    """Of the file system that `path` is on. `inodes` None where it counts none."""

    path: str
    free_gib: float
    writable: bool = True
    inodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The node's clock minus the launcher's lies between the two, in seconds."""

    behind_s: float
    ahead_s: float


@dataclass(frozen=True, kw_only=True)
class Docker:
    """`engine` is '' where it does not answer, and `error` says why. `room`: where it keeps images."""

    client: str
    engine: str
    error: str = ""
    runtimes: tuple[str, ...] = ()
    storage_driver: str = ""
    room: Room | None = None
    toolkit: bool = False  # NVIDIA's container toolkit is installed


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container that carries a run's label."""

    name: str
    state: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """A path of the data or the model. `digest` is '' where it is missing or took too long; `error` says which."""

    kind: str
    digest: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node answered. Memory and room in GiB; `memlock_kib` None = unlimited; `ports`: TCP ports in use for listening;
    `image_id` '' = not there. `devices_error` says why there are no devices."""

    host: str
    machine: str
    kernel: str
    hostname: str
    boot: str
    user: str
    shell: str
    memory_total_gib: float
    memory_available_gib: float
    shm: Room | None
    memlock_kib: int | None
    root: Room | None
    clock: Clock
    docker: Docker | None
    containers: tuple[Container, ...]
    image_id: str
    ports: tuple[int, ...]
    ephemeral_ports: tuple[int, int]
    reserved_ports: tuple[tuple[int, int], ...]
    view: View
    devices: tuple[Device, ...]
    devices_error: str
    driver: str
    files: tuple[str, ...]
    contents: dict[str, Content]


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """What a run needs to know of a node. `root`: cluster.root, absolute; `image`: the tag, '' where no container is used; `contents`:
    paths of data and model, compared between nodes."""

    accelerator: Accelerator
    root: str
    image: str = ""
    contents: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    code: int
    output: str
    errors: str

    @property
    def good(self) -> str:
        """The output, or '' when the question failed."""
        return self.output if self.code == 0 else ""

    @property
    def complaint(self) -> str:
        """Why it failed, in one line."""
        if self.code in (124, 137):
            return f"no answer within {QUESTION_TIMEOUT_S} s"
        said = " ".join((self.errors or self.output).split())
        return said or f"exit code {self.code}"


UNASKED = Answer(code=127, output="", errors="was not asked")


# ------------------------------------------------------------------------------------------------------------- the probe


def probe(transport: Transport, inquiry: Inquiry, *, now: Callable[[], float]) -> NodeFacts:
    """Ask a node, and read its answers. `now`: the launcher's clock in seconds since 1970. Raises NodeFailed when the node cannot be
    reached, or runs no script."""
    argv = ("sh", "-c", script(inquiry))
    done = transport.run(argv, timeout_s=PROBE_TIMEOUT_S)
    answers = read_answers(done)
    if "machine" not in answers:
        raise NodeFailed(f"{transport.host}: its shell ran none of the questions: {done.errors.strip()[-500:] or f'exit code {done.code}'}")
    sent_s = now()
    told = transport.run(CLOCK, timeout_s=QUESTION_TIMEOUT_S).expect(f"{transport.host}: asking for the time").output
    node_s, received_s = float(told), now()
    return read_facts(transport.host, inquiry, answers, Clock(behind_s=node_s - received_s, ahead_s=node_s - sent_s))


def questions(inquiry: Inquiry) -> dict[str, tuple[str, ...]]:
    docker = DOCKER_QUESTIONS | {"image": ("docker", "image", "inspect", "--format", "{{.Id}}", inquiry.image)} if inquiry.image else {}
    contents = {f"content {path}": ("sh", "-c", DIGEST, "sh", path) for path in inquiry.contents}
    return {**QUESTIONS, "root": ("sh", "-c", ROOM, "sh", inquiry.root), **docker, **DEVICE_QUESTIONS[inquiry.accelerator], **contents}


def script(inquiry: Inquiry) -> str:
    lines = (
        shlex.join(("ask", name, str(HASH_TIMEOUT_S if name.startswith("content ") else QUESTION_TIMEOUT_S), *argv))
        for name, argv in questions(inquiry).items()
    )
    return ASK + "\n".join(lines) + "\n"


def read_answers(done: Result) -> dict[str, Answer]:
    """The script's two streams, cut at the marks."""
    errors = {name: text for name, text in cut(done.errors)}
    answers = {}
    for name, text in cut(done.output):
        output, _, code = text.rpartition(f"\n{MARK}code ")
        answers[name] = Answer(code=int(code) if code.strip().isdigit() else 255, output=output, errors=errors.get(name, "").strip())
    return answers


def cut(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(f"\n{MARK} ")[1:]:
        name, _, rest = part.partition("\n")
        yield name, rest


def read_facts(host: str, inquiry: Inquiry, answers: Mapping[str, Answer], clock: Clock) -> NodeFacts:
    def said(name: str) -> Answer:
        return answers.get(name, UNASKED)

    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB$", said("memory").good, re.MULTILINE))
    devices, devices_error = read_devices(inquiry.accelerator, said("devices"), said("apps"))
    shell, _, connection = said("shell").good.partition("\n")
    low, high, reserved = read_ephemeral(said("ephemeral").good)
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
        shm=read_room("/dev/shm", said("shm").good),
        memlock_kib=int(said("memlock").good) if said("memlock").good.strip().isdigit() else None,
        root=read_root(said("root").good),
        clock=clock,
        docker=read_docker(answers) if inquiry.image else None,
        containers=tuple(read_containers(said("containers").good)),
        image_id=said("image").good.strip(),
        ports=read_ports(said("tcp").output),
        ephemeral_ports=(low, high),
        reserved_ports=reserved,
        view=View(
            interfaces=tuple(read_interfaces(said("addresses").good, said("routes").good, said("links").output)),
            routes=tuple(read_routes(said("routes").good)),
            reached_at=(connection.split() + [""] * 3)[2],
        ),
        devices=devices,
        devices_error=devices_error,
        driver=read_driver(inquiry.accelerator, devices, said("driver").good, said("devices").output),
        files=tuple(line for line in said("files").output.splitlines() if line.startswith("/")),
        contents={path: read_content(said(f"content {path}")) for path in inquiry.contents},
    )
