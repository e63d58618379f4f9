"""Image and data are copied to hosts that share nothing: from host to host, and from this machine to the same path."""

import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Cluster, Node
from launcher.errors import NodeFailed
from launcher.run.delivery import peer_transfer, ship
from launcher.run.delivery.peer_transfer import Peer
from launcher.run.delivery.sync import sync
from launcher.run.run_folder import WorkingNode
from launcher.ssh.node import Ssh
from launcher.ssh.parallel import reach_all
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import default_settings
from launcher.ssh.transport import Local, Result
from tests.cluster.conftest import SMALL, Lab
from tests.cluster.host import USER, docker
from tests.launcher.engine import command
from trainer.data.digits import write_digits

pytestmark = pytest.mark.cluster

TAG = "omnilaunch-relay:test"
HERE = Local(os.environ)
NAMES = ("plain.json", "with space", "new\nline", "-rf", "$(touch C)", "deep/er/'quoted\"")


def test_a_node_that_has_another_image_under_the_tag_is_named(lab: Lab, clean: Callable[[], None]) -> None:
    """As when a tag was pushed again between two pulls. No registry is asked: both have the tag."""
    first, second = lab.hosts[:2]
    words = (
        *SMALL,
        "run.steps=10",
        *lab.overrides(first, second),
        "cluster.delivery.kind=pull",
        "cluster.delivery.registry=registry.example/x",
    )
    said = lab.run("plan", "--json", *words).stdout
    tag = json.loads(said[said.index("{") :])["image"]["tag"]  # behind what it warns of
    for host in (first, second):
        host.load(tag)
    made = second.run("docker", "create", tag)
    second.run("docker", "commit", made, tag)
    second.run("docker", "rm", made)
    try:
        done = lab.run("launch", "--run-id", "other", *words)
        assert done.returncode == 4, done.stdout
        assert second.address in done.stdout and f"docker image rm {tag}" in done.stdout
    finally:
        second.run("docker", "image", "rm", tag)


@pytest.fixture
def peers(lab: Lab) -> Iterator[list[Peer]]:
    """Logged in to all hosts, as a launch is. `fed` of each transport: bytes that went to it from here."""
    nodes = tuple(Node(host=host.address, user=USER) for host in lab.hosts)
    cluster = Cluster(name="lab", runtime="docker", nodes=nodes, root="/")
    client = ConnectionPool(replace(default_settings(lab.home, USER, cluster), agent=False))
    try:
        transports = [ssh for ssh in reach_all(nodes, client) if isinstance(ssh, Ssh)]
        yield [
            Peer(node=WorkingNode(command=command(ssh.host, rank), transport=counting(ssh)), address=ssh.host)
            for rank, ssh in enumerate(transports)
        ]
    finally:
        client.close()


