"""Checks that need a trial on the nodes: whether a container starts with the run's options, whether every node reaches every other, whether
a folder is shared. Each trial removes what it made, and each container ends by itself.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from launcher.doctor.device_checks import device_groups
from launcher.doctor.findings import EVERY_NODE, CheckedNode, CheckResult, failed, passed, unchecked
from launcher.doctor.host_checks import root_of
from launcher.doctor.network import NetworkChoice
from launcher.doctor.offers import free_port, offer
from launcher.doctor.questions import read_script
from launcher.errors import NodeFailed
from launcher.plan.commands import env_lines
from launcher.plan.docker_run import ContainerOptions, docker_run
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import Result, Transport
from trainer.contract.wording import plural

START_TIMEOUT_S = 90.0
REACH_LIMIT_S = 20  # for the slowest node to start its container, and for all connections
FOLDER_TIMEOUT_S = 20.0
DOCKER_FAILED = (125, 126, 127)  # docker run itself failed, or the command is not in the image
NO_IMAGE = "the image is not on the node yet"
DOCTOR_LABEL = "omnilaunch.doctor"
TRIAL_FILE = ".omnilaunch-trial"

NO_ASCEND_RUNTIME = "install Ascend Docker Runtime and sudo systemctl restart docker, or leave cluster.ascend_runtime out"
# Part of docker's message when a container cannot start -> fix. The first that matches.
START_FIXES = (
    ("could not select device driver", "install nvidia-container-toolkit, then: sudo systemctl restart docker"),
    ("unknown runtime specified", NO_ASCEND_RUNTIME),
    ("invalid runtime name", NO_ASCEND_RUNTIME),
    (
        "error gathering device information",
        "cluster.devices_per_node=N or cluster.nodes.N.devices for the existing ones, or reload the driver",
    ),
    (
        "bind source path does not exist",
        "cluster.sync=[PATH] copies it there at launch; a file of the driver: install the driver; else remove the path from cluster.mounts",
    ),
    ("rlimit", "raise the engine's own limit (default-ulimits in /etc/docker/daemon.json), or remove it from cluster.ulimits"),
    ("operation not permitted", "remove from cluster.ulimits what the engine may not grant"),
    ("permission denied", "SELinux or a network file system refuses the user of the container: cluster.user=UID:GID of one who may write"),
    (
        "thread cannot be started",
        "update the engine to 20.10.10 or newer, or raise its limit of processes (default-ulimits in /etc/docker/daemon.json)",
    ),
    (
        "torch cannot be imported",
        "the image does not fit this machine, or its toolkit lacks a library: omnilaunch image build again; the line has the name",
    ),
    (
        "cannot be opened by uid",
        "cluster.nodes.N.groups=[GID] of the device's group (ls -ln /dev/davinci0), or the driver with --install-for-all",
    ),
    ("no space left on device", "free disk space where docker keeps its data: docker system df"),
    ("invalid argument", "write cluster.shm_size as docker takes it, for example 16g"),
)


@dataclass(frozen=True, kw_only=True)
class AnsweredNode:
    """A node that answered, and its connection."""

    checked: CheckedNode
    transport: Transport

    @property
    def host(self) -> str:
        return self.checked.host


def on_each(nodes: Sequence[AnsweredNode], work: Callable[[AnsweredNode], CheckResult]) -> dict[str, CheckResult]:
    """`work` on all nodes in parallel; a node that is lost meanwhile is unchecked."""
    answers = attempt_each(work, nodes)
    return {
        node.host: unchecked(str(answer)) if isinstance(answer, NodeFailed) else answer for node, answer in zip(nodes, answers, strict=True)
    }


def run_container(node: AnsweredNode, options: ContainerOptions, command: tuple[str, ...]) -> Result:
    """Removes the container at a timeout: ending docker's client would leave it running."""
    try:
        return node.transport.run(docker_run(options, command), timeout_s=START_TIMEOUT_S)
    except NodeFailed:
        with suppress(NodeFailed):
            node.transport.run(("docker", "rm", "--force", options.name), timeout_s=START_TIMEOUT_S)
        raise


