"""What is wrong with this machine or cluster, before a launch: every node is asked once, and all checks look at the answers.

Each finding has a name, the evidence, and the command or override that fixes the problem.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from launcher.check.problem import Problem
from launcher.config.schema import Node
from launcher.doctor import cross_node_checks, device_checks, engine_checks, free_memory, gpu_checks, host_checks, live_checks, rdma_checks
from launcher.doctor.findings import (
    EVERY_NODE,
    REACH,
    CheckedNode,
    CheckResult,
    CrossCheck,
    Finding,
    NodeCheck,
    failed,
    named,
    passed,
    unchecked,
)
from launcher.doctor.free_memory import FreeMemory
from launcher.doctor.live_checks import AnsweredNode
from launcher.doctor.network import NetworkChoice
from launcher.doctor.node_facts import NodeFacts
from launcher.doctor.questions import NodeQuery, ask_node
from launcher.errors import NodeFailed
from launcher.image.stack import Stack
from launcher.plan.commands import data_paths
from launcher.plan.plan import Plan
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import Transport
from trainer.contract.row_sets.row_files import is_glob
from trainer.contract.row_sets.row_set import as_entries

NEXT = "Next: "  # begins the next step in the text of a NodeFailed
Need = Literal["docker", "cuda", "npu", "ascend_runtime", "device", "several", "named_data", "driver"]
NEEDS: dict[Need, Callable[[Plan], bool]] = {
    "docker": lambda plan: plan.config.cluster.runtime == "docker",
    "cuda": lambda plan: plan.config.hardware.accelerator == "cuda",
    "npu": lambda plan: plan.config.hardware.accelerator == "npu",
    "ascend_runtime": lambda plan: plan.config.cluster.ascend_runtime,
    "device": lambda plan: plan.config.hardware.accelerator != "cpu",
    "driver": lambda plan: plan.config.hardware.driver.kind != "none",
    "several": lambda plan: len(plan.config.cluster.working) > 1,
    "named_data": lambda plan: bool(paths_compared(plan)),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """`needs`: what a plan must have for the check to apply. `launch`: whether a launch waits for it as well."""

    run: NodeCheck
    needs: tuple[Need, ...] = ()
    launch: bool = True


@dataclass(frozen=True, kw_only=True)
class CrossNodeCheck:
    """The same for a check that compares nodes; it needs several nodes as well."""

    run: CrossCheck
    needs: tuple[Need, ...] = ()
    launch: bool = True


NODE_CHECKS: dict[str, Check] = {
    "shell": Check(run=host_checks.check_shell),
    "ssh_config": Check(run=host_checks.check_ssh_config, launch=False),
    "architecture": Check(run=host_checks.check_architecture),
    "kernel": Check(run=host_checks.check_kernel, launch=False),
    "memory": Check(run=host_checks.check_memory),
    "shm": Check(run=host_checks.check_shm),
    "memlock": Check(run=host_checks.check_memlock, needs=("several", "device"), launch=False),
    "room": Check(run=host_checks.check_room),
    "writable": Check(run=host_checks.check_writable),
    "inodes": Check(run=host_checks.check_inodes, launch=False),
    "contents": Check(run=host_checks.check_contents, needs=("named_data",), launch=False),
    "leftovers": Check(run=host_checks.check_leftovers, needs=("docker",)),
    "docker_client": Check(run=host_checks.check_docker_client, needs=("docker",)),
    "docker_engine": Check(run=host_checks.check_docker_engine, needs=("docker",)),
    "docker_version": Check(run=host_checks.check_docker_version, needs=("docker",)),
    "docker_storage": Check(run=host_checks.check_docker_storage, needs=("docker",), launch=False),
    "docker_room": Check(run=host_checks.check_docker_room, needs=("docker",)),
    "rootless": Check(run=engine_checks.check_rootless, needs=("docker",)),
    "user_namespace": Check(run=engine_checks.check_user_namespace, needs=("docker",)),
    "snap": Check(run=engine_checks.check_snap, needs=("docker",)),
    "docker_disk": Check(run=engine_checks.check_docker_disk, needs=("docker",), launch=False),
    "docker_proxy": Check(run=engine_checks.check_docker_proxy, needs=("docker",)),
    "toolkit": Check(run=host_checks.check_toolkit, needs=("docker", "cuda")),
    "image": Check(run=host_checks.check_image, needs=("docker",)),
    "rendezvous_port": Check(run=host_checks.check_rendezvous_port, needs=("several",)),
    "hccl_ports": Check(run=host_checks.check_hccl_ports, needs=("several", "npu")),
    "hccl_reserved": Check(run=host_checks.check_hccl_reserved, needs=("several", "npu"), launch=False),
    "device_tool": Check(run=device_checks.check_device_tool, needs=("device",)),
    "device_count": Check(run=device_checks.check_device_count, needs=("device",)),
    "chip": Check(run=device_checks.check_chip, needs=("device",)),
    "device_memory": Check(run=device_checks.check_device_memory, needs=("device",)),
    "fit": Check(run=free_memory.check_fit, needs=("device",)),
    "device_health": Check(run=device_checks.check_device_health, needs=("device",)),
    "device_idle": Check(run=device_checks.check_device_idle, needs=("device",)),
    "mig": Check(run=gpu_checks.check_mig, needs=("cuda",)),
    "compute_mode": Check(run=gpu_checks.check_compute_mode, needs=("cuda",)),
    "memory_repair": Check(run=gpu_checks.check_memory_repair, needs=("cuda",)),
    "fabric": Check(run=gpu_checks.check_fabric, needs=("cuda",)),
    "rdma": Check(run=rdma_checks.check_rdma, needs=("cuda", "several")),
    "driver": Check(run=device_checks.check_driver, needs=("driver",)),
    "device_files": Check(run=device_checks.check_device_files, needs=("device",)),
    "device_access": Check(run=device_checks.check_device_access, needs=("npu", "docker")),
    "driver_mounts": Check(run=device_checks.check_driver_mounts, needs=("npu", "docker")),
    "ascend_runtime": Check(run=device_checks.check_ascend_runtime, needs=("npu", "docker", "ascend_runtime")),
}
CROSS_NODE_CHECKS: dict[str, CrossNodeCheck] = {
    "distinct": CrossNodeCheck(run=cross_node_checks.check_distinct),
    "same_architecture": CrossNodeCheck(run=cross_node_checks.check_same_architecture),
    "same_chips": CrossNodeCheck(run=cross_node_checks.check_same_chips, needs=("device",)),
    "same_count": CrossNodeCheck(run=cross_node_checks.check_same_count, needs=("device",)),
    "same_driver": CrossNodeCheck(run=cross_node_checks.check_same_driver, needs=("driver",), launch=False),
    "same_rdma": CrossNodeCheck(run=rdma_checks.check_same_rdma, needs=("cuda",)),
    "clocks": CrossNodeCheck(run=cross_node_checks.check_clocks),
    "network": CrossNodeCheck(run=cross_node_checks.check_network),
    "same_mtu": CrossNodeCheck(run=cross_node_checks.check_same_mtu, launch=False),
    "same_contents": CrossNodeCheck(run=cross_node_checks.check_same_contents, needs=("named_data",), launch=False),
    "same_image": CrossNodeCheck(run=cross_node_checks.check_same_image, needs=("docker",)),
}
LIVE_CHECKS: dict[str, tuple[Need, ...]] = {"container": ("docker",), "connections": ("docker", "several"), "shared": ("several",)}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """`facts` by host, of the nodes that answered; `choices`: interface and address of the working nodes, in their order, () where some did not
    answer or share no network; `groups` by host: of the container's user, so that it may open the devices; `rdma`: hosts whose container gets
    /dev/infiniband; `free_memory`: the least of all of them, None where a node does not print sizes."""

    findings: tuple[Finding, ...]
    facts: dict[str, NodeFacts]
    choices: tuple[NetworkChoice, ...]
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rdma: frozenset[str] = frozenset()
    free_memory: FreeMemory | None = None


def examine(
    plan: Plan,
    stacks: Mapping[str, Stack],
    nodes: Sequence[Node],
    transports: Sequence[Transport | NodeFailed],
    *,
    now: Callable[[], float],
    token: str,
    launching: bool = False,
) -> Examination:
    """Run all checks on `nodes`, or those that a launch waits for. `transports`: the connection to each, or why there is none. `now`: the
    launcher's clock, seconds since 1970. `token`: a unique word for files and containers that are made and removed. A node that fails is a
    finding, never an exception."""
    query = query_of(plan, launching)
    answers = attempt_each(lambda transport: facts_of(transport, query, now), transports)
    used_ports = frozenset(port for facts in answers if isinstance(facts, NodeFacts) for port in facts.ports)
    answered = tuple(
        AnsweredNode(
            checked=CheckedNode(plan=plan, stacks=stacks, node=node, rank=rank_of(plan, node), facts=facts, used_ports=used_ports),
            transport=transport,
        )
        for node, transport, facts in zip(nodes, transports, answers, strict=True)
        if isinstance(facts, NodeFacts) and not isinstance(transport, NodeFailed)
    )
    checked = {node.host: node.checked for node in answered}
    findings = [
        finding for node, facts in zip(nodes, answers, strict=True) for finding in check_node(plan, node, facts, checked, launching)
    ]
    findings += compare_nodes(plan, tuple(checked.values()), launching)
    choices = network_choices(plan, tuple(checked.values()))
    if not launching:
        findings += run_live_checks(plan, answered, choices, token)
    return Examination(
        findings=tuple(findings),
        facts={host: node.facts for host, node in checked.items()},
        choices=choices,
        rdma=frozenset(host for host, node in checked.items() if rdma_checks.uses_rdma(node)),
        groups={host: found for host, node in checked.items() if (found := device_checks.device_groups(node))},
        free_memory=free_memory.least_free(checked.values()),
    )


def query_of(plan: Plan, launching: bool) -> NodeQuery:
    """A launch does not hash the data: the trainer's own check reads it on every node anyway."""
    return NodeQuery(
        accelerator=plan.config.hardware.accelerator,
        root=host_checks.root_of(plan),
        image=plan.image.tag if plan.config.cluster.runtime == "docker" else "",
        contents=() if launching else paths_compared(plan),
    )