def counting(ssh: Any) -> Any:
    """The same transport, with what it is fed counted."""
    feed: Callable[..., Result] = ssh.feed
    ssh.fed = 0

    def counted(argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        def each() -> Iterator[bytes]:
            for chunk in chunks:
                ssh.fed += len(chunk)
                yield chunk

        return feed(argv, each(), timeout_s=timeout_s)

    ssh.feed = counted
    return ssh


@pytest.fixture
def image(lab: Lab, base: str) -> Iterator[str]:
    """The id of an image that no host has: Python, a user who is not root, and something that is in no other image."""
    text = f"FROM {base}\nRUN ln -s python3 /usr/bin/python && echo {secrets.token_hex(8)} >/unique\nUSER 1000:1000\n"
    docker("build", "-q", "-t", TAG, "-", input=text)
    try:
        yield docker("image", "inspect", "--format", "{{.Id}}", TAG)
    finally:
        docker("image", "rm", TAG)
        for host in lab.hosts:
            host.run("docker", "image", "rm", "--force", TAG, check=False)


def spread(image: str, peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """To three hosts as if they were many: one from here, then one from each that has it."""
    monkeypatch.setattr(ship, "MANY", 2)
    monkeypatch.setattr(ship, "FAN_OUT", 1)
    said: list[str] = []
    ship.ship(TAG, image, peers, HERE, said.append)
    return said


def in_images(peers: list[Peer]) -> float:
    """What this machine sent, in images."""
    with subprocess.Popen(("docker", "save", TAG), stdout=subprocess.PIPE) as save:
        assert save.stdout is not None
        size = sum(map(len, iter(lambda: save.stdout.read(1 << 20), b"")))  # type: ignore[union-attr]
    return sum(peer.node.transport.fed for peer in peers) / size  # type: ignore[attr-defined]


def test_an_image_goes_from_host_to_host(
    lab: Lab, peers: list[Peer], image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = spread(image, peers, monkeypatch)
    for host in lab.hosts:
        assert host.run("docker", "image", "inspect", "--format", "{{.Id}}", TAG) == image
        assert host.containers() == (), "no sending container stays"
    assert said[1:] == ["  from 1 node to 1 other, 1 waiting", "  from 1 node to 1 other, 0 waiting"]
    assert in_images(peers) == pytest.approx(1, rel=0.01)
    with capsys.disabled():
        print(f"\nthree hosts: {in_images(peers):.3f} images sent from here in place of 3")
    assert spread(image, peers, monkeypatch) == []


def test_where_a_firewall_stands_between_the_hosts_it_comes_from_here(
    lab: Lab, peers: list[Peer], image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets between hosts are dropped without a word, those from here are not."""
    rules = [("INPUT", "-s", other.address, "-j", "DROP") for other in lab.hosts[1:]]
    monkeypatch.setattr(peer_transfer, "CONNECT_S", 3)
    monkeypatch.setattr(peer_transfer, "ADMISSION_S", 6)
    for rule in rules:
        lab.hosts[0].run("iptables", "-I", *rule)
    try:
        said = spread(image, peers, monkeypatch)
    finally:
        for rule in rules:
            lab.hosts[0].run("iptables", "-D", *rule)
    assert "which no other node could serve" in said[-1] and any(f"{lab.hosts[0].address} could not serve" in line for line in said)
    assert [host.run("docker", "image", "inspect", "--format", "{{.Id}}", TAG) for host in lab.hosts] == [image] * 3
    assert in_images(peers) == pytest.approx(3, rel=0.01)
    assert [host.containers() for host in lab.hosts] == [()] * 3


def test_files_come_to_the_same_place(lab: Lab, peers: list[Peer], tmp_path: Path) -> None:
    """A path of /tmp, which every user of a host may write to. One host shares nothing, one has a part, one has another file."""
    for name in NAMES:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}", encoding="utf-8")
    sites, said = [peer.node for peer in peers], list[str]()
    lab.hosts[2].run("sh", "-c", 'mkdir -p "$1" && echo mine >"$1/plain.json"', "sh", str(tmp_path / "set"), user=USER)
    with pytest.raises(NodeFailed, match=rf"{lab.hosts[2].address} has other files with these names; nothing was copied"):
        sync([str(tmp_path / "set")], sites, HERE, said.append, token="t1")
    assert lab.hosts[0].run("ls", "-d", str(tmp_path), check=False) == "", "on no host"
    lab.hosts[2].run("rm", str(tmp_path / "set" / "plain.json"))
    sync([str(tmp_path / "set")], sites, HERE, said.append, token="t1")
    for host in lab.hosts:
        for name in NAMES:
            assert host.run("cat", "--", str(tmp_path / "set" / name)) == f"content of {name}"
        assert host.run("find", str(tmp_path), "-name", ".omnilaunch*") == ""
    said.clear()
    sync([str(tmp_path / "set")], sites, HERE, said.append, token="t2")
    assert said == []


def test_a_run_on_files_that_only_this_machine_has(lab: Lab, clean: Callable[[], None]) -> None:
    """Without cluster.sync the refusal names it; with it, two hosts train on the files."""
    folder = lab.home / "set"
    write_digits(folder)
    train, evaluation = (next(folder.rglob(f"{name}.json")) for name in ("train", "evaluation"))
    data = ("data=files", f"data.train={train}", f"data.evaluation={evaluation}", f"data.images={train.parent}")
    words = (*data, "run.steps=8", *SMALL, *lab.overrides(*lab.hosts[:2]))
    refused = lab.run("launch", "--run-id", "unsynced", *words)
    assert refused.returncode == 4 and f"cluster.sync=[{train}" in refused.stdout, refused.stdout
    done = lab.run("launch", "--run-id", "synced", *words, f"cluster.sync=['{folder}']")
    assert done.returncode == 0, done.stdout
    assert lab.steps("synced") == list(range(1, 9))
    assert all(host.run("cat", str(train)) == train.read_text(encoding="utf-8").strip() for host in lab.hosts[:2])
