"""Bash scripts for sites where the launcher cannot reach the nodes: one for each node, and one that builds the image.

What they do is in node.sh and build.sh, the same for every plan. The values that differ are assigned above it, one word per line; `assign` is
the only function that quotes.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from launcher.image.docker import ARCHITECTURES
from launcher.image.stack import LABEL
from launcher.plan.commands import NodeCommand, data_env_file, env_file, hccl_ports
from launcher.plan.docker_run import ContainerOptions
from launcher.plan.plan import Plan
from launcher.run.container import SECRETS_PIPE, SECRETS_VARIABLE
from trainer.contract import RESULT_FILE, SPEC_FILE

NODE_BODY, BUILD_BODY = "node.sh", "build.sh"


def node_script(plan: Plan, command: NodeCommand) -> str:
    """The script of one node. Its env file and the spec are next to it."""
    spec, image, rank = plan.spec, plan.image, command.node_rank
    folder, container = PurePosixPath(spec.output), container_of(command)
    node, several = plan.config.cluster.working[rank], len(plan.commands) > 1
    values: dict[str, str | Sequence[str]] = {
        "node": str(rank),
        "host": command.host,
        "name": command.name,
        "env": env_name(rank),
        "user": container.user,
        "image": image.tag,
        "label": f"{LABEL}fingerprint",
        "fingerprint": image.fingerprint,
        "architecture": image.architecture,
        "folder": str(folder),
        "parent": str(folder.parent),
        "spec": str(folder / SPEC_FILE),
        "result": str(folder / RESULT_FILE),
        "data_root": spec.data.root if spec.data.builtin else "",
        "env_path": env_file(spec.output, rank),
        "data_env_path": data_env_file(spec.output, rank),
        "interface": node.interface if several else "",
        "address": node.address if several else "",
        "runtime": container.runtime,
        "secrets_variable": SECRETS_VARIABLE,
        "secrets_pipe": SECRETS_PIPE,
        "secrets": plan.config.cluster.secrets,
        "ports": ports_of(plan, command),
        "sources": read_paths(command),
        "devices": container.devices,
        "gpus": tuple(map(str, container.gpus)),
        **{key: getattr(command, key) for key in ("prepare", "start", "probe", "logs", "stop", "remove")},
    }
    return write_script(f"# Node {rank} ({command.host}) of run {spec.run_id}. README.txt has the steps.", values, NODE_BODY)


def build_script(plan: Plan, build: Sequence[str], *, proxy: str) -> str:
    """The script that builds the plan's image from the folder image/ next to it, with the argv `build`, whose paths start there."""
    delivery, image = plan.config.cluster.delivery, plan.image
    local = delivery.find_links and "://" not in delivery.find_links
    values: dict[str, str | Sequence[str]] = {
        "tag": image.tag,
        "architecture": image.architecture,
        "engine_architecture": {known: name for name, known in ARCHITECTURES.items()}[image.architecture],
        "wheels": "all" if delivery.wheelhouse else "some" if local else "",
        "proxy": proxy,
        "keep_id": "" if delivery.kind == "build_on_nodes" else "yes",  # each node then has an id of its own
        "build": build,
    }
    return write_script(f"# Builds {image.tag}. README.txt says when to run it.", values, BUILD_BODY)


def write_script(title: str, values: dict[str, str | Sequence[str]], body: str) -> str:
    assigned = (assign(name, value) for name, value in values.items())
    return "\n".join(("#!/bin/bash", title, "# shellcheck disable=SC2054", "set -euo pipefail", "", *assigned, "", body_of(body)))


def assign(name: str, value: str | Sequence[str]) -> str:
    """A variable, or an array with one word per line, that bash reads back unchanged."""
    if isinstance(value, str):
        return f"{name}={shlex.quote(value)}"
    return "\n".join((f"{name}=(", *(f"  {shlex.quote(word)}" for word in value), ")"))


def container_of(command: NodeCommand) -> ContainerOptions:
    assert command.container is not None, "write_bundle makes the options of older plans, and refuses the process runtime"
    return command.container


def read_paths(command: NodeCommand) -> tuple[str, ...]:
    """The paths that the container mounts read-only."""
    return tuple(mount.path for mount in container_of(command).mounts if mount.read_only)


def ports_of(plan: Plan, command: NodeCommand) -> tuple[str, ...]:
    """FIRST-LAST of the ports that a node's ranks listen on: the rendezvous port on the first of several nodes, HCCL's on each."""
    port, hccl = plan.config.cluster.rendezvous_port, hccl_ports(command.environment)
    rendezvous = (f"{port}-{port}",) if command.node_rank == 0 and len(plan.commands) > 1 else ()
    return (*rendezvous, *((f"{hccl[0]}-{hccl[-1]}",) if plan.spec.device.backend == "hccl" else ()))


def is_own_variable(name: str) -> bool:
    """Whether a node's script may use the name itself. Its variables are in lower case, and would hide one of the environment."""
    return name.islower() and re.search(rf"\b{re.escape(name)}\b", body_of(NODE_BODY)) is not None


def body_of(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def script_name(command: NodeCommand) -> str:
    return f"node{command.node_rank}-{re.sub('[^A-Za-z0-9._-]', '_', command.host)}.sh"


def env_name(rank: int) -> str:
    return f"node{rank}.env"
