"""What is wrong with this machine or cluster, before a launch: every node asked once, all checks held against the answers.

Each finding has a name, the evidence, and the command that mends it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.check.problem import Problem
from launcher.config.schema import Node
from launcher.doctor import (
    cross_node_checks as agreement,
    device_checks as device,
    free_memory as headroom,
    host_checks as machine,
    live_checks as experiment,
)
from launcher.doctor.findings import EVERY_NODE, Agreement, Case, CheckResult, Finding, NodeCheck, named, unchecked, wrong
from launcher.doctor.free_memory import FreeMemory
from launcher.doctor.live_checks import AnsweredNode
from launcher.doctor.network import NetworkChoice
from launcher.doctor.node_facts import NodeFacts
from launcher.doctor.questions import Inquiry, probe
from launcher.errors import NodeFailed
from launcher.image.stack import Stack
from launcher.plan.plan import Plan
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import Transport

Need = Literal["docker", "cuda", "npu", "ascend_runtime", "device", "several", "named_data", "driver"]
NEEDS: dict[Need, Callable[[Plan], bool]] = {
    "docker": lambda plan: plan.config.cluster.runtime == "docker",
    "cuda": lambda plan: plan.config.hardware.accelerator == "cuda",
    "npu": lambda plan: plan.config.hardware.accelerator == "npu",
    "ascend_runtime": lambda plan: plan.config.cluster.ascend_runtime,
    "device": lambda plan: plan.config.hardware.accelerator != "cpu",
    "driver": lambda plan: plan.config.hardware.driver.kind != "none",
    "several": lambda plan: len(plan.config.cluster.working) > 1,
    "named_data": lambda plan: bool(named_contents(plan)),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """`needs`: what a plan must have for the check to mean anything. `launch`: whether a launch waits for it too."""

    ask: NodeCheck
    needs: tuple[Need, ...] = ()
    launch: bool = True


@dataclass(frozen=True, kw_only=True)
class CrossNodeCheck:
    """The same, of nodes held against each other; it needs several of them besides."""

    ask: Agreement
    needs: tuple[Need, ...] = ()
    launch: bool = True


REACH = "reach"  # by SSH, and its shell runs a script: what every other check stands on
NODE_CHECKS: dict[str, Check] = {
    "shell": Check(ask=machine.check_shell),
    "architecture": Check(ask=machine.check_architecture),
    "kernel": Check(ask=machine.check_kernel, launch=False),
    "memory": Check(ask=machine.check_memory),
    "shm": Check(ask=machine.check_shm),
    "memlock": Check(ask=machine.check_memlock, needs=("several", "device"), launch=False),
    "room": Check(ask=machine.check_room),
    "writable": Check(ask=machine.check_writable),
    "inodes": Check(ask=machine.check_inodes, launch=False),
    "contents": Check(ask=machine.check_contents, needs=("named_data",), launch=False),
    "leftovers": Check(ask=machine.check_leftovers, needs=("docker",)),
    "docker_client": Check(ask=machine.check_docker_client, needs=("docker",)),
    "docker_engine": Check(ask=machine.check_docker_engine, needs=("docker",)),
    "docker_version": Check(ask=machine.check_docker_version, needs=("docker",)),
    "docker_storage": Check(ask=machine.check_docker_storage, needs=("docker",), launch=False),
    "docker_room": Check(ask=machine.check_docker_room, needs=("docker",)),
    "toolkit": Check(ask=machine.check_toolkit, needs=("docker", "cuda")),
    "image": Check(ask=machine.check_image, needs=("docker",)),
    "rendezvous_port": Check(ask=machine.check_rendezvous_port, needs=("several",)),
    "hccl_ports": Check(ask=machine.check_hccl_ports, needs=("several", "npu")),
    "hccl_reserved": Check(ask=machine.check_hccl_reserved, needs=("several", "npu"), launch=False),
    "device_tool": Check(ask=device.check_device_tool, needs=("device",)),
    "device_count": Check(ask=device.check_device_count, needs=("device",)),
    "chip": Check(ask=device.check_chip, needs=("device",)),
    "device_memory": Check(ask=device.check_device_memory, needs=("device",)),
    "fit": Check(ask=headroom.check_fit, needs=("device",)),
    "device_health": Check(ask=device.check_device_health, needs=("device",)),
    "device_idle": Check(ask=device.check_device_idle, needs=("device",)),
    "driver": Check(ask=device.check_driver, needs=("driver",)),
    "device_files": Check(ask=device.check_device_files, needs=("device",)),
    "device_access": Check(ask=device.check_device_access, needs=("npu", "docker")),
    "driver_mounts": Check(ask=device.check_driver_mounts, needs=("npu", "docker")),
    "ascend_runtime": Check(ask=device.check_ascend_runtime, needs=("npu", "docker", "ascend_runtime")),
}
COMPARISONS: dict[str, CrossNodeCheck] = {
    "distinct": CrossNodeCheck(ask=agreement.check_distinct),
    "same_architecture": CrossNodeCheck(ask=agreement.check_same_architecture),
    "same_chips": CrossNodeCheck(ask=agreement.check_same_chips, needs=("device",)),
    "same_count": CrossNodeCheck(ask=agreement.check_same_count, needs=("device",)),
    "same_driver": CrossNodeCheck(ask=agreement.check_same_driver, needs=("driver",), launch=False),
    "clocks": CrossNodeCheck(ask=agreement.check_clocks),
    "network": CrossNodeCheck(ask=agreement.check_network),
    "same_mtu": CrossNodeCheck(ask=agreement.check_same_mtu, launch=False),
    "same_contents": CrossNodeCheck(ask=agreement.check_same_contents, needs=("named_data",), launch=False),
    "same_image": CrossNodeCheck(ask=agreement.check_same_image, needs=("docker",)),
}
EXPERIMENTS: dict[str, tuple[Need, ...]] = {"container": ("docker",), "connections": ("docker", "several"), "shared": ("several",)}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """`facts` by host, of the nodes that answered; `choices`: interface and address of the working nodes, in their order, () where some
    did not answer or no network was found; `headroom`: of the fullest device of them all, None where a node says no size."""

    findings: tuple[Finding, ...]
    facts: dict[str, NodeFacts]
    choices: tuple[NetworkChoice, ...]
    headroom: FreeMemory | None = None


def examine(
    plan: Plan,
    stack: Stack,
    nodes: Sequence[Node],
    transports: Sequence[Transport | NodeFailed],
    *,
    now: Callable[[], float],
    token: str,
    launching: bool = False,
) -> Examination:
    """Hold `nodes` against all checks, or those that a launch waits for. `transports`: the way to each, or why there is none. `now`: the
    launcher's clock, seconds since 1970. `token`: a word of its own for marks and containers that are made and removed. Raises nothing
    but bugs: a node that fails is a finding."""
    asked = inquiry_of(plan, launching)
    answers = attempt_each(lambda way: facts_of(way, asked, now), transports)
    sites = tuple(
        AnsweredNode(case=Case(plan=plan, stack=stack, node=node, rank=rank_of(plan, node), facts=facts), transport=way)
        for node, way, facts in zip(nodes, transports, answers, strict=True)
        if isinstance(facts, NodeFacts) and not isinstance(way, NodeFailed)
    )
    findings = [each for node, facts in zip(nodes, answers, strict=True) for each in examine_node(plan, stack, node, facts, launching)]
    findings += compare(plan, [site.case for site in sites], launching)
    choices = choices_of(plan, sites)
    if not launching:
        findings += experiment_on(plan, sites, choices, token)
    return Examination(
        findings=tuple(findings),
        facts={site.case.node.host: site.case.facts for site in sites},
        choices=choices,
        headroom=headroom.tightest(site.case for site in sites),
    )


def inquiry_of(plan: Plan, launching: bool) -> Inquiry:
    """A launch hashes no data: the trainer's own check reads it on every node anyway."""
    cluster = plan.config.cluster
    return Inquiry(
        accelerator=plan.config.hardware.accelerator,
        root=machine.root_of(plan),
        image=plan.image.tag if cluster.runtime == "docker" else "",
        contents=() if launching else named_contents(plan),
    )