def paths_compared(plan: Plan) -> tuple[str, ...]:
    """Paths of data and model, which must be the same on all nodes. Of a file of rows not the folder, where images are in one of their own."""
    spec = plan.spec
    named = (entry.file for files in (spec.data.train, spec.data.evaluation) for entry in as_entries(files))
    files = () if spec.data.builtin else tuple(name for name in named if name.startswith("/") and not is_glob(name))
    parents = {str(PurePosixPath(file).parent) for file in files} if spec.data.images else set()
    folders = tuple(path for path in data_paths(spec) if path not in parents or path == spec.data.images)
    return tuple(dict.fromkeys(path for path in (*files, *folders, spec.model.source.path, spec.stage.checkpoint) if path))


def rank_of(plan: Plan, node: Node) -> int | None:
    working = plan.config.cluster.working
    return working.index(node) if node in working else None


def facts_of(transport: Transport | NodeFailed, query: NodeQuery, now: Callable[[], float]) -> NodeFacts:
    if isinstance(transport, NodeFailed):
        raise transport
    return ask_node(transport, query, now=now)


def applies(plan: Plan, needs: Sequence[Need]) -> bool:
    return all(NEEDS[need](plan) for need in needs)


def check_node(
    plan: Plan, node: Node, facts: NodeFacts | NodeFailed, checked: dict[str, CheckedNode], launching: bool
) -> Iterator[Finding]:
    checks = {name: check for name, check in NODE_CHECKS.items() if applies(plan, check.needs) and (check.launch or not launching)}
    if isinstance(facts, NodeFailed):
        evidence, _, fix = str(facts).partition(NEXT)
        yield named(REACH, node.host, failed(evidence.rstrip(), fix.strip() or ssh_command(node)))
        yield from (named(name, node.host, unchecked("the node could not be reached")) for name in checks)
        return
    yield named(REACH, node.host, passed(f"reached as {facts.user}@{facts.hostname}"))
    for name, check in checks.items():
        yield named(name, node.host, check.run(checked[node.host]))


