"""A key, servers that end with the test, and one command over a connection of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import SshSettings
from tests.launcher.sshd import Sshd, make_key

Start = Callable[..., Sshd]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "id_ed25519")


@pytest.fixture
def start(tmp_path: Path, key: Path) -> Iterator[Start]:
    servers: list[Sshd] = []

    def make(*extra: str) -> Sshd:
        servers.append(Sshd(tmp_path / f"sshd{len(servers)}", key, *extra))
        return servers[-1]

    yield make
    for server in servers:
        server.end()


def echo(node: Node, access: SshSettings) -> str:
    client = ConnectionPool(access)
    try:
        return Ssh(node, client).run(("echo", "here")).output
    finally:
        client.close()


def failure(node: Node, access: SshSettings) -> str:
    with pytest.raises(NodeFailed) as caught:
        echo(node, access)
    return str(caught.value)
