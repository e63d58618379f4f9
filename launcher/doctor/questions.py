"""What a node is asked before a launch, and how its answers become facts.

One script per node and one question for its clock, so that 128 nodes take as long as one. The script needs a POSIX shell, coreutils and
/proc; anything else that a node lacks is an answer too. It writes no file and starts no container.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.schema import Accelerator
from launcher.doctor.node_facts import NodeFacts
from launcher.doctor.parse import MARK, NOT_ASKED, PATH_QUESTION, read_answers, read_clock, read_facts
from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, NVIDIA_QUERY, TOOL_FOLDERS
from launcher.errors import NodeFailed
from launcher.image.docker import image_query
from launcher.plan.commands import RUN_LABEL
from launcher.plan.devices import ASCEND_MANAGERS, ASCEND_MOUNTS, ASCEND_NETWORK_MOUNTS, OTHER_NPU_SMI
from launcher.ssh.transport import Transport

SCRIPTS = Path(__file__).with_name("node_scripts")
QUESTION_TIMEOUT_S = 10
DEVICE_TIMEOUT_S = 40  # without persistence mode nvidia-smi wakes up every card; npu-smi asks sixteen dies one by one
HASH_TIMEOUT_S = 120
CLOCK = ("date", "+%s.%N")
ASCEND_DRIVER_FILE = "/usr/local/Ascend/driver/version.info"
DOCKER_SPACE = 'd=$(docker info --format "{{.DockerRootDir}}") && df -Pk "$d"'
DOCKER_FILE_SYSTEM = 'd=$(docker info --format "{{.DockerRootDir}}") && stat -f -c %T "$d"'
CONTAINER_FORMAT = f'{{{{.Names}}}}\t{{{{.State}}}}\t{{{{.Label "{RUN_LABEL}"}}}}'
ASCEND_FILES = (*ASCEND_MANAGERS, *ASCEND_MOUNTS, *ASCEND_NETWORK_MOUNTS, OTHER_NPU_SMI)

# Name -> argv. A first word that ends with .sh is a file of node_scripts/, which is sent as text.
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
    "links": ("links.sh",),
    "routes": ("cat", "/proc/net/route"),
    "addresses": ("cat", "/proc/net/fib_trie"),
}
DOCKER_QUESTIONS: dict[str, tuple[str, ...]] = {
    "docker": ("docker", "info", "--format", "{{json .}}"),
    "docker_client": ("docker", "--version"),  # works without an engine
    "docker_room": ("sh", "-c", DOCKER_SPACE),
    "docker_disk": ("sh", "-c", DOCKER_FILE_SYSTEM),
    "containers": ("docker", "ps", "--all", "--filter", f"label={RUN_LABEL}", "--format", CONTAINER_FORMAT),
    "toolkit": ("toolkit.sh",),
}
DEVICE_QUESTIONS: dict[Accelerator, dict[str, tuple[str, ...]]] = {
    "cpu": {},
    "cuda": {"devices": NVIDIA_QUERY, "apps": NVIDIA_APPS_QUERY, "files": ("sh", "-c", "ls -d /dev/nvidia*"), "rdma": ("rdma.sh",)},
    "npu": {
        "devices": NPU_QUERY,
        "driver": ("cat", ASCEND_DRIVER_FILE),
        "modes": ("sh", "-c", 'stat -c "%n %a %u %g" /dev/davinci[0-9]* "$@"', "sh", *ASCEND_MANAGERS),
        # those that exist, one per line; a missing one is on stderr
        "files": ("sh", "-c", 'ls -d /dev/davinci[0-9]* "$@"', "sh", *ASCEND_FILES),
    },
}


@dataclass(frozen=True, kw_only=True)
class NodeQuery:
    """What a run needs to know about a node. `root`: cluster.root, absolute; `image`: the tag, '' for the process runtime; `contents`:
    paths of data and model, which are compared between nodes."""

    accelerator: Accelerator
    root: str
    image: str = ""
    contents: tuple[str, ...] = ()


def ask_node(transport: Transport, query: NodeQuery, *, now: Callable[[], float]) -> NodeFacts:
    """Ask a node, and read its answers. `now`: the launcher's clock in seconds since 1970. Raises NodeFailed when the node cannot be
    reached, or does not run the script."""
    limit_s = sum(map(timeout_of, questions(query)))
    done = transport.run(("sh", "-c", question_script(query)), timeout_s=limit_s)
    answers = read_answers(done)
    if not answers.get("machine", NOT_ASKED).good:
        said = done.errors.strip()[-500:] or f"exit code {done.code}"
        raise NodeFailed(f"{transport.host}: its shell did not run the doctor's script (sh and coreutils are needed): {said}")
    sent_s = now()
    printed = transport.run(CLOCK, timeout_s=QUESTION_TIMEOUT_S).output
    clock = read_clock(printed, sent_s=sent_s, received_s=now())
    return replace(read_facts(transport.host, query.accelerator, query.contents, answers, clock), remarks=transport.remarks)


def questions(query: NodeQuery) -> dict[str, tuple[str, ...]]:
    image = {"image": image_query(query.image)}
    contents = {f"{PATH_QUESTION}{index}": ("digest.sh", path) for index, path in enumerate(query.contents)}
    root = {"root": ("free_space.sh", query.root)}
    return QUESTIONS | root | (DOCKER_QUESTIONS | image if query.image else {}) | DEVICE_QUESTIONS[query.accelerator] | contents


def question_script(query: NodeQuery) -> str:
    lines = (shlex.join(("ask", name, str(timeout_of(name)), *with_script(argv))) for name, argv in questions(query).items())
    assigned = f"mark={shlex.quote(MARK)} tool_folders={shlex.quote(TOOL_FOLDERS)}"
    return "\n".join((assigned, read_script("ask.sh"), *lines, ""))


def with_script(argv: tuple[str, ...]) -> tuple[str, ...]:
    return ("sh", "-c", read_script(argv[0]), "sh", *argv[1:]) if argv[0].endswith(".sh") else argv


def read_script(name: str) -> str:
    return (SCRIPTS / name).read_text(encoding="utf-8")


def timeout_of(name: str) -> int:
    """Seconds for one question."""
    if name.startswith(PATH_QUESTION):
        return HASH_TIMEOUT_S
    return DEVICE_TIMEOUT_S if name in ("devices", "apps") else QUESTION_TIMEOUT_S
