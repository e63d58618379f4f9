"""Runs that lose a node or a rank and resume from their newest checkpoint: bitwise identical to an undisturbed run."""

from typing import Any

import pytest

from tests.cluster.conftest import FOLDER, Lab
from tests.cluster.host import SHARED, Host

pytestmark = pytest.mark.cluster

JOB = (
    "run.steps=24", "stage.optimizer.warmup=4", "stage.global_batch=16", "run.save_every=4", "run.evaluation.limit=16", "run.restarts=1",
    "hardware.threads=1", "cluster.node_timeout_s=5", "strategy=zero2",
)  # fmt: skip
TIMING = ("seconds", "peak_bytes")


def rows(lab: Lab, run_id: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in lab.rows(run_id)]


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> str:
    """The same job on the first two hosts, undisturbed."""
    done = lab.run("launch", "--run-id", "calm", *JOB, *lab.overrides(*lab.hosts[:2], root=SHARED), "cluster.shared=true")
    assert done.returncode == 0, done.stdout
    return "calm"


def same_end(lab: Lab, run_id: str, undisturbed: str) -> None:
    assert lab.steps(run_id) == list(range(1, 25))
    assert rows(lab, run_id) == rows(lab, undisturbed)
    mine, calm = lab.record(run_id), lab.record(undisturbed)
    for key in ("status", "steps", "final_loss", "weights_sha256", "evaluation"):
        assert mine[key] == calm[key], key


def test_a_node_without_power_is_replaced_by_the_spare(lab: Lab, undisturbed: str) -> None:
    first, lost, spare = lab.hosts
    overrides = lab.overrides(first, lost, root=SHARED, spares=(spare,))
    with lab.launch("recovered", *JOB, *overrides, "cluster.shared=true") as launch:
        launch.until(lambda: len(lab.steps("recovered")) >= 9)
        lost.power_off()
        try:
            assert launch.wait() == 0, launch.said
        finally:
            lost.power_on()
    same_end(lab, "recovered", undisturbed)
    ended = lab.record("recovered")
    assert [node["host"] for node in ended["nodes"]] == [first.address, spare.address]
    (attempt,) = ended["attempts"]
    assert attempt["number"] == 1 and attempt["steps"] >= 9 and lost.address in [node["host"] for node in attempt["nodes"]]
    assert (lab.home / "runs/recovered/attempts/1/logs/node1.log").stat().st_size
    clear("recovered", (first, spare))
    assert lab.run("stop", "recovered").returncode == 0, "the host that came back is cleared by the names of its containers"
    clear("recovered", (lost,))


def test_a_rank_that_dies_is_started_again_where_no_folder_is_shared(lab: Lab, undisturbed: str) -> None:
    first, second = lab.hosts[:2]
    with lab.launch("again", *JOB, *lab.overrides(first, second, root=FOLDER)) as launch:
        launch.until(lambda: len(lab.steps("again")) >= 9)
        (name,) = (name for name in second.containers() if "-again-" in name and name.endswith("-n1"))
        kill_rank(second, name)
        assert launch.wait() == 0, launch.said
    assert "copying checkpoint" in launch.said and f"to {second.address}" in launch.said
    same_end(lab, "again", undisturbed)
    assert [node["host"] for node in lab.record("again")["nodes"]] == [first.address, second.address]
    clear("again", (first, second))


def kill_rank(host: Host, container: str) -> None:
    """SIGKILL for the training process, as the kernel does when memory runs out."""
    script = 'for at in /proc/[0-9]*; do ! tr "\\0" " " <$at/cmdline 2>/dev/null | grep -q "^[^ ]*python[^ ]* -u -m trainer run" || echo ${at#/proc/}; done'
    pids = host.run("docker", "exec", "--user", "root", container, "sh", "-c", script).split()
    assert pids, host.run("docker", "top", container)
    host.run("docker", "exec", "--user", "root", container, "sh", "-c", f"kill -9 {' '.join(pids)}")


def clear(run_id: str, hosts: tuple[Host, ...]) -> None:
    for host in hosts:
        assert not [name for name in host.containers() if f"-{run_id}-" in name], host.name
