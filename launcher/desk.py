"""Opens what a launch uses of the outside, for a plan: the nodes over SSH or this machine, and the secrets of this environment."""

import getpass
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.doctor import Examination, examine
from launcher.errors import ConfigRefused, NodeFailed
from launcher.finding import describe_findings, has_errors
from launcher.fleet import reach_all, together
from launcher.image import Stack
from launcher.launch import Desk
from launcher.link import Client
from launcher.login import access_of
from launcher.plan import Plan
from launcher.schema import Node
from launcher.transport import Local, Transport

Say = Callable[[str], None]


@contextmanager
def reach_nodes(nodes: Sequence[Node], environ: Mapping[str, str]) -> Iterator[tuple[Transport | NodeFailed, ...]]:
    """The way to each node, or why there is none."""
    if all(node.is_local for node in nodes):
        yield tuple(Local(environ) for _ in nodes)
        return
    client = Client(access_of(Path(environ.get("HOME", "/")), getpass.getuser()))
    try:
        yield reach_all(nodes, client)
    finally:
        client.close()


@contextmanager
def open_desk(plan: Plan, project: Path, environ: Mapping[str, str], *, say: Say, terminal: bool) -> Iterator[Desk]:
    """Connected to every working node, in their order. Raises NodeFailed that names all nodes which cannot be reached, before anything of
    the run is made; ConfigRefused for a secret that is not there."""
    secrets = named_secrets(plan.config.cluster.secrets, environ)
    with reach_nodes(plan.config.cluster.working, environ) as ways:
        transports = require_all(ways)
        yield Desk(project=project, transports=transports, here=Local(environ), secrets=secrets, say=say, terminal=terminal)


def require_all(ways: Sequence[Transport | NodeFailed]) -> tuple[Transport, ...]:
    failures = [way for way in ways if isinstance(way, NodeFailed)]
    if failures:
        raise together(failures, len(ways))
    return tuple(way for way in ways if not isinstance(way, NodeFailed))


def examine_nodes(plan: Plan, stack: Stack, environ: Mapping[str, str], *, launching: bool) -> Examination:
    """Every node of the cluster, spares too, held against the doctor's checks; a launch asks of the working ones what it waits for."""
    nodes = plan.config.cluster.working if launching else plan.config.cluster.nodes
    with reach_nodes(nodes, environ) as ways:
        return examine(plan, stack, nodes, ways, now=time.time, token=uuid.uuid4().hex[:12], launching=launching)


def require_health(examination: Examination, say: Say) -> None:
    """Say what a launch should know. Raises NodeFailed with every finding that stands in its way."""
    if has_errors(examination.findings):
        raise NodeFailed("the nodes are not ready:\n" + describe_findings(examination.findings))
    for finding in examination.findings:
        if finding.level == "warning":
            say(f"warning: {finding.host}: {finding.name}: {finding.evidence}")


def named_secrets(names: tuple[str, ...], environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigRefused(f"cluster.secrets names {', '.join(missing)}, which this environment does not have: export it, or leave it out")
    return {name: environ[name] for name in names}