def ssh_command(node: Node) -> str:
    """By which a person reaches the node as the launcher does."""
    jump = ("-J", node.jump) if node.jump and node.jump != "none" else ()
    port = ("-p", str(node.port)) if node.port is not None else ()
    return shlex.join(("ssh", *jump, *port, f"{node.user}@{node.host}" if node.user else node.host, "true"))


def compare_nodes(plan: Plan, nodes: Sequence[CheckedNode], launching: bool) -> Iterator[Finding]:
    for name, check in CROSS_NODE_CHECKS.items():
        if not applies(plan, ("several", *check.needs)) or (launching and not check.launch):
            continue
        results = check.run(nodes) if len(nodes) > 1 else {EVERY_NODE: unchecked("fewer than two nodes answered")}
        yield from (named(name, host, result) for host, result in results.items())


def network_choices(plan: Plan, nodes: Sequence[CheckedNode]) -> tuple[NetworkChoice, ...]:
    working = [node for node in nodes if node.rank is not None]
    if len(working) < len(plan.config.cluster.working):
        return ()
    choices = cross_node_checks.networks_of(working)
    return () if isinstance(choices, Problem) else choices


def run_live_checks(plan: Plan, nodes: Sequence[AnsweredNode], choices: Sequence[NetworkChoice], token: str) -> Iterator[Finding]:
    working = tuple(node for node in nodes if node.checked.rank is not None)

    def connections() -> dict[str, CheckResult]:
        if not choices:
            return {EVERY_NODE: unchecked("there is no network that all nodes are in")}
        return live_checks.try_reach(working, choices, token)

    tries: dict[str, Callable[[], dict[str, CheckResult]]] = {
        "container": lambda: live_checks.try_start(nodes, token),
        "connections": connections,
        "shared": lambda: live_checks.try_shared(nodes, token),
    }
    for name, needs in LIVE_CHECKS.items():
        if applies(plan, needs):
            enough = len(nodes) > (1 if "several" in needs else 0)
            results = tries[name]() if enough else {EVERY_NODE: unchecked("too few nodes answered")}
            yield from (named(name, host, result) for host, result in results.items())
