"""What a plan takes from this machine: folder, interpreter, user; for a run on it what it has; and which licences the user has accepted.

Of this package, only this module and `weights_folder` read the machine.
"""

import errno
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from launcher.check.problem import Problem
from launcher.config.schema import Config
from launcher.config.variable import describe_variables
from launcher.image.docker import ARCHITECTURES
from launcher.image.licence import licence_of, store_path, valid_acceptance
from launcher.image.stack import REPOSITORY, Stack
from launcher.plan.accepted import take_licence
from launcher.plan.busy import describe_busy
from launcher.plan.machine import NVIDIA_TOOLS, TORCH, TORCH_NPU, TRAINER_PACKAGES, Machine, asked_paths
from launcher.plan.plan import LocalContext, Plan, names_trackers
from launcher.plan.tracker import describe_missing

if TYPE_CHECKING:
    from importlib.metadata import Distribution

ENGINE_TIMEOUT_S = 5
PORTS_TRIED = 100
CONTAINER_USER = "1000:1000"  # where the launcher runs as root: a container does not need root
BUILT_WITH_CUDA = re.compile(r"^cuda\b[^=]*= '(\d[\d.]*)'", re.MULTILINE)  # in torch/version.py, which torch's setup.py writes
CUDA_LABEL = re.compile(r"\+cu(\d+)(\d)$")  # of a version: 2.7.1+cu126


def local_context(project: Path) -> LocalContext:
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else CONTAINER_USER
    return LocalContext(project=project, here=Path.cwd(), interpreter=sys.executable, user=user, memory_bytes=read_memory())


def read_memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def context_for(config: Config, stacks: Mapping[str, Stack], project: Path, *, asks: bool = True) -> LocalContext:
    """With the licence that the user has accepted, and with what this machine has for a run on it, unless it is not asked. Raises ConfigRefused
    where the user's file of licences is needed and cannot be read."""
    machine = read_machine(config) if asks and config.cluster.is_local and config.cluster.nodes else None
    return replace(local_context(project), machine=machine, accepted=find_acceptance(config, stacks, os.environ))


def notes_here(plan: Plan) -> tuple[str, ...]:
    """What this machine has to say of a plan: that it is busy, variables that are set, and packages of trackers that are missing."""
    missing = describe_missing(plan.config, named=names_trackers(plan.config, plan.overrides))
    busy = describe_busy(plan, load=os.getloadavg()[0], cores=len(os.sched_getaffinity(0)))
    return (*busy, *missing, *describe_variables(os.environ, plan.config, plan.overrides))


def find_taken_port(config: Config) -> tuple[Problem, ...]:
    """The port of a server on this machine that another program listens on: known before its model is loaded."""
    serving = config.stage.serving
    if serving is None or config.stage.kind != "serve" or not config.cluster.is_local or not is_port_taken(serving.address, serving.port):
        return ()
    nearby = range(serving.port + 1, min(serving.port + PORTS_TRIED, 65536))
    free = next((port for port in nearby if not is_port_taken(serving.address, port)), 0)  # 0: any free one
    what = f"port {serving.port} of {serving.address} is in use: stop that program (ss -ltnp 'sport = :{serving.port}' shows it)"
    return (Problem(key="stage.serving.port", what=what, changes=(f"stage.serving.port={free}",), launch_only=True),)


def is_port_taken(address: str, port: int) -> bool:
    """Whether another program has the port. Any other trouble, such as an address that is none, is for the server to explain."""
    if not 0 < port < 65536:
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no program
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def for_this_machine(config: Config, overrides: Sequence[str], architecture: str = "") -> Config:
    """The config with the architecture of this machine for its own node, unless an override sets it: conf/cluster/local.yaml is one file for
    all machines. `architecture`: as `uname -m` prints it, of this machine when omitted."""
    architecture, cluster = architecture or os.uname().machine, config.cluster
    typed = any(override.startswith("cluster.nodes") for override in overrides)
    if typed or cluster.runtime != "docker" or not cluster.is_local or architecture not in ARCHITECTURES.values():
        return config
    nodes = tuple(replace(node, architecture=cast(Any, architecture)) for node in cluster.nodes)
    return replace(config, cluster=replace(cluster, nodes=nodes))


