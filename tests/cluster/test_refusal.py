"""Cluster files that do not match the hosts: refused with the node's name before anything is created on any of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.cluster.conftest import FOLDER, SMALL, Lab
from tests.cluster.host import INTERFACE, USER, docker

pytestmark = pytest.mark.cluster

UNUSED_ADDRESS = "10.213.7.250"
TAKEN_PORT = "29777"


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A mistake, and the text of the error (`said`). `second`: fields of the second node, where FIRST and SECOND stand for the addresses; `home`: files
    that ~/.ssh lacks."""

    said: tuple[str, ...]
    second: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    root: str = FOLDER
    home: tuple[str, ...] = ()


CASES = {
    "one host twice": Bad(second={"host": "FIRST"}, said=("FIRST",)),
    "one machine by two names": Bad(second={"host": "twin"}, said=("twin: distinct", "the same machine as FIRST")),
    "a typo": Bad(second={"hots": "SECOND"}, said=("hots", "did you mean 'host'")),
    "a wrong user": Bad(second={"user": "daemon"}, said=("daemon@SECOND",)),
    "no key": Bad(home=("id_ed25519", "id_ed25519.pub"), said=("FIRST", "SECOND")),
    "an unknown host": Bad(home=("known_hosts",), said=("FIRST", "SECOND", "ssh-keyscan")),
    "a host that is off": Bad(second={"host": UNUSED_ADDRESS, "address": UNUSED_ADDRESS}, said=(UNUSED_ADDRESS,)),
    "an interface that one lacks": Bad(second={"interface": "ib0"}, said=("SECOND: network", "ib0", INTERFACE)),
    "a port in use": Bad(
        words=(f"cluster.rendezvous_port={TAKEN_PORT}",), said=("FIRST: rendezvous_port", f"port {TAKEN_PORT} is in use there")
    ),
    "another architecture": Bad(second={"architecture": "aarch64"}, said=("SECOND", "aarch64")),
    "a folder that may not be made": Bad(root="/usr/omnilaunch", said=("FIRST", "SECOND", "may not write to /usr")),
}


@pytest.fixture(scope="module")
def taken(lab: Lab) -> Iterator[None]:
    """A port of the first host is in use."""
    docker("exec", "--detach", lab.hosts[0].name, "/usr/sbin/sshd", "-D", "-p", TAKEN_PORT, "-o", "PidFile=/run/second.pid")
    yield
    lab.hosts[0].run("sh", "-c", "kill $(cat /run/second.pid)")


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("name", CASES)
def test_is_refused_by_name_and_leaves_nothing(lab: Lab, name: str, clean: None) -> None:
    bad, (first, second) = CASES[name], lab.hosts[:2]

    def filled(text: str) -> str:
        return text.replace("FIRST", first.address).replace("SECOND", second.address)

    node = {"host": "SECOND", "user": USER, "address": "SECOND", "interface": INTERFACE} | bad.second
    written = ", ".join(f"{key}: '{filled(value)}'" for key, value in node.items() if not ("hots" in node and key == "host"))
    nodes = f"cluster.nodes=[{{host: '{first.address}', user: {USER}, interface: {INTERFACE}}}, {{{written}}}]"
    home = lab.home / "homes" / name.replace(" ", "-")
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for path in (lab.home / ".ssh").iterdir():
        if path.name not in bad.home:
            (home / ".ssh" / path.name).symlink_to(path)
    (home / ".ssh" / "config").write_text(f"Host twin\n  HostName {first.address}\n  HostKeyAlias {first.address}\n", encoding="utf-8")

    done = lab.run(
        "launch",
        "--run-id",
        "bad",
        *SMALL,
        *lab.overrides(first, second)[:1],
        nodes,
        f"cluster.root={bad.root}",
        *bad.words,
        HOME=str(home),
    )

    assert done.returncode == 4, done.stdout
    for text in bad.said:
        assert filled(text) in done.stdout, done.stdout
    assert not (lab.home / "runs" / "bad").exists()
    for host in (first, second):
        assert host.run("sh", "-c", f"ls -d {FOLDER}/runs/bad* /usr/omnilaunch", check=False) == ""
