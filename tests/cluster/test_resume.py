"""Runs on hosts that are resumed after their launcher, their containers or a node is gone: bitwise identical to an undisturbed run."""

import signal
from typing import Any

import pytest

from tests.cluster.conftest import FOLDER, Lab
from tests.cluster.test_recovery import clear, rows

pytestmark = pytest.mark.cluster

JOB = (
    *("run.steps=24", "stage.optimizer.warmup=4", "stage.global_batch=16", "run.save_every=4", "run.evaluation.limit=16"),
    *("hardware.threads=1", "cluster.node_timeout_s=5", "strategy=zero2"),
)
SAME = ("status", "steps", "final_loss", "weights_sha256", "evaluation")


@pytest.fixture(scope="module")
def calm(lab: Lab) -> dict[str, Any]:
    """The same job on the first two hosts, undisturbed."""
    done = lab.run("launch", "--run-id", "undisturbed", *JOB, *lab.overrides(*lab.hosts[:2], root=FOLDER))
    assert done.returncode == 0, done.stdout
    return lab.record("undisturbed")


def assert_same(lab: Lab, run_id: str, calm: dict[str, Any]) -> None:
    assert lab.steps(run_id) == list(range(1, 25)) and rows(lab, run_id) == rows(lab, "undisturbed")
    assert {key: lab.record(run_id)[key] for key in SAME} == {key: calm[key] for key in SAME}


def test_a_stopped_run_is_resumed_where_no_folder_is_shared(lab: Lab, calm: dict[str, Any]) -> None:
    """Its launcher is killed first: the containers continue, so the run is to be attached, or stopped."""
    first, second = lab.hosts[:2]
    with lab.launch(
        "paused", *(word for word in JOB if not word.startswith("run.save_every")), *lab.overrides(first, second, root=FOLDER)
    ) as launch:
        launch.until(lambda: len(lab.steps("paused")) >= 3)
        launch.process.send_signal(signal.SIGKILL)
        launch.wait()
    refused = lab.run("launch", "--resume", "paused")
    assert refused.returncode == 2 and "omnilaunch attach paused" in refused.stdout, refused.stdout
    stopped = lab.run("stop", "paused")
    assert stopped.returncode == 0 and "to go on: omnilaunch launch --resume paused" in stopped.stdout, stopped.stdout
    done = lab.run("launch", "--resume", "paused")
    assert done.returncode == 0 and "copying checkpoint" in done.stdout, done.stdout
    assert_same(lab, "paused", calm)
    assert [attempt["status"] for attempt in lab.record("paused")["attempts"]] == ["stopped"]
    clear("paused", (first, second))


def test_a_run_whose_hosts_were_switched_off_is_resumed(lab: Lab, calm: dict[str, Any]) -> None:
    first, second = lab.hosts[:2]
    with lab.launch("dark", *JOB, *lab.overrides(first, second, root=FOLDER)) as launch:
        launch.until(lambda: len(lab.steps("dark")) >= 9)
        launch.process.send_signal(signal.SIGKILL)
        launch.wait()
    for host in (first, second):
        host.power_off()
        host.power_on()
    done = lab.run("launch", "--resume", "dark")
    assert done.returncode == 0 and "have ended without a launcher" in done.stdout, done.stdout
    assert_same(lab, "dark", calm)
    clear("dark", (first, second))


def test_a_node_that_is_gone_is_replaced_by_one_that_is_accepted(lab: Lab, calm: dict[str, Any]) -> None:
    """The checkpoint is on the first node, which stays."""
    first, gone, other = lab.hosts
    with lab.launch("moved", *JOB, *lab.overrides(first, gone, root=FOLDER)) as launch:
        launch.until(lambda: len(lab.steps("moved")) >= 9)
        launch.process.send_signal(signal.SIGINT)
        launch.wait()
    gone.power_off()
    try:
        refused = lab.run("launch", "--resume", "moved")
        assert refused.returncode == 4 and gone.address in refused.stdout, refused.stdout
        assert lab.record("moved")["status"] == "stopped", "the record is as it was"
        (nodes,) = (word for word in lab.overrides(first, other, root=FOLDER) if word.startswith("cluster.nodes="))
        refused = lab.run("launch", "--resume", "moved", nodes)
        assert refused.returncode == 2 and f"nodes: cluster.nodes: {first.address}, {gone.address} → " in refused.stdout, refused.stdout
        done = lab.run("launch", "--resume", "moved", nodes, "--accept", "nodes")
        assert done.returncode == 0, done.stdout
    finally:
        gone.power_on()
    assert_same(lab, "moved", calm)
    (resumption,) = lab.record("moved")["resumptions"]
    assert [change["kind"] for change in resumption["changes"] if change["key"] == "cluster.nodes"] == ["nodes"]
    clear("moved", (first, other))
