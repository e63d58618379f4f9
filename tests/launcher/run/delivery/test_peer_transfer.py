"""The program that sends an image, and strangers that connect to it; then one round of several senders."""

import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.run.delivery import peer_transfer as module
from launcher.run.delivery.peer_transfer import Peer, assign_receivers, send_from, transfer_round
from launcher.run.delivery.script import read_script
from tests.launcher.engine import EngineCluster

CONTENT = secrets.token_bytes(3_000_000)


class Server:
    """A running serve_image.py with CONTENT to send, and connections to it."""

    def __init__(self, process: "subprocess.Popen[bytes]", stack: ExitStack) -> None:
        assert process.stdout is not None
        self.process, self.stack = process, stack
        threading.Thread(target=self.write, daemon=True).start()
        port, self.token = process.stdout.readline().split()
        self.port = int(port)

    def write(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(CONTENT)
            self.process.stdin.close()

    def connect(self, said: bytes) -> socket.socket:
        peer = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=10))
        peer.sendall(said)
        return peer


@contextmanager
def serving(receivers: int, wait_s: float = 30) -> Iterator[Server]:
    argv = (sys.executable, "-c", read_script("serve_image.py"), "127.0.0.1", *map(str, (receivers, wait_s, 5, 120, 7200)))
    with ExitStack() as stack, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Server(process, stack)
        finally:
            process.kill()


def rest(peer: socket.socket) -> bytes:
    """Everything that comes until the connection is closed or reset."""
    got = b""
    with suppress(ConnectionResetError):
        while piece := peer.recv(1 << 20):
            got += piece
    return got


def test_who_knows_the_token_gets_everything_and_strangers_nothing() -> None:
    with serving(2) as server:
        token = server.token
        strangers = [server.connect(said) for said in (b"\n", b"x" * 5000, token[:-1] + b"?\n", token + b"x\n", b"\xff\n")]
        silent, slow = server.connect(b""), server.connect(token[:20])
        assert [rest(peer) for peer in strangers] == [b""] * 5
        slow.sendall(token[20:] + b"\n")
        receivers = (slow, server.connect(token + b"\n"))
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(rest, receivers)) == [CONTENT, CONTENT]
        assert rest(silent) == b""
        assert server.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            server.connect(token)


def test_no_more_receivers_than_were_expected() -> None:
    with serving(1) as server:
        first, late = server.connect(server.token + b"\n"), b""
        time.sleep(0.3)
        with suppress(ConnectionError):
            late = rest(server.connect(server.token + b"\n"))
        assert rest(first) == CONTENT and late == b""
        assert server.process.wait(10) == 0


def test_it_continues_without_a_receiver_that_never_came_or_left() -> None:
    with serving(3, wait_s=1) as server:
        server.connect(server.token + b"\n").close()
        assert rest(server.connect(server.token + b"\n")) == CONTENT
        assert server.process.wait(10) == 0
    with serving(3, wait_s=1) as server:
        assert server.process.wait(10) == 1


@pytest.mark.parametrize(
    ("holders", "waiting", "fan_out", "served"),
    [(1, 5, 6, (5,)), (2, 5, 6, (3, 2)), (6, 100, 6, (6,) * 6), (4, 3, 2, (1, 1, 1)), (3, 7, 2, (2, 2, 2))],
)
def test_receivers_are_spread_evenly(holders: int, waiting: int, fan_out: int, served: tuple[int, ...]) -> None:
    have, lack = list(range(holders)), list(range(100, 100 + waiting))
    assigned = assign_receivers(have, lack, fan_out)  # type: ignore[type-var]
    assert tuple(len(receivers) for _, receivers in assigned) == served
    assert sorted(receiver for _, receivers in assigned for receiver in receivers) == lack[: sum(served)]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineCluster]:
    """Eight nodes; the first two have the image."""
    monkeypatch.setattr(module, "PROGRESS_S", 0.2)
    monkeypatch.setattr(module, "SILENCE_S", 3.0)
    made = EngineCluster(tmp_path, 8)
    for engine in made.engines[:2]:
        (engine.home / "image").write_bytes(made.image)
    yield made
    made.end()


def test_a_round_and_what_the_container_may_do(cluster: EngineCluster) -> None:
    first, second, *others = cluster.peers
    assert transfer_round("tag", ((first, others[:3]), (second, others[3:]))) == ((None,) * 3, (None,) * 3)
    assert cluster.ranks_with_image() == list(range(8))
    (ran,) = (cluster.engines[0].home / "runs").read_text(encoding="utf-8").split("\nimport", 1)[:1]
    for option in (
        "--read-only",
        "--cap-drop ALL",
        "--log-driver none",
        "--network host",
        "no-new-privileges",
        "--label omnilaunch.relay=tag",
    ):
        assert option in ran
    assert cluster.sent() < 0.001, "tokens alone"


@pytest.mark.parametrize(
    ("how", "words"), [("half", "host1 could not serve tag"), ("mute", r"host1 could not serve tag: no output within 3 s")]
)
def test_a_sender_that_fails_fails_its_own_receivers_alone(cluster: EngineCluster, how: str, words: str) -> None:
    cluster.break_(1, how)
    first, second, *others = cluster.peers
    good, bad = transfer_round("tag", ((first, others[:3]), (second, others[3:])))
    assert good == (None,) * 3 and cluster.ranks_with_image() == [0, 1, 2, 3, 4]
    for failure in bad:
        with pytest.raises(NodeFailed, match=words) as caught:
            raise failure or AssertionError
        assert "import" not in str(caught.value), "the script is not printed"


def change_script(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    assert old in read_script(name)
    monkeypatch.setattr(module, "read_script", lambda asked: read_script(asked).replace(old, new) if asked == name else read_script(asked))


def test_a_sender_that_dies_in_the_middle_releases_its_receivers(cluster: EngineCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the power is cut: nothing more is printed, no connection is closed."""
    change_script(monkeypatch, "serve_image.py", "SENT[0] += len(piece)", "os.kill(os.getpid(), 19)")
    started = time.monotonic()
    answers = send_from("tag", cluster.peers[0], cluster.peers[2:5])
    assert time.monotonic() - started < 10
    assert ["no output within 3 s" in str(answer) for answer in answers] == [True] * 3
    assert cluster.ranks_with_image() == [0, 1]


def test_receivers_that_cannot_connect_or_cannot_load_are_named(cluster: EngineCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADMISSION_S", 3)
    cluster.break_(3, "full")
    peers = [*cluster.peers[:3], cluster.peers[3]]
    answers = send_from("tag", peers[0], peers[2:])
    assert answers[0] is None and "host3 could not receive the image from host0 at 127.0.1.1: no space left on device" in str(answers[1])
    elsewhere = replace(cluster.peers[0], address="192.0.2.1")
    with pytest.raises(NodeFailed, match="host0 could not serve tag"):
        send_from("tag", elsewhere, cluster.peers[4:6])
    nowhere = Peer(node=cluster.peers[0].node, address="127.0.1.1")
    change_script(monkeypatch, "receive_image.sh", "/$1/$2", "/$1/1")
    monkeypatch.setattr(module, "ADMISSION_S", 1)
    assert all(
        "could not serve" in str(answer) or "cannot connect to 127.0.1.1" in str(answer)
        for answer in send_from("tag", nowhere, cluster.peers[4:6])
    )
