"""What is asked of a node before a launch, and how its answers become facts.

One script a node and one question for its clock, so that 128 nodes cost as little as one. The script needs a POSIX shell, coreutils and
/proc, and nothing that a node might lack: what is missing is an answer, too. It writes no file and starts no container.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from launcher.config.schema import Accelerator
from launcher.doctor.node_facts import NodeFacts
from launcher.doctor.parse import CONTENT, MARK, UNASKED, read_answers, read_clock, read_facts
from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, NVIDIA_QUERY, TOOL_FOLDERS
from launcher.errors import NodeFailed
from launcher.image.docker import image_query
from launcher.plan.commands import RUN_LABEL
from launcher.plan.devices import ASCEND_MANAGERS, ASCEND_MOUNTS, ASCEND_NETWORK_MOUNTS, OTHER_NPU_SMI
from launcher.ssh.transport import Transport

QUESTION_TIMEOUT_S = 10
DEVICE_TIMEOUT_S = 40  # without persistence mode nvidia-smi wakes every card; npu-smi asks sixteen dies one by one
HASH_TIMEOUT_S = 120
CLOCK = ("date", "+%s.%N")
HDK_FILE = "/usr/local/Ascend/driver/version.info"

# Each question ends with a line that holds its exit code. The second argument is its limit: a dead NFS mount or a driver that hangs
# must not take the other answers with it.
ASK = f"""export LC_ALL=C PATH="$PATH:{TOOL_FOLDERS}"
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
# A file by its content; a folder by the names and sizes of the files that are in it, and of the folders the names: their sizes are the file
# system's, and depend on what was there once.
NAMES_AND_SIZES = '/^[-l]/ {size = $5; for (i = 1; i < 9; i++) sub(/^[^ ]+ +/, ""); print size, $0} /^\\//'
DIGEST = f'if [ -d "$1" ]; then echo folder; ls -lnR -- "$1/" | awk \'{NAMES_AND_SIZES}\' | sha256sum; else echo file; sha256sum <"$1"; fi'
TOOLKIT = "for i in nvidia-container-runtime-hook nvidia-container-runtime nvidia-ctk; do command -v $i; done"
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
    "docker_client": ("docker", "--version"),  # asks no engine
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
        "modes": ("sh", "-c", 'stat -c "%n %a %u %g" /dev/davinci[0-9]* "$@"', "sh", *ASCEND_MANAGERS),
        # what there is of them, one a line; a missing one is on stderr
        "files": (
            "sh",
            "-c",
            'ls -d /dev/davinci[0-9]* "$@"',
            "sh",
            *ASCEND_MANAGERS,
            *ASCEND_MOUNTS,
            *ASCEND_NETWORK_MOUNTS,
            OTHER_NPU_SMI,
        ),
    },
}


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """What a run needs to know of a node. `root`: cluster.root, absolute; `image`: the tag, '' where no container is used; `contents`:
    paths of data and model, compared between nodes."""

    accelerator: Accelerator
    root: str
    image: str = ""
    contents: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------- the probe


def probe(transport: Transport, inquiry: Inquiry, *, now: Callable[[], float]) -> NodeFacts:
    """Ask a node, and read its answers. `now`: the launcher's clock in seconds since 1970. Raises NodeFailed when the node cannot be
    reached, or runs no script."""
    limits_s = sum(map(limit_s, questions(inquiry)))
    done = transport.run(("sh", "-c", script(inquiry)), timeout_s=limits_s)
    answers = read_answers(done)
    if not answers.get("machine", UNASKED).good:
        raise NodeFailed(f"{transport.host}: its shell ran none of the questions: {done.errors.strip()[-500:] or f'exit code {done.code}'}")
    sent_s = now()
    told = transport.run(CLOCK, timeout_s=QUESTION_TIMEOUT_S).output
    clock = read_clock(told, sent_s=sent_s, received_s=now())
    return read_facts(transport.host, inquiry.accelerator, inquiry.contents, answers, clock)


def questions(inquiry: Inquiry) -> dict[str, tuple[str, ...]]:
    docker = DOCKER_QUESTIONS | {"image": image_query(inquiry.image)} if inquiry.image else {}
    contents = {f"{CONTENT}{place}": ("sh", "-c", DIGEST, "sh", path) for place, path in enumerate(inquiry.contents)}
    return {**QUESTIONS, "root": ("sh", "-c", ROOM, "sh", inquiry.root), **docker, **DEVICE_QUESTIONS[inquiry.accelerator], **contents}


def script(inquiry: Inquiry) -> str:
    lines = (shlex.join(("ask", name, str(limit_s(name)), *argv)) for name, argv in questions(inquiry).items())
    return ASK + "\n".join(lines) + "\n"


def limit_s(name: str) -> int:
    if name.startswith(CONTENT):
        return HASH_TIMEOUT_S
    return DEVICE_TIMEOUT_S if name in ("devices", "apps") else QUESTION_TIMEOUT_S
