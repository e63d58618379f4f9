"""Failures of nodes during a run. Another run on one of the hosts must not be affected."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.conftest import ENDLESS, Lab

pytestmark = pytest.mark.cluster

SMALL_DISK = "/srv/small"
QUICK = ("cluster.silence_s=6", "cluster.connect_timeout_s=3")  # to notice a connection that is dead


@pytest.fixture(scope="module")
def neighbour(lab: Lab, alone: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Its container's name, id and start time. It is limited to a tenth of a CPU, so that the other runs get the rest."""
    host = lab.hosts[0]
    done = lab.run("launch", "--detach", "--run-id", "neighbour", *ENDLESS, *lab.overrides(host))
    assert done.returncode == 0, done.stdout
    (name,) = (name for name in host.containers() if "-neighbour-" in name and name.endswith("-n0"))
    host.run("docker", "update", "--cpus", "0.1", name)
    yield tuple(host.run("docker", "inspect", "--format", "{{.Name}} {{.Id}} {{.State.StartedAt}}", name).split())
    host.run("docker", "rm", "--force", name, check=False)


@pytest.fixture
def untouched(lab: Lab, neighbour: tuple[str, ...], clean: Callable[[], None]) -> Iterator[None]:
    """Afterwards the neighbour is the same container and still runs, and nothing else is left on any host."""
    yield
    form = "{{.Name}} {{.Id}} {{.State.StartedAt}} {{.State.Status}}"
    assert lab.hosts[0].run("docker", "inspect", "--format", form, neighbour[0]).split() == [*neighbour, "running"]


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[str]:
    """A folder on the second and third host, on its own small disk on the second. The doctor requires at least 0.1 GiB."""
    for host in lab.hosts[1:]:
        host.run("install", "-d", "-o", "trainer", SMALL_DISK)
    lab.hosts[1].limit_disk(SMALL_DISK, "140m")
    yield SMALL_DISK
    lab.hosts[1].run("umount", SMALL_DISK)
    for host in lab.hosts[1:]:
        host.run("rm", "-rf", SMALL_DISK)


def test_a_run_survives_a_short_loss_of_the_network_and_names_a_node_that_lost_power(lab: Lab, untouched: None) -> None:
    """The cable is unplugged for longer than a silent connection is kept: the launcher connects again, the ranks continue. Then the host is switched off."""
    near, far = lab.hosts[0], lab.hosts[2]
    with lab.launch("dark", "cluster.node_timeout_s=20", *ENDLESS, *QUICK, *lab.overrides(near, far)) as launch:
        launch.until(lambda: lab.steps("dark"))
        with far.unplugged():
            done = wait_still(lab, "dark")
        launch.until(lambda: len(lab.steps("dark")) > done + 20)
        assert lab.steps("dark")[: done + 20] == list(range(1, done + 21))
        far.power_off()
        try:
            assert launch.wait(90) == 4, launch.said
            assert not [name for name in near.containers() if "-dark-" in name]
        finally:
            far.power_on()
    assert f"failed first at {far.address}" in launch.said
    assert [node["host"] for node in lab.record("dark")["nodes"] if node["lost"]] == [far.address]
    assert lab.run("stop", "dark").returncode == 0, "its container exists again, stopped"


def test_a_long_loss_of_the_network_ends_the_run_and_a_later_stop_clears_the_node(lab: Lab, untouched: None) -> None:
    near, far = lab.hosts[:2]
    with lab.launch("long", "cluster.node_timeout_s=5", *ENDLESS, *QUICK, *lab.overrides(near, far)) as launch:
        launch.until(lambda: lab.steps("long"))
        with far.unplugged():
            assert launch.wait(90) == 4, launch.said
            assert not [name for name in near.containers() if "-long-" in name], "the node that responds is cleared"
            stopped = lab.run("stop", "long")
            assert stopped.returncode == 4 and far.address in stopped.stdout and "omnilaunch stop long" in stopped.stdout, stopped.stdout
    assert f"failed first at {far.address}" in launch.said and "stopped responding" in launch.said
    fate = {node["host"]: (node["lost"], bool(node["left"])) for node in lab.record("long")["nodes"]}
    assert fate == {near.address: (False, False), far.address: (True, True)}
    assert [name for name in far.containers() if "-long-" in name], "the launcher could not end it"
    stopped = lab.run("stop", "long")
    assert stopped.returncode == 0 and f"nothing of run long is left on {near.address}, {far.address}" in stopped.stdout, stopped.stdout


def test_a_full_disk_is_named_with_its_host(lab: Lab, small_disk: str, untouched: None) -> None:
    full = lab.hosts[1]
    with lab.launch("full", "run.save_every=20", *ENDLESS, *lab.overrides(*lab.hosts[1:], root=small_disk)) as launch:
        launch.until(lambda: lab.steps("full"))
        full.run("sh", "-c", f"cat /dev/zero > {small_disk}/ballast 2>/dev/null; true")
        assert launch.wait(90) == 5, launch.said
    assert f"failed first at {full.address}" in launch.said
    assert "No space left on device" in launch.said and "meaning: The disk under the run's folder is full" in launch.said
    assert not any(node["left"] for node in lab.record("full")["nodes"])


def test_the_neighbour_trained_as_it_does_alone(lab: Lab, neighbour: tuple[str, ...], alone: dict[str, Any]) -> None:
    lab.hosts[0].run("docker", "update", "--cpus", "2", neighbour[0])
    with lab.start("attach", "neighbour") as launch:
        launch.until(lambda: len(lab.steps("neighbour")) > alone["steps"])
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(60) == 130, launch.said
    assert lab.record("neighbour")["status"] == "stopped" and lab.record("neighbour")["checkpoint"]
    steps = lab.steps("neighbour")
    assert steps == list(range(1, len(steps) + 1))
    assert [row["loss"] for row in lab.rows("neighbour")[: alone["steps"]]] == [row["loss"] for row in lab.rows("alone")]


def wait_still(lab: Lab, run_id: str, for_s: float = 10) -> int:
    """The number of steps when no new one was written for `for_s` seconds."""
    done, since = len(lab.steps(run_id)), time.monotonic()
    while time.monotonic() - since < for_s:
        time.sleep(0.2)
        if (now := len(lab.steps(run_id))) > done:
            done, since = now, time.monotonic()
    return done
