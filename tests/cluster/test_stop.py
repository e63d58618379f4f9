"""A launcher, its connection or a node ends during a run, at a random moment. After `omnilaunch stop` nothing of the run is left within 10 s, and
another run on the same hosts is not affected.

    make test-cluster ARGS="-k every_way_out --rounds 10"
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.cluster.conftest import Lab, Launch
from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

LONG = ("run.steps=1000000", "run.evaluation.enabled=false", "hardware.threads=1", "stage.global_batch=8", "cluster.rendezvous_port=29600")
LEFT_S = 10.0
SPREAD_S = 12.0  # from the first container to some steps


@pytest.fixture(scope="module")
def sibling(lab: Lab) -> Iterator[Callable[[], str]]:
    """Another run on the first host; returns its container's id and start time, which would change if it were restarted."""
    done = lab.run("launch", "--detach", "--run-id", "sibling", *LONG, "cluster.shm_size=128m", *lab.overrides(lab.hosts[0]))
    assert done.returncode == 0, done.stdout

    def state() -> str:
        (name,) = (name for name in lab.hosts[0].containers() if "-sibling-" in name and name.endswith("-n0"))
        return lab.hosts[0].run("docker", "inspect", "--format", "{{.Id}} {{.State.StartedAt}} {{.State.Status}}", name)

    yield state
    stopped = lab.run("stop", "sibling")
    assert stopped.returncode == 0, stopped.stdout


def leftovers(hosts: tuple[Host, ...], run_id: str) -> list[str]:
    return [f"{host.name} {name}" for host in hosts for name in host.containers() if f"-{run_id}-" in name]


def everywhere(hosts: tuple[Host, ...], run_id: str) -> bool:
    return all(leftovers((host,), run_id) for host in hosts)


def end(way: str, launch: Launch, first: Host, second: Host) -> None:
    """The sibling runs on the first host, so the second one is switched off."""
    if way == "ssh-cut":
        first.cut_ssh()
    elif way == "node-restart":
        second.power_off()
        second.power_on()
    else:
        launch.process.send_signal(signal.Signals[way])


@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM", "SIGKILL", "SIGHUP", "ssh-cut", "node-restart"])
def test_every_way_out_leaves_nothing(lab: Lab, sibling: Callable[[], str], request: pytest.FixtureRequest, way: str) -> None:
    rounds, chance = request.config.getoption("--rounds"), random.Random(way)
    hosts, alive = lab.hosts[:2], sibling()
    for number in range(rounds):
        run_id = f"{way.lower()}-{number}"
        with lab.launch(run_id, "cluster.node_timeout_s=5", *LONG, *lab.overrides(*hosts)) as launch:
            launch.until(partial(everywhere, hosts, run_id))
            time.sleep(chance.uniform(0, SPREAD_S))
            end(way, launch, *hosts)
            asked = time.monotonic()
            stopped = lab.run("stop", run_id)
            took_s = time.monotonic() - asked
            assert stopped.returncode == 0, stopped.stdout + launch.said
        assert leftovers(hosts, run_id) == []
        assert took_s <= LEFT_S + 3, f"{took_s:.1f} s for the whole command, its own start and connection included"
        assert sibling() == alive
        print(f"{run_id}: gone after {took_s:.1f} s")
