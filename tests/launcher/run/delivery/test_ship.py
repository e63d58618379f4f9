"""An image to many nodes: how often the launcher's machine sends it, and what happens when nodes fail."""

import threading
from pathlib import Path

import pytest

from launcher.errors import ImageFailed, NodeFailed
from launcher.run.delivery import peer_transfer, ship
from launcher.run.delivery.node_image import image_on
from launcher.run.delivery.script import read_script
from launcher.run.delivery.ship import require
from tests.launcher.engine import EngineCluster


def ship_all(cluster: EngineCluster) -> list[str]:
    said: list[str] = []
    image = image_on(cluster.source, "tag")
    assert image
    ship.ship("tag", image.id, cluster.peers, cluster.source, said.append)
    return said


def test_few_nodes_get_it_from_here_and_nodes_that_have_it_get_nothing(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 5)
    (cluster.engines[3].home / "image").write_bytes(cluster.image)
    said = ship_all(cluster)
    assert cluster.ranks_with_image() == [0, 1, 2, 3, 4]
    assert cluster.sent() == pytest.approx(4) and cluster.engines[3].fed == 0
    assert said == ["sending tag to host0, host1, host2, host4"]
    assert ship_all(cluster) == []


def test_many_nodes_get_it_from_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forty nodes: six images from here in place of forty, in one round and a half."""
    cluster = EngineCluster(tmp_path, 40)
    said = ship_all(cluster)
    assert cluster.ranks_with_image() == list(range(40))
    assert cluster.sent() == pytest.approx(ship.FAN_OUT, rel=1e-3)
    assert said[0].endswith("; 34 others get it from node to node") and said[1:] == ["  from 6 nodes to 34 others, 0 waiting"]
    with capsys.disabled():
        print(f"\n40 nodes: {cluster.sent():.3f} images sent by the launcher in place of 40")


def test_rounds_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "FAN_OUT", 2)
    cluster = EngineCluster(tmp_path, 20, size=200_000)
    said = ship_all(cluster)
    assert cluster.ranks_with_image() == list(range(20)) and cluster.sent() == pytest.approx(2, rel=1e-2)
    assert said[1:] == [
        "  from 2 nodes to 4 others, 14 waiting",
        "  from 6 nodes to 12 others, 2 waiting",
        "  from 2 nodes to 2 others, 0 waiting",
    ]


def test_nodes_that_no_other_could_serve_get_it_from_here(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 16)
    cluster.break_(1, "half")
    said = ship_all(cluster)
    assert cluster.ranks_with_image() == list(range(16))
    left = said[-1].removeprefix("sending tag from here to ").removesuffix(", which no other node could serve").split(", ")
    assert left == ["host7", "host13"] and any("host1 could not serve tag" in line for line in said)
    assert cluster.sent() == pytest.approx(8, rel=1e-3)


def test_where_nodes_cannot_reach_each_other_one_round_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "read -r token; echo 'no route to host' >&2; exit 1"
    monkeypatch.setattr(peer_transfer, "read_script", lambda name: broken if name == "receive_image.sh" else read_script(name))
    monkeypatch.setattr(peer_transfer, "ADMISSION_S", 1)
    monkeypatch.setattr(ship, "FAN_OUT", 3)
    cluster = EngineCluster(tmp_path, 20, size=100_000)
    said = ship_all(cluster)
    assert cluster.ranks_with_image() == list(range(20)) and cluster.sent() == pytest.approx(20, rel=1e-2)
    assert sum("others, " in line for line in said) == 1


def test_a_node_that_cannot_load_it_is_named_and_the_others_have_it(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 3)
    cluster.break_(1, "full")
    with pytest.raises(NodeFailed, match="host1: receiving the image failed with exit code 1:\nno space left on device"):
        ship_all(cluster)
    assert cluster.ranks_with_image() == [0, 2]


def test_an_image_that_cannot_be_read_here_reaches_no_node(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 3)
    (cluster.source.home / "half").touch()
    with pytest.raises(ImageFailed, match="the image could not be read on this machine"):
        ship_all(cluster)
    assert cluster.ranks_with_image() == [] and threading.active_count() < 20


def test_a_node_with_another_image_than_the_one_that_was_sent_is_named(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 2)
    ship_all(cluster)
    sent = image_on(cluster.source, "tag")
    assert sent
    (cluster.engines[1].home / "image").write_bytes(b"another")
    with pytest.raises(NodeFailed, match="host1 does not have tag with id"):
        require("tag", sent, cluster.peers)


def test_an_image_that_was_replaced_here_meanwhile_is_not_sent(tmp_path: Path) -> None:
    cluster = EngineCluster(tmp_path, 2)
    with pytest.raises(ImageFailed, match="tag was replaced or removed on this machine"):
        ship.ship("tag", "sha256:other", cluster.peers, cluster.source, print)
    assert cluster.sent() == 0
