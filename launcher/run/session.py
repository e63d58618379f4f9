"""The connections of a launch: to the nodes over SSH or to this machine, and the secrets of this environment. Also the examination of the nodes."""

import getpass
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.check.nodes import describe_placeholders, is_placeholder
from launcher.config.schema import Cluster, Node
from launcher.doctor.doctor import Examination, examine
from launcher.doctor.findings import describe_findings, has_errors
from launcher.doctor.free_memory import memory_within
from launcher.doctor.network import take_network
from launcher.errors import ConfigRefused, NodeFailed, NodesRefused
from launcher.image.stack import Stack, load_stacks
from launcher.plan.plan import LocalContext, Plan, move_plan
from launcher.run.restart import replace_lost
from launcher.run.run_folder import WorkingNode
from launcher.ssh.node import Ssh
from launcher.ssh.parallel import reach_all, together
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import default_settings
from launcher.ssh.transport import Local, Transport

Say = Callable[[str], None]
RETRY_S = 2.0
# A node takes 1 file for its connection, 3 for each of two followed logs, 2 for each of two commands at once (measured). 128 nodes exceed 1024.
BASE_FILES, FILES_PER_NODE = 256, 12


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a launch uses outside the launcher: the project's folder, the transports to the working nodes (in their order) and to this machine, the
    secret variables for the ranks, where to print. `move` returns the plan and the session for another attempt without the given hosts."""

    project: Path
    transports: tuple[Transport, ...]
    here: Transport
    secrets: Mapping[str, str]
    say: Say
    terminal: bool
    move: Callable[[Plan, frozenset[str]], tuple[Plan, "Session"]]


@contextmanager
def connect_with(
    cluster: Cluster, nodes: Sequence[Node], environ: Mapping[str, str]
) -> Iterator[tuple[ConnectionPool | None, tuple[Transport | NodeFailed, ...]]]:
    """A transport to each node, or why it cannot be reached; and the pool of the connections, None where this machine is the node. Raises
    NodesRefused for an address that no machine has: waiting for it would take minutes."""
    if cluster.is_local:
        yield None, tuple(Local(environ) for _ in nodes)
        return
    if named := [node.host for node in nodes if is_placeholder(node.host)]:
        raise NodesRefused(f"cluster.nodes: {describe_placeholders(named)}")
    raise_open_files_limit(len(nodes))
    pool = ConnectionPool(default_settings(Path(environ.get("HOME", "/")), getpass.getuser(), cluster))
    try:
        yield pool, reach_all(nodes, pool)
    finally:
        pool.close()


def raise_open_files_limit(nodes: int) -> None:
    """Raise this process's limit of open files, usually 1024, to what these nodes need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = BASE_FILES + FILES_PER_NODE * nodes
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


@contextmanager
def open_session(
    plan: Plan, context: LocalContext, environ: Mapping[str, str], *, say: Say, terminal: bool, launching: bool = True
) -> Iterator[tuple[Plan, Session]]:
    """Connect to every working node, and examine them. Yields the plan with the network that its nodes were found in, and the session. Raises
    NodeFailed that names all nodes which cannot be reached, or every finding that prevents a launch, before anything of the run exists; and
    ConfigRefused for a secret that is not set. Not `launching`, to supervise a run that exists: nothing is examined, no secret is read, and a node
    that cannot be reached raises NodeFailed only when it is used."""
    with ExitStack() as stack:

        def open_for(plan: Plan, *, launching: bool, examines: bool) -> tuple[Plan, Session]:
            secrets = read_secrets(plan.config.cluster.secrets, environ) if launching else {}
            nodes = plan.config.cluster.working
            pool, reached = stack.enter_context(connect_with(plan.config.cluster, nodes, environ))
            if examines and (pool is not None or plan.config.hardware.accelerator != "cpu"):
                plan = examine_plan(plan, context, reached, say)
            transports = all_reached(reached) if launching else reconnecting(nodes, reached, pool)
            return plan, Session(
                project=context.project, transports=transports, here=Local(environ), secrets=secrets, say=say, terminal=terminal, move=move
            )

        def move(plan: Plan, lost: frozenset[str]) -> tuple[Plan, Session]:
            moved = move_to_reached(plan, lost, context, environ, say)
            stack.close()  # the connections of the previous attempt
            return open_for(moved, launching=True, examines=False)

        yield open_for(plan, launching=launching, examines=launching)