# ------------------------------------------------------------------------------------------------- a container's options


def try_start(nodes: Sequence[AnsweredNode], token: str) -> dict[str, CheckResult]:
    """A container with the options of the run's own, its entrypoint and its Python, writes a file where the run writes, starts a thread, opens the
    devices and imports torch. In place of the run's folders, which a launch makes, it has a folder of its own below cluster.root."""

    def start(node: AnsweredNode) -> CheckResult:
        space = node.checked.facts.root
        if not node.checked.facts.image_id:
            return unchecked(NO_IMAGE)
        if space is None or not space.writable:
            return unchecked("no container was started: the login may not write to cluster.root")
        folder = str(PurePosixPath(space.path) / f".omnilaunch-{token}-{re.sub('[^A-Za-z0-9.-]', '_', node.host)}")
        try:
            node.transport.run(("mkdir", "-m", "0777", "--", folder), timeout_s=FOLDER_TIMEOUT_S).expect(f"{node.host}: making {folder}")
            return start_in(node, folder, token)
        finally:
            with suppress(NodeFailed):
                node.transport.run(("rm", "-f", "--", f"{folder}/{TRIAL_FILE}", f"{folder}/env"), timeout_s=FOLDER_TIMEOUT_S)
                node.transport.run(("rmdir", "--", folder), timeout_s=FOLDER_TIMEOUT_S)

    return on_each(nodes, start)


def start_in(node: AnsweredNode, folder: str, token: str) -> CheckResult:
    options, left_out = trial_options(node.checked, folder, token)
    node.transport.put(env_lines(node.checked.command.environment).encode(), options.env_file)
    writes = tuple(f"{mount.path}/{TRIAL_FILE}" for mount in options.mounts if not mount.read_only)
    done = run_container(node, options, ("python", "-c", read_script("trial.py"), *writes))
    if done.code:
        message = last_line(done)
        hint = "docker run with the options that `omnilaunch plan` prints; journalctl -u docker has the engine's log"
        return failed(message, next((fix for sign, fix in START_FIXES if sign in message.lower()), hint))
    text = "a container starts with the run's image, user, devices, mounts, limits and variables, imports torch, and may write where the run writes"
    return passed(f"{text}; not tried, since launch copies it first (cluster.sync): {', '.join(left_out)}" if left_out else text)


def trial_options(checked: CheckedNode, folder: str, token: str) -> tuple[ContainerOptions, tuple[str, ...]]:
    """The options of the run's container for a trial in `folder`; and the mounts without a source yet, which a launch copies there."""
    options, cluster = checked.command.container, checked.plan.config.cluster
    assert options is not None, "the doctor tries containers for the docker runtime only"
    present = {path for path, content in checked.facts.contents.items() if content.digest}
    left_out = tuple(
        mount.path
        for mount in options.mounts
        if mount.path not in present and any(PurePosixPath(mount.path).is_relative_to(synced) for synced in cluster.sync)
    )
    mounts = tuple(mount if mount.read_only else replace(mount, source=folder) for mount in options.mounts if mount.path not in left_out)
    name, labels = f"omnilaunch-doctor-{token}-start", {DOCTOR_LABEL: token}
    groups = options.groups or device_groups(checked)
    return replace(options, name=name, labels=labels, mounts=mounts, groups=groups, env_file=f"{folder}/env"), left_out


# ------------------------------------------------------------------------------------------------------------ connections


