"""Opens what a launch uses of the outside, for a plan: the nodes over SSH or this machine, and the secrets of this environment."""

import getpass
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.config.schema import Cluster, Node
from launcher.doctor.doctor import Examination, examine
from launcher.doctor.findings import describe_findings, has_errors
from launcher.doctor.free_memory import memory_within
from launcher.doctor.network import take_network
from launcher.errors import ConfigRefused, NodeFailed
from launcher.image.stack import Stack, load_stacks
from launcher.plan.plan import LocalContext, Plan, move_plan
from launcher.run.prepare import Session
from launcher.run.restart import replace_lost
from launcher.run.run_folder import WorkingNode
from launcher.ssh.node import Ssh
from launcher.ssh.parallel import reach_all, together
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import default_settings
from launcher.ssh.transport import Local, Transport

Say = Callable[[str], None]
RETRY_S = 2.0
# Its connection 1, two logs that are followed 3 each, two commands at once 2 each (measured); 128 nodes pass the usual 1024.
FILES, FILES_A_NODE = 256, 12


@contextmanager
def reach_nodes(cluster: Cluster, nodes: Sequence[Node], environ: Mapping[str, str]) -> Iterator[tuple[Transport | NodeFailed, ...]]:
    """The way to each node, or why there is none."""
    with reach_with(cluster, nodes, environ) as (_, ways):
        yield ways


@contextmanager
def reach_with(
    cluster: Cluster, nodes: Sequence[Node], environ: Mapping[str, str]
) -> Iterator[tuple[ConnectionPool | None, tuple[Transport | NodeFailed, ...]]]:
    """The same, and the client that the ways go through; None where this machine is the node."""
    if cluster.is_local:
        yield None, tuple(Local(environ) for _ in nodes)
        return
    allow_files(len(nodes))
    client = ConnectionPool(default_settings(Path(environ.get("HOME", "/")), getpass.getuser(), cluster))
    try:
        yield client, reach_all(nodes, client)
    finally:
        client.close()