def named_contents(plan: Plan) -> tuple[str, ...]:
    spec = plan.spec
    named = () if spec.data.builtin else (spec.data.train, spec.data.evaluation, spec.data.images)
    return tuple(dict.fromkeys(path for path in (*named, spec.model.source.path, spec.stage.checkpoint) if path))


def rank_of(plan: Plan, node: Node) -> int | None:
    working = plan.config.cluster.working
    return working.index(node) if node in working else None


def facts_of(way: Transport | NodeFailed, asked: Inquiry, now: Callable[[], float]) -> NodeFacts:
    if isinstance(way, NodeFailed):
        raise way
    return probe(way, asked, now=now)


def applies(plan: Plan, needs: Sequence[Need]) -> bool:
    return all(NEEDS[need](plan) for need in needs)


def examine_node(plan: Plan, stack: Stack, node: Node, facts: NodeFacts | NodeFailed, launching: bool) -> Iterator[Finding]:
    checks = {name: check for name, check in NODE_CHECKS.items() if applies(plan, check.needs) and (check.launch or not launching)}
    if isinstance(facts, NodeFailed):
        evidence, _, fix = str(facts).partition("\n")
        yield named(REACH, node.host, wrong(evidence, fix.strip() or f"ssh {node.host} true"))
        yield from (named(name, node.host, unchecked("the node could not be reached")) for name in checks)
        return
    yield named(REACH, node.host, CheckResult(level="ok", evidence=f"it answers as {facts.user}@{facts.hostname}"))
    case = Case(plan=plan, stack=stack, node=node, rank=rank_of(plan, node), facts=facts)
    for name, check in checks.items():
        yield named(name, node.host, check.ask(case))