def try_reach(nodes: Sequence[AnsweredNode], choices: Sequence[NetworkChoice], token: str) -> dict[str, CheckResult]:
    """Every node connects to every other on the chosen addresses, from a container in the network of the host: on the rendezvous port, and
    on one that the kernel chooses, as NCCL, HCCL and Gloo use."""
    if any(not node.checked.facts.image_id for node in nodes):
        return {EVERY_NODE: unchecked(f"whether the nodes reach each other: {NO_IMAGE}")}
    addresses = {node.host: choice.address for node, choice in zip(nodes, choices, strict=True)}
    plan, script = nodes[0].checked.plan, read_script("reach.py")
    # Only node rank 0 needs the rendezvous port itself, and another check looks at it.
    used = {port for node in nodes for port in node.checked.facts.ports}
    port = free_port(used, plan.config.cluster.rendezvous_port)
    labels, name = {DOCTOR_LABEL: token}, f"omnilaunch-doctor-{token}-reach"
    options = ContainerOptions(image=plan.image.tag, name=name, labels=labels, entrypoint="python")

    def reach(node: AnsweredNode) -> CheckResult:
        own = addresses[node.host]
        others = {address: host for host, address in addresses.items() if host != node.host}
        done = run_container(node, options, ("-c", script, own, str(port), str(REACH_LIMIT_S), *others))
        if done.code in DOCKER_FAILED:
            return unchecked(f"whether it reaches the others: {last_line(done)}")
        failures: dict[str, str] = {} if done.code else json.loads(done.output.strip().rpartition("\n")[2] or "{}")
        if done.code == 0 and not failures:
            return passed(f"{own} reaches {plural(len(others), 'other')}")
        texts = [f"{own} cannot reach {address} ({others[address]}), {why}" for address, why in sorted(failures.items())]
        fix = f"a firewall: sudo ufw allow from {own} on the other node; a wrong network: name the interface in the cluster file"
        return failed("\n".join(texts) or f"{own}: {last_line(done)}", fix)

    return on_each(nodes, reach)


# ---------------------------------------------------------------------------------------------------------- shared folder


def try_shared(nodes: Sequence[AnsweredNode], token: str) -> dict[str, CheckResult]:
    """The other nodes must see a file of the first node exactly when cluster.shared=true. Nothing is tried before the folder exists."""
    first, *others = nodes
    space, root = first.checked.facts.root, root_of(first.checked.plan)
    shared = first.checked.plan.config.cluster.shared
    if space is None or space.path != root:
        text = f"{root} does not exist on {first.host} yet"
        return {EVERY_NODE: failed(text, not_shared_fix(first, f"mount it on every node at {root}")) if shared else passed(text)}
    mark = str(PurePosixPath(root) / f".omnilaunch-{token}")

    def look(node: AnsweredNode) -> CheckResult:
        seen = node.transport.get(mark) == token.encode()
        if shared and not seen:
            text = f"cluster.shared=true, but a file that {first.host} writes to {root} is not visible here"
            return failed(text, not_shared_fix(node, "mount the shared folder"))
        if seen and not shared:
            text = f"cluster.shared=false, but {root} is the same folder as on {first.host}: the nodes would overwrite each other's files"
            return failed(text, offer(node.checked, {"cluster.shared": True}) or "choose a folder that is not shared: cluster.root=FOLDER")
        return passed("as the cluster file says")

    try:
        first.transport.put(token.encode(), mark)
        found = on_each(others, look)
    except NodeFailed as error:
        return {first.host: unchecked(f"whether {root} is shared: {error}")}
    finally:
        with suppress(NodeFailed):  # a node that is lost now is reported by the next use
            first.transport.run(("rm", "-f", "--", mark), timeout_s=FOLDER_TIMEOUT_S)
    agreed = {EVERY_NODE: passed(f"{root} is {'one folder' if shared else 'a separate folder on each node'}")}
    return {host: result for host, result in found.items() if result.level != "ok"} or agreed


def not_shared_fix(node: AnsweredNode, mount: str) -> str:
    separate = offer(node.checked, {"cluster.shared": False})
    return f"{mount}, or {separate}" if separate else mount


def last_line(done: Result) -> str:
    """The last line of docker's output that is a message."""
    lines = (done.errors.strip() or done.output.strip()).splitlines()
    messages = [line for line in lines if line and not line.startswith("Run 'docker run --help'") and "See 'docker run" not in line]
    return messages[-1] if messages else f"exit code {done.code}"