def allow_files(nodes: int) -> None:
    """Raise this process's own limit of open files, which is 1024 as a rule, as far as it may and these nodes need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES + FILES_A_NODE * nodes
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


@contextmanager
def open_session(plan: Plan, place: LocalContext, environ: Mapping[str, str], *, say: Say, terminal: bool, require: bool = True) -> Iterator[Session]:
    """Connected to every working node, in their order. Raises NodeFailed that names all nodes which cannot be reached, before anything of
    the run is made, unless a run that is there is only to be looked after (`require`): then each use of such a node raises it. Raises
    ConfigRefused for a secret that is not there and that a start will need."""
    with open_examined(plan, place, environ, say=say, terminal=terminal, require=require, examines=False) as (_, desk):
        yield desk


@contextmanager
def open_examined(
    plan: Plan, place: LocalContext, environ: Mapping[str, str], *, say: Say, terminal: bool, require: bool = True, examines: bool = True
) -> Iterator[tuple[Plan, Session]]:
    """The same, and the plan with the network that its nodes were found in, over the same connections. Raises NodeFailed with all that
    stands in the way of a launch."""
    names = plan.config.cluster.secrets
    with ExitStack() as stack:

        def open_for(plan: Plan, require: bool, examines: bool) -> tuple[Plan, Session]:
            secrets = named_secrets(names, environ) if require else {}
            nodes = plan.config.cluster.working
            client, ways = stack.enter_context(reach_with(plan.config.cluster, nodes, environ))
            if examines and (client is not None or plan.config.hardware.accelerator != "cpu"):
                plan = examined(plan, place, ways, say)
            transports = require_all(ways) if require else tuple(lazily(node, way, client) for node, way in zip(nodes, ways, strict=True))
            return plan, Session(
                project=place.project,
                transports=transports,
                here=Local(environ),
                secrets=secrets,
                say=say,
                terminal=terminal,
                move=move,
            )

        def move(plan: Plan, lost: frozenset[str]) -> tuple[Plan, Session]:
            moved = move_to_reached(plan, lost, place, environ, say)
            stack.close()  # of the attempt that is over, whose desk nobody uses any more
            return open_for(moved, require=True, examines=False)

        yield open_for(plan, require, examines)


def move_to_reached(plan: Plan, lost: frozenset[str], place: LocalContext, environ: Mapping[str, str], say: Say) -> Plan:
    """The plan on nodes that answer and are well. One that is lost and has no substitute is waited for as long as a node may be silent.
    Raises NodeFailed."""
    cluster, stacks = plan.config.cluster, load_stacks(place.project / "images")
    if cluster.is_local:
        return plan
    deadline = time.monotonic() + cluster.node_timeout_s
    while True:
        moved = replace_lost(cluster, lost, minimum=plan.config.run.minimum_nodes)
        unfit: frozenset[str] = frozenset()
        with reach_nodes(moved, moved.working, environ) as ways:
            unfit = frozenset(node.host for node, way in zip(moved.working, ways, strict=True) if isinstance(way, NodeFailed))
            problem = together([way for way in ways if isinstance(way, NodeFailed)], len(ways)) if unfit else None
            if problem is None:
                try:
                    return examined(move_plan(plan, moved, stacks, place), place, ways, say)
                except HealthRefused as error:
                    unfit, problem = error.hosts, error
        if unfit <= lost and time.monotonic() > deadline:
            raise problem
        lost |= unfit
        time.sleep(RETRY_S)


def examined(plan: Plan, place: LocalContext, ways: Sequence[Transport | NodeFailed], say: Say) -> Plan:
    """The plan with the network that its nodes were found in, and what their fullest device has free. `ways`: to its working nodes. Raises
    NodeFailed with all that stands in the way of a launch."""
    stacks, cluster = load_stacks(place.project / "images"), plan.config.cluster
    examination = examine_on(plan, stacks[plan.config.hardware.stack], cluster.working, ways, launching=True)
    require_health(examination, say)
    if examination.choices:
        spares = tuple(node for node in cluster.nodes if node.spare)
        nodes = (*take_network(cluster.working, examination.choices), *spares)
        plan = move_plan(plan, replace(cluster, nodes=nodes), stacks, place)
    # What is free there wins over the data sheet; that it suffices has just been looked at, node by node.
    return replace(plan, memory=memory_within(plan.config, examination.free_memory)) if examination.free_memory else plan


@contextmanager
def reach_sites(plans: Sequence[Plan], environ: Mapping[str, str]) -> Iterator[tuple[WorkingNode, ...]]:
    """Every container that an attempt of a run may have left: by host and name, as the newest of the plans has it."""
    found = {
        (command.host, command.name): (node, command)
        for plan in plans
        for node, command in zip(plan.config.cluster.working, plan.commands, strict=True)
    }
    nodes = tuple(node for node, _ in found.values())
    with reach_with(plans[-1].config.cluster, nodes, environ) as (client, ways):
        transports = (lazily(node, way, client) for node, way in zip(nodes, ways, strict=True))
        yield tuple(WorkingNode(command=command, transport=transport) for (_, command), transport in zip(found.values(), transports, strict=True))


def lazily(node: Node, way: Transport | NodeFailed, client: ConnectionPool | None) -> Transport:
    """A node that does not answer is asked again by each use."""
    if not isinstance(way, NodeFailed):
        return way
    assert client is not None, "this machine always answers"
    return Ssh(node, client)


def require_all(ways: Sequence[Transport | NodeFailed]) -> tuple[Transport, ...]:
    failures = [way for way in ways if isinstance(way, NodeFailed)]
    if failures:
        raise together(failures, len(ways))
    return tuple(way for way in ways if not isinstance(way, NodeFailed))


def examine_nodes(plan: Plan, stack: Stack, environ: Mapping[str, str], *, launching: bool) -> Examination:
    """Every node of the cluster, spares too, held against the doctor's checks; a launch asks of the working ones what it waits for."""
    nodes = plan.config.cluster.working if launching else plan.config.cluster.nodes
    with reach_nodes(plan.config.cluster, nodes, environ) as ways:
        return examine_on(plan, stack, nodes, ways, launching=launching)


def examine_on(plan: Plan, stack: Stack, nodes: Sequence[Node], ways: Sequence[Transport | NodeFailed], *, launching: bool) -> Examination:
    return examine(plan, stack, nodes, ways, now=time.time, token=uuid.uuid4().hex[:12], launching=launching)


class HealthRefused(NodeFailed):
    """Findings that stand in the way of a launch, on these hosts."""

    def __init__(self, text: str, hosts: frozenset[str]) -> None:
        super().__init__(text)
        self.hosts = hosts


def require_health(examination: Examination, say: Say) -> None:
    """Say what a launch should know. Raises NodeFailed with every finding that stands in its way."""
    if has_errors(examination.findings):
        hosts = frozenset(finding.host for finding in examination.findings if finding.level == "error")
        raise HealthRefused("the nodes are not ready:\n" + describe_findings(examination.findings), hosts)
    for finding in examination.findings:
        if finding.level == "warning":
            say(f"warning: {finding.host}: {finding.name}: {finding.evidence}")


def named_secrets(names: tuple[str, ...], environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigRefused(f"cluster.secrets names {', '.join(missing)}, which this environment does not have: export it, or leave it out")
    return {name: environ[name] for name in names}
