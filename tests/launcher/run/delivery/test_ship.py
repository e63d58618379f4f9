"""An image to many nodes: how often the launcher's machine sends it, and what comes of nodes that fail."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ImageFailed, NodeFailed
from launcher.run.delivery import peer_transfer as relay, ship
from launcher.run.delivery.ship import LAYERS, Sent, has, id_on, require, send
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local, Result
from tests.launcher.engine import Hall, command


def ship_all(hall: Hall) -> list[str]:
    said: list[str] = []
    image_id = Local({**hall.source.kept}).run(("docker", "image", "inspect")).output.strip()
    ship.ship("tag", image_id, hall.peers, hall.source, said.append)
    return said


def test_few_nodes_get_it_from_here_and_those_that_have_it_get_nothing(tmp_path: Path) -> None:
    hall = Hall(tmp_path, 5)
    (hall.engines[3].home / "image").write_bytes(hall.image)
    said = ship_all(hall)
    assert hall.having() == [0, 1, 2, 3, 4]
    assert hall.sent() == pytest.approx(4) and hall.engines[3].fed == 0
    assert said == ["sending tag to host0, host1, host2, host4"]
    assert ship_all(hall) == []


def test_many_nodes_get_it_from_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forty nodes: six images from here in place of forty, in one round and a half."""
    hall = Hall(tmp_path, 40)
    said = ship_all(hall)
    assert hall.having() == list(range(40))
    assert hall.sent() == pytest.approx(ship.FAN_OUT, rel=1e-3)
    assert said[0].endswith("; 34 others get it from node to node") and said[1:] == ["  6 node(s) serve 34 other(s), 0 wait"]
    with capsys.disabled():
        print(f"\n40 nodes: {hall.sent():.3f} images sent by the launcher in place of 40")


def test_rounds_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "FAN_OUT", 2)
    hall = Hall(tmp_path, 20, size=200_000)
    said = ship_all(hall)
    assert hall.having() == list(range(20)) and hall.sent() == pytest.approx(2, rel=1e-2)
    assert said[1:] == [
        "  2 node(s) serve 4 other(s), 14 wait",
        "  6 node(s) serve 12 other(s), 2 wait",
        "  2 node(s) serve 2 other(s), 0 wait",
    ]


def test_those_that_no_node_could_serve_get_it_from_here(tmp_path: Path) -> None:
    hall = Hall(tmp_path, 16)
    hall.break_(1, "half")
    said = ship_all(hall)
    assert hall.having() == list(range(16))
    left = said[-1].removeprefix("sending tag from here to ").removesuffix(", which no other node could serve").split(", ")
    assert left == ["host7", "host13"] and any("host1 could not serve tag" in line for line in said)
    assert hall.sent() == pytest.approx(8, rel=1e-3)


def test_where_nodes_cannot_reach_each_other_one_round_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "TAKE", "read -r token; echo 'no route to host' >&2; exit 1")
    monkeypatch.setattr(relay, "RELAY", relay.RELAY.replace("time.monotonic() + 30", "time.monotonic() + 1"))
    monkeypatch.setattr(ship, "FAN_OUT", 3)
    hall = Hall(tmp_path, 20, size=100_000)
    said = ship_all(hall)
    assert hall.having() == list(range(20)) and hall.sent() == pytest.approx(20, rel=1e-2)
    assert sum("node(s) serve" in line for line in said) == 1


def test_a_node_that_cannot_take_it_is_named_and_the_others_have_it(tmp_path: Path) -> None:
    hall = Hall(tmp_path, 3)
    hall.break_(1, "full")
    with pytest.raises(NodeFailed, match="host1: taking in the image failed with exit code 1:\nno space left on device"):
        ship_all(hall)
    assert hall.having() == [0, 2]


def test_an_image_that_cannot_be_read_here_reaches_nobody(tmp_path: Path) -> None:
    hall = Hall(tmp_path, 3)
    (hall.source.home / "half").touch()
    with pytest.raises(ImageFailed, match="the image could not be read on this machine"):
        ship_all(hall)
    assert hall.having() == [] and threading.active_count() < 20


def test_another_id_than_the_one_that_was_sent_is_found_out(tmp_path: Path) -> None:
    hall = Hall(tmp_path, 2)
    ship_all(hall)
    (hall.engines[1].home / "image").write_bytes(b"another")
    site = hall.peers[0].site
    with pytest.raises(NodeFailed, match="host1 does not have tag with id"):
        require("tag", Sent(id=id_on(site, "tag"), layers=""), [peer.site for peer in hall.peers])


@pytest.mark.parametrize(
    ("there", "layers", "same"),
    [
        ("sha256:config", "", True),
        ("sha256:manifest", '["sha256:a","sha256:b"]', True),
        ("sha256:manifest", '["sha256:a","sha256:c"]', False),
        ("sha256:manifest", "", False),
    ],
)
def test_an_image_in_another_kind_of_store_is_known_by_its_layers(tmp_path: Path, there: str, layers: str, same: bool) -> None:
    """Docker 29 keeps images in containerd's, 28 in its own, where one image has another id."""

    class Engine(Local):
        def run(self, argv: tuple[str, ...], **_: Any) -> Result:
            return Result(argv=argv, code=0, output=layers if LAYERS in argv else there, errors="")

    site = WorkingNode(command=Hall(tmp_path, 1).peers[0].site.command, transport=Engine({}))
    assert has(site, "tag", Sent(id="sha256:config", layers='["sha256:a","sha256:b"]')) is same


class Unlimited(Local):
    """A node that takes whatever it is sent, and this machine, which sends 40 chunks; no process is started."""

    received = b""

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        self.received = b"".join(chunks)
        return Result(argv=argv, code=0, output="", errors="")

    @contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        yield iter([b"%02d" % number for number in range(40)])


def test_many_nodes_receive_at_the_same_time(tmp_path: Path) -> None:
    """More nodes than worker threads: a pipe whose node has no thread yet would stop the reader, and with it every other node."""
    nodes = [Unlimited({}, f"host{rank}") for rank in range(200)]
    sites = [WorkingNode(command=command(node.host, rank), transport=node) for rank, node in enumerate(nodes)]
    answers: list[object] = []
    sending = threading.Thread(target=lambda: answers.extend(send(("save",), ("load",), sites, Unlimited({}), print)), daemon=True)
    sending.start()
    sending.join(30)
    assert answers == [None] * 200
    assert {node.received for node in nodes} == {b"".join(b"%02d" % number for number in range(40))}
