"""One relay, and strangers at its door; then one round of several."""

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
from launcher.run.delivery.peer_transfer import RELAY, Peer, pass_on, serve, share
from tests.launcher.engine import Hall

CONTENT = secrets.token_bytes(3_000_000)
BRISK = RELAY.replace("time.sleep(5)", "time.sleep(0.2)")


class Door:
    """A relay with something to give, and who stands before it."""

    def __init__(self, process: "subprocess.Popen[bytes]", stack: ExitStack) -> None:
        assert process.stdout is not None
        self.process, self.stack = process, stack
        threading.Thread(target=self.give, daemon=True).start()
        port, self.token = process.stdout.readline().split()
        self.port = int(port)

    def give(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(CONTENT)
            self.process.stdin.close()

    def ask(self, said: bytes) -> socket.socket:
        peer = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=10))
        peer.sendall(said)
        return peer


@contextmanager
def relay(takers: int, program: str = RELAY) -> Iterator[Door]:
    argv = (sys.executable, "-c", program, "127.0.0.1", str(takers))
    with ExitStack() as stack, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Door(process, stack)
        finally:
            process.kill()


def rest(peer: socket.socket) -> bytes:
    """All that comes until it is closed, by whatever way."""
    got = b""
    with suppress(ConnectionResetError):
        while piece := peer.recv(1 << 20):
            got += piece
    return got


def test_who_knows_the_token_gets_everything_and_strangers_nothing() -> None:
    with relay(2) as door:
        token = door.token
        strangers = [door.ask(said) for said in (b"\n", b"x" * 5000, token[:-1] + b"?\n", token + b"x\n", b"\xff\n")]
        silent, slow = door.ask(b""), door.ask(token[:20])
        assert [rest(peer) for peer in strangers] == [b""] * 5
        slow.sendall(token[20:] + b"\n")
        takers = (slow, door.ask(token + b"\n"))
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(rest, takers)) == [CONTENT, CONTENT]
        assert rest(silent) == b""
        assert door.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            door.ask(token)


def test_no_more_takers_than_were_expected() -> None:
    with relay(1) as door:
        first, late = door.ask(door.token + b"\n"), b""
        time.sleep(0.3)
        with suppress(ConnectionError):
            late = rest(door.ask(door.token + b"\n"))
        assert rest(first) == CONTENT and late == b""
        assert door.process.wait(10) == 0


def test_it_goes_on_without_one_who_never_came_or_left() -> None:
    program = RELAY.replace("time.monotonic() + 30", "time.monotonic() + 1")
    assert program != RELAY
    with relay(3, program) as door:
        door.ask(door.token + b"\n").close()
        assert rest(door.ask(door.token + b"\n")) == CONTENT
        assert door.process.wait(10) == 0
    with relay(3, program) as door:
        assert door.process.wait(10) == 1


@pytest.mark.parametrize(
    ("holders", "waiting", "fan_out", "served"),
    [(1, 5, 6, (5,)), (2, 5, 6, (3, 2)), (6, 100, 6, (6,) * 6), (4, 3, 2, (1, 1, 1)), (3, 7, 2, (2, 2, 2))],
)
def test_takers_are_shared_out_evenly(holders: int, waiting: int, fan_out: int, served: tuple[int, ...]) -> None:
    have, lack = list(range(holders)), list(range(100, 100 + waiting))
    shares = share(have, lack, fan_out)  # type: ignore[type-var]
    assert tuple(len(takers) for _, takers in shares) == served
    taking = [taker for _, takers in shares for taker in takers]
    assert sorted(taking) == lack[: sum(served)]


@pytest.fixture
def hall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hall]:
    """Eight nodes; the first two have the image."""
    assert BRISK != RELAY
    monkeypatch.setattr(module, "RELAY", BRISK)
    monkeypatch.setattr(module, "SILENCE_S", 1.5)
    made = Hall(tmp_path, 8)
    for engine in made.engines[:2]:
        (engine.home / "image").write_bytes(made.image)
    yield made
    made.end()


def test_a_round_and_what_the_container_may_do(hall: Hall) -> None:
    first, second, *others = hall.peers
    assert pass_on("tag", ((first, others[:3]), (second, others[3:]))) == ((None,) * 3, (None,) * 3)
    assert hall.having() == list(range(8))
    (ran,) = (hall.engines[0].home / "runs").read_text(encoding="utf-8").split("\nimport", 1)[:1]
    for option in (
        "--read-only",
        "--cap-drop ALL",
        "--log-driver none",
        "--network host",
        "no-new-privileges",
        "--label omnilaunch.relay=tag",
    ):
        assert option in ran
    assert hall.sent() < 0.001, "tokens alone"


@pytest.mark.parametrize(
    ("how", "words"), [("half", "host1 could not serve tag"), ("mute", r"host1 could not serve tag: no output within 1\.5 s")]
)
def test_a_holder_that_fails_fails_its_own_takers_alone(hall: Hall, how: str, words: str) -> None:
    hall.break_(1, how)
    first, second, *others = hall.peers
    good, bad = pass_on("tag", ((first, others[:3]), (second, others[3:])))
    assert good == (None,) * 3 and hall.having() == [0, 1, 2, 3, 4]
    for failure in bad:
        with pytest.raises(NodeFailed, match=words):
            raise failure or AssertionError


def test_a_holder_that_dies_in_the_middle_lets_its_takers_go(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power is off: nothing more is said, no connection is closed."""
    monkeypatch.setattr(module, "RELAY", BRISK.replace("    sent += len(piece)", "    os.kill(os.getpid(), 19)"))
    assert module.RELAY != BRISK
    started = time.monotonic()
    answers = serve("tag", hall.peers[0], hall.peers[2:5])
    assert time.monotonic() - started < 10
    assert ["no output within 1.5 s" in str(answer) for answer in answers] == [True] * 3
    assert hall.having() == [0, 1]


def test_takers_that_cannot_connect_or_cannot_load_are_named(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELAY", BRISK.replace("time.monotonic() + 30", "time.monotonic() + 3"))
    hall.break_(3, "full")
    peers = [*hall.peers[:3], hall.peers[3]]
    answers = serve("tag", peers[0], peers[2:])
    assert answers[0] is None and "host3 could not take the image from host0 at 127.0.1.1: no space left on device" in str(answers[1])
    elsewhere = replace(hall.peers[0], address="192.0.2.1")
    with pytest.raises(NodeFailed, match="host0 could not serve tag"):
        serve("tag", elsewhere, hall.peers[4:6])
    nowhere = Peer(site=hall.peers[0].site, address="127.0.1.1")
    monkeypatch.setattr(module, "TAKE", module.TAKE.replace("/$1/$2", "/$1/1"))
    monkeypatch.setattr(module, "RELAY", BRISK.replace("time.monotonic() + 30", "time.monotonic() + 1"))
    assert all(
        "could not serve" in str(answer) or "cannot connect to 127.0.1.1" in str(answer)
        for answer in serve("tag", nowhere, hall.peers[4:6])
    )
