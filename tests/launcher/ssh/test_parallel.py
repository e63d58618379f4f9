"""Many nodes in parallel: order, failures reported together, no node delayed by another."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.parallel import each, reach_all
from launcher.ssh.pool import ConnectionPool
from tests.launcher.sshd import Sshd, access_in, free_port, make_key, node_at

COUNT = 12


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "id_ed25519")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd") / "node", key, "MaxStartups 100", "MaxSessions 50", "ListenAddress 127.0.0.2")
    yield server
    server.end()


@pytest.fixture
def client(tmp_path: Path, sshd: Sshd, key: Path) -> Iterator[ConnectionPool]:
    client = ConnectionPool(
        access_in(tmp_path / "a", key, sshd.known_line(), sshd.known_line(f"[127.0.0.2]:{sshd.port}"), connect_timeout_s=3)
    )
    yield client
    client.close()


def opened(answer: Ssh | NodeFailed) -> Ssh:
    if isinstance(answer, NodeFailed):
        raise answer
    return answer


def test_connections_in_node_order_and_warm_calls_reuse(client: ConnectionPool, sshd: Sshd) -> None:
    nodes = [node_at(sshd, host=f"127.0.0.{1 + number % 2}") for number in range(COUNT)]
    fleet = each(opened, reach_all(nodes, client))
    assert [ssh.host for ssh in fleet] == [node.host for node in nodes]
    before = sshd.children()
    answers = each(lambda ssh: ssh.run(("echo", ssh.host)).output.strip(), fleet)
    assert list(answers) == [node.host for node in nodes]
    assert sshd.children() == before and len(before) == COUNT
    assert threading.active_count() < COUNT + 8  # one for each connection, none for each command


def test_all_bad_nodes_are_named_together_and_nothing_stays_open(client: ConnectionPool, sshd: Sshd) -> None:
    ports = (free_port(), free_port())
    nodes = [node_at(sshd), Node(host="127.0.0.1", port=ports[0]), node_at(sshd, user="games"), Node(host="127.0.0.1", port=ports[1])]
    reached = reach_all(nodes, client)
    assert [isinstance(answer, NodeFailed) for answer in reached] == [False, True, True, True]
    with pytest.raises(NodeFailed, match="3 of 4 nodes failed:") as caught:
        each(opened, reached)
    for words in (f"port {ports[0]}", f"port {ports[1]}", "user 'games' was refused"):
        assert words in str(caught.value)
    client.close()
    assert sshd.has_children(0)


def test_nodes_behind_one_jump_host_share_its_connection(client: ConnectionPool, sshd: Sshd) -> None:
    nodes = [node_at(sshd, jump=f"127.0.0.2:{sshd.port}") for _ in range(COUNT)]
    fleet = each(opened, reach_all(nodes, client))
    assert sshd.has_children(COUNT + 1)
    assert each(lambda ssh: ssh.run(("true",)).code, fleet) == (0,) * COUNT
    refused = [Node(host="127.0.0.1", port=9, jump=f"127.0.0.1:{free_port()}") for _ in range(4)]
    started = time.monotonic()
    with pytest.raises(NodeFailed, match="4 of 4 nodes failed:"):
        each(opened, reach_all(refused, client))
    assert time.monotonic() - started < 2


def test_each_is_bounded_keeps_order_and_tells_every_failure() -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def work(number: int) -> int | None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        if number % 5 == 4:
            raise NodeFailed(f"node {number}")
        return None if number == 0 else number

    assert each(work, (0, 1, 2), fan_out=2) == (None, 1, 2)
    with pytest.raises(NodeFailed, match=r"2 of 12 nodes failed:\nnode 4\nnode 9"):
        each(work, range(12), fan_out=3)
    assert most[0] == 3
    assert each(work, ()) == ()
    with pytest.raises(ZeroDivisionError):
        each(lambda number: 1 // number, (1, 0, 2))


def test_calls_that_wait_for_each_other_all_run_at_the_same_time() -> None:
    barrier = threading.Barrier(300)
    assert len(each(lambda number: barrier.wait(20), range(300))) == 300