def compare(plan: Plan, cases: Sequence[Case], launching: bool) -> Iterator[Finding]:
    """Nodes that answered, against each other."""
    for name, check in COMPARISONS.items():
        if not applies(plan, ("several", *check.needs)) or (launching and not check.launch):
            continue
        told = check.ask(cases) if len(cases) > 1 else {EVERY_NODE: unchecked("fewer than two nodes answered")}
        yield from (named(name, host, diagnosis) for host, diagnosis in told.items())


def choices_of(plan: Plan, sites: Sequence[AnsweredNode]) -> tuple[NetworkChoice, ...]:
    working = [site.case for site in sites if site.case.rank is not None]
    if len(working) < len(plan.config.cluster.working):
        return ()
    choices = agreement.networks_of(working)
    return () if isinstance(choices, Problem) else choices


def experiment_on(plan: Plan, sites: Sequence[AnsweredNode], choices: Sequence[NetworkChoice], token: str) -> Iterator[Finding]:
    working = tuple(site for site in sites if site.case.rank is not None)

    def connections() -> dict[str, CheckResult]:
        if not choices:
            return {EVERY_NODE: unchecked("no network was found that all nodes are in")}
        return experiment.try_reach(working, choices, token)

    tries: dict[str, Callable[[], dict[str, CheckResult]]] = {
        "container": lambda: experiment.try_start(sites, token),
        "connections": connections,
        "shared": lambda: experiment.try_shared(sites, token),
    }
    for name, needs in EXPERIMENTS.items():
        if applies(plan, needs):
            enough = len(sites) > (1 if "several" in needs else 0)
            told = tries[name]() if enough else {EVERY_NODE: unchecked("too few nodes answered")}
            yield from (named(name, host, diagnosis) for host, diagnosis in told.items())
