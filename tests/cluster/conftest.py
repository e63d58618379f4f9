"""Three hosts for the session, a home folder whose ssh files know them, and the launcher run from there."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.host import USER, Host, build_image, end_hosts, known_hosts, make_key, start_hosts
from tests.images.conftest import ROOT, Built, base, built, delivery, make, project  # noqa: F401  # fixtures

NETWORK = "omnilaunch-test"
NODES = 3


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The hosts, and a home folder from which the launcher reaches them. `image`: overrides that name the image which is built already."""

    hosts: tuple[Host, ...]
    home: Path
    image: tuple[str, ...]

    def overrides(self, *hosts: Host, root: str, spares: tuple[Host, ...] = ()) -> tuple[str, ...]:
        """`cluster.nodes` and what else a cluster file of these hosts would say."""
        nodes = [f"{{host: '{host.address}', user: {USER}, address: '{host.address}', interface: eth0}}" for host in hosts]
        nodes += [f"{{host: '{host.address}', user: {USER}, address: '{host.address}', interface: eth0, spare: true}}" for host in spares]
        return ("cluster.runtime=docker", f"cluster.nodes=[{', '.join(nodes)}]", f"cluster.root={root}", *self.image)

    def command(self, *words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "launcher.cli", *words)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home), "PYTHONPATH": str(ROOT), "SSH_AUTH_SOCK": ""}

    def run(self, *words: str, timeout_s: float = 600) -> "subprocess.CompletedProcess[str]":
        """The launcher, from the home folder, to its end."""
        return subprocess.run(self.command(*words), cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """The launcher in a session of its own, as in a terminal of its own."""
        return subprocess.Popen(
            self.command(*words), cwd=self.home, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="session")
def lab(base: str, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:  # noqa: F811  # fixtures
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir(mode=0o700)
    key = make_key(home / ".ssh")
    end_hosts(NETWORK)
    try:
        hosts = start_hosts(NODES, image=build_image(base), key=key, network=NETWORK, subnet=7)
        (home / ".ssh" / "known_hosts").write_text(known_hosts(hosts), encoding="utf-8")
        given = {name: getattr(built.delivery, name) for name in ("base", "find_links", "ca_bundle", "index")}
        image = tuple(f"cluster.delivery.{name}='{value}'" for name, value in given.items() if value)
        yield Lab(hosts=hosts, home=home, image=image)
    finally:
        end_hosts(NETWORK)


@pytest.fixture
def clean(lab: Lab) -> Iterator[Callable[[], None]]:
    """Nothing of a run may be left on a host that is up."""

    def check() -> None:
        for host in lab.hosts:
            assert host.containers() == (), host.name

    yield check
    check()
