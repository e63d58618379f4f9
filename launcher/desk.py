"""Opens what a launch uses of the outside, for a plan: the nodes over SSH or this machine, and the secrets of this environment."""

import getpass
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import ConfigRefused
from launcher.fleet import connect_all
from launcher.launch import Desk
from launcher.link import Client
from launcher.login import access_of
from launcher.plan import Plan
from launcher.transport import Local, Transport


@contextmanager
def open_desk(plan: Plan, project: Path, environ: Mapping[str, str], *, say: Callable[[str], None], terminal: bool) -> Iterator[Desk]:
    """Connected to every working node, in their order. Raises NodeFailed that names all nodes which cannot be reached, before anything of
    the run is made; ConfigRefused for a secret that is not there."""
    here, nodes = Local(environ), plan.config.cluster.working
    secrets = named_secrets(plan.config.cluster.secrets, environ)
    if all(node.is_local for node in nodes):
        yield Desk(project=project, transports=(here,), here=here, secrets=secrets, say=say, terminal=terminal)
        return
    client = Client(access_of(Path(environ.get("HOME", "/")), getpass.getuser()))
    try:
        say(f"connecting to {', '.join(node.host for node in nodes)}")
        transports: tuple[Transport, ...] = connect_all(nodes, client)
        yield Desk(project=project, transports=transports, here=here, secrets=secrets, say=say, terminal=terminal)
    finally:
        client.close()


def named_secrets(names: tuple[str, ...], environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigRefused(f"cluster.secrets names {', '.join(missing)}, which this environment does not have: export it, or leave it out")
    return {name: environ[name] for name in names}