def move_to_reached(plan: Plan, lost: frozenset[str], context: LocalContext, environ: Mapping[str, str], say: Say) -> Plan:
    """The plan on nodes that respond and are healthy. A lost node without a spare is waited for, for cluster.node_timeout_s. Raises NodeFailed."""
    cluster, stacks = plan.config.cluster, load_stacks(context.project / "images")
    if cluster.is_local:
        return plan
    deadline = time.monotonic() + cluster.node_timeout_s
    while True:
        moved = replace_lost(cluster, lost, minimum=plan.config.run.minimum_nodes)
        with connect_with(moved, moved.working, environ) as (_, reached):
            unreached = {node.host: way for node, way in zip(moved.working, reached, strict=True) if isinstance(way, NodeFailed)}
            if unreached:
                unfit, problem = frozenset(unreached), together(list(unreached.values()), len(reached))
            else:
                try:
                    return examine_plan(move_plan(plan, moved, stacks, context), context, reached, say)
                except HealthRefused as error:
                    unfit, problem = error.hosts, error
        if unfit <= lost and time.monotonic() > deadline:
            raise problem
        lost |= unfit
        time.sleep(RETRY_S)


def examine_plan(plan: Plan, context: LocalContext, reached: Sequence[Transport | NodeFailed], say: Say) -> Plan:
    """The plan with the network that its working nodes were found in, the groups that own their device files, their RDMA devices, and the free memory of the device
    that has the least. Raises NodeFailed with every finding that prevents a launch."""
    stacks, cluster = load_stacks(context.project / "images"), plan.config.cluster
    token = uuid.uuid4().hex[:12]
    examination = examine(plan, stacks, cluster.working, reached, now=time.time, token=token, launching=True)
    require_health(examination, say)
    spares = tuple(node for node in cluster.nodes if node.spare)
    working = take_network(cluster.working, examination.choices) if examination.choices else cluster.working
    nodes = (
        *(
            replace(node, groups=node.groups or examination.groups.get(node.host, ()), rdma=node.rdma or node.host in examination.rdma)
            for node in working
        ),
        *spares,
    )
    if nodes != (*cluster.working, *spares):
        plan = move_plan(plan, replace(cluster, nodes=nodes), stacks, context)
    # The free memory that was found replaces the data sheet's; whether it is enough was just checked on each node.
    return replace(plan, memory=memory_within(plan.config, examination.free_memory)) if examination.free_memory else plan


@contextmanager
def reach_containers(plans: Sequence[Plan], environ: Mapping[str, str]) -> Iterator[tuple[WorkingNode, ...]]:
    """Every container that an attempt of a run may have left, by host and name, as the newest of the plans that has it describes it."""
    found = {
        (command.host, command.name): (node, command)
        for plan in plans
        for node, command in zip(plan.config.cluster.working, plan.commands, strict=True)
    }
    nodes, commands = [node for node, _ in found.values()], [command for _, command in found.values()]
    with connect_with(plans[-1].config.cluster, nodes, environ) as (pool, reached):
        transports = reconnecting(nodes, reached, pool)
        yield tuple(WorkingNode(command=command, transport=transport) for command, transport in zip(commands, transports, strict=True))


def reconnecting(nodes: Sequence[Node], reached: Sequence[Transport | NodeFailed], pool: ConnectionPool | None) -> tuple[Transport, ...]:
    """Transports to all nodes; each use of one that could not be reached tries again."""
    transports: list[Transport] = []
    for node, way in zip(nodes, reached, strict=True):
        if isinstance(way, NodeFailed):
            assert pool is not None, "this machine is always reached"
            way = Ssh(node, pool)
        transports.append(way)
    return tuple(transports)


def all_reached(reached: Sequence[Transport | NodeFailed]) -> tuple[Transport, ...]:
    failures = [way for way in reached if isinstance(way, NodeFailed)]
    if failures:
        raise together(failures, len(reached))
    return tuple(way for way in reached if not isinstance(way, NodeFailed))


def examine_nodes(plan: Plan, stacks: Mapping[str, Stack], environ: Mapping[str, str], *, launching: bool) -> Examination:
    """The doctor's checks on every node of the cluster, spares too; before a launch only on the working nodes."""
    nodes = plan.config.cluster.working if launching else plan.config.cluster.nodes
    with connect_with(plan.config.cluster, nodes, environ) as (_, reached):
        return examine(plan, stacks, nodes, reached, now=time.time, token=uuid.uuid4().hex[:12], launching=launching)


class HealthRefused(NodeFailed):
    """Findings on these hosts prevent a launch."""

    def __init__(self, text: str, hosts: frozenset[str] = frozenset()) -> None:
        super().__init__(text)
        self.hosts = hosts


def require_health(examination: Examination, say: Say) -> None:
    """Print the warnings. Raises NodeFailed with every finding when one prevents a launch."""
    if has_errors(examination.findings):
        hosts = frozenset(finding.host for finding in examination.findings if finding.level == "error")
        raise HealthRefused("the nodes are not ready:\n" + describe_findings(examination.findings), hosts)
    for finding in examination.findings:
        if finding.level == "warning":
            say(f"warning: {finding.host}: {finding.name}: {finding.evidence}")


def read_secrets(names: tuple[str, ...], environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigRefused(
            f"cluster.secrets names {', '.join(missing)}, which is not set in this environment. Export it, or remove it from cluster.secrets"
        )
    return {name: environ[name] for name in names}
