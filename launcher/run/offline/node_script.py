"""Bash for sites where no launcher reaches a node: one script for each node, and one that builds the image.

What they do is in the two *.sh beside this, the same for every plan. What differs is assigned above it, one word a line, and `assign` is the
only place that quotes.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from launcher.doctor.host_checks import HCCL_PORTS
from launcher.image.docker import ARCHITECTURES
from launcher.image.stack import LABEL
from launcher.plan.commands import NodeCommand, data_env_file, env_file
from launcher.plan.plan import Plan
from launcher.run.container import SECRETS_PIPE, SECRETS_VARIABLE
from trainer.contract import RESULT_FILE, SPEC_FILE

NODE_BODY, BUILD_BODY = "node.sh", "build.sh"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a `docker run` asks of the node that it runs on. `sources`: what it mounts to read."""

    sources: tuple[str, ...]
    devices: tuple[str, ...]
    gpus: tuple[str, ...]
    runtime: str


def node_script(plan: Plan, command: NodeCommand) -> str:
    """The script of one node. Its env file and the spec lie beside it."""
    spec, image, rank = plan.spec, plan.image, command.node_rank
    folder, options = PurePosixPath(spec.output), options_of(command.start)
    node, several = plan.config.cluster.working[rank], len(plan.commands) > 1
    values: dict[str, str | Sequence[str]] = {
        "node": str(rank),
        "host": command.host,
        "name": command.name,
        "env": env_name(rank),
        "user": command.start[command.start.index("--user") + 1],
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
        "runtime": options.runtime,
        "secrets_variable": SECRETS_VARIABLE,
        "secrets_pipe": SECRETS_PIPE,
        "secrets": plan.config.cluster.secrets,
        "ports": ports_of(plan, rank),
        "sources": options.sources,
        "devices": options.devices,
        "gpus": options.gpus,
        **{key: getattr(command, key) for key in ("prepare", "start", "probe", "logs", "stop", "remove")},
    }
    title = f"# Node {rank} ({command.host}) of run {spec.run_id}. README.txt beside it says what to do in which order."
    return written(title, values, NODE_BODY)


def build_script(plan: Plan, build: Sequence[str], *, proxy: str) -> str:
    """The script that builds the plan's image from the folder image/ beside it by the argv `build`, whose paths begin there."""
    delivery, image = plan.config.cluster.delivery, plan.image
    local = delivery.find_links and "://" not in delivery.find_links
    values: dict[str, str | Sequence[str]] = {
        "tag": image.tag,
        "architecture": image.architecture,
        "engine_architecture": {known: name for name, known in ARCHITECTURES.items()}[image.architecture],
        "wheels": "all" if delivery.wheelhouse else "some" if local else "",
        "proxy": proxy,
        "keep_id": "" if delivery.kind == "build_on_nodes" else "yes",  # which differs from node to node then
        "build": build,
    }
    return written(f"# Builds {image.tag}. README.txt beside it says when.", values, BUILD_BODY)


def written(title: str, values: dict[str, str | Sequence[str]], body: str) -> str:
    head = (
        "#!/bin/bash",
        title,
        "# shellcheck disable=SC2054",
        "set -euo pipefail",
        "",
        *(assign(name, value) for name, value in values.items()),
    )
    return "\n".join((*head, "", body_of(body)))


def assign(name: str, value: str | Sequence[str]) -> str:
    """A variable, or an array with one word a line, that bash reads back byte for byte."""
    if isinstance(value, str):
        return f"{name}={shlex.quote(value)}"
    return "\n".join((f"{name}=(", *(f"  {shlex.quote(word)}" for word in value), ")"))


def options_of(argv: Sequence[str]) -> Options:
    def given(option: str) -> tuple[str, ...]:
        return tuple(value for word, value in pairwise(argv) if word == option)

    mounts = [dict(part.partition("=")[::2] for part in value.split(",")) for value in given("--mount")]
    return Options(
        sources=tuple(mount["source"] for mount in mounts if "readonly" in mount),
        devices=given("--device"),
        gpus=tuple(number for value in given("--gpus") for number in value.strip('"').removeprefix("device=").split(",")),
        runtime="".join(given("--runtime")),
    )


def ports_of(plan: Plan, rank: int) -> tuple[str, ...]:
    """FIRST-LAST, the ports that a node's ranks listen at: the rendezvous on the first of several, HCCL's on every one."""
    port, (low, high) = plan.config.cluster.rendezvous_port, HCCL_PORTS
    given = plan.commands[rank].environment.get("HCCL_IF_BASE_PORT", "")
    first = int(given) if given.isdecimal() else low
    rendezvous = (f"{port}-{port}",) if rank == 0 and len(plan.commands) > 1 else ()
    return (*rendezvous, *((f"{first}-{first + high - low}",) if plan.spec.device.backend == "hccl" else ()))


def is_own_variable(name: str) -> bool:
    """Whether a node's script may use the name itself, always in small letters, so that a variable of the environment would be lost
    behind it."""
    return name.islower() and re.search(rf"\b{re.escape(name)}\b", body_of(NODE_BODY)) is not None


def body_of(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def script_name(command: NodeCommand) -> str:
    return f"node{command.node_rank}-{re.sub('[^A-Za-z0-9._-]', '_', command.host)}.sh"


def env_name(rank: int) -> str:
    return f"node{rank}.env"