def find_acceptance(config: Config, stacks: Mapping[str, Stack], environ: Mapping[str, str]) -> Mapping[str, str]:
    """The acceptance of the licence of the config's image, where one is needed: its SHA-256 -> when. Raises ConfigRefused."""
    stack = stacks.get(config.hardware.stack)
    licence = licence_of(stack.licence) if stack and stack.licence else None
    if licence is None or config.cluster.runtime != "docker" or config.cluster.delivery.accept_licence:
        return {}
    found = valid_acceptance(licence, store_path(environ))
    return {found.sha256: found.accepted_at} if found else {}


def with_own_licence(plan: Plan, stacks: Mapping[str, Stack]) -> Plan:
    """A recorded plan whose licence another user may have accepted: only this user's own acceptance counts. Raises ConfigRefused."""
    if plan.licence is None or not plan.licence.is_stored:
        return plan
    cluster = plan.config.cluster
    config = replace(plan.config, cluster=replace(cluster, delivery=replace(cluster.delivery, accept_licence=False)))
    config, licence = take_licence(config, stacks, find_acceptance(config, stacks, os.environ))
    return replace(plan, config=config, licence=licence)


# ------------------------------------------------------------------------------------------------------------- machine


def read_machine(config: Config, root: Path = Path("/")) -> Machine:
    """The engine is asked once, and only for a run in a container. `root`: where paths begin."""
    found = {name: each for name in (*TRAINER_PACKAGES, TORCH_NPU) if (each := find_distribution(name))}
    docker = shutil.which("docker")
    in_docker = config.cluster.runtime == "docker"
    images, error = list_images(docker) if docker and in_docker else (frozenset(), "")
    paths = {path for path in asked_paths(config) if (root / path[1:]).exists()}
    return Machine(
        interpreter=sys.executable,
        user=user_name(),
        packages={name: each.version for name, each in found.items()},
        cuda=read_cuda(found[TORCH]) if TORCH in found else "",
        has_docker=docker is not None,
        engine_error=error,
        images=images,
        paths=frozenset(paths | {tool for tool in NVIDIA_TOOLS if config.hardware.accelerator == "cuda" and shutil.which(tool)}),
    )


def user_name() -> str:
    """'' for a user id without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def find_distribution(name: str) -> "Distribution | None":
    """A package of this interpreter, which is not imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def read_cuda(torch: "Distribution") -> str:
    """The CUDA that torch is built with, '' for none. It is read from the file that its build writes, since the wheel of the common index has
    no label; importing torch would take seconds."""
    try:
        found = BUILT_WITH_CUDA.search(Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8"))
    except OSError:
        label = CUDA_LABEL.search(torch.version)
        return f"{label[1]}.{label[2]}" if label else ""
    return found[1] if found else ""


def list_images(docker: str) -> tuple[frozenset[str], str]:
    """(tags of our images that the engine has, why it did not answer or '')."""
    argv = (docker, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=ENGINE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return frozenset(), f"no answer within {ENGINE_TIMEOUT_S} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return frozenset(), lines[0] if lines else f"docker image ls ended with exit code {done.returncode}"
    return frozenset(line.removeprefix("localhost/") for line in done.stdout.split()), ""


def find_built(plan: Plan, machine: Machine | None = None) -> bool | None:
    """Whether this machine's engine has the plan's image, whose tag holds the hash of its content. None = not asked, since the plan
    needs none, or not known, since no engine answers. `machine`: where the engine was asked already."""
    docker = shutil.which("docker")
    if plan.config.cluster.runtime != "docker" or docker is None:
        return None
    if machine:
        return None if machine.engine_error else plan.image.tag in machine.images
    argv = (docker, "image", "inspect", "--format", "{{.Id}}", plan.image.tag)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=ENGINE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return True if done.returncode == 0 else False if "no such image" in done.stderr.lower() else None


def why_not_sent(plan: Plan, built: bool | None, architecture: str = "") -> str:
    """Why `launch` could bring the nodes no image from this machine; '' where it can, or need not. `built`: find_built; `architecture`: as
    `uname -m` prints it, of this machine when omitted."""
    kind, here = plan.config.cluster.delivery.kind, architecture or os.uname().machine
    if plan.is_local or plan.config.cluster.runtime != "docker" or kind not in ("build", "ship") or built:
        return ""
    if built is None:
        return "the Docker engine here does not answer" if shutil.which("docker") else "this machine has no docker command"
    if kind == "ship":
        return "the engine here does not have it, and cluster.delivery.kind=ship only sends it"
    return f"this machine is {here}, and the nodes are {plan.image.architecture}" if here != plan.image.architecture else ""
