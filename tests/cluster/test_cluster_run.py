"""Runs on several hosts, each with its own sshd, engine and disk, from a launcher that knows them by SSH alone."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Lab

pytestmark = pytest.mark.cluster

ROOT_FOLDER = "/home/trainer/omnilaunch"
SHORT = ("run.steps=30", "stage.optimizer.warmup=5", "run.evaluation.limit=64")
TWO_RANKS = ("cluster.devices_per_node=2",)


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return content


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_nodes_train_as_one(lab: Lab, clean: Callable[[], None]) -> None:
    """Four ranks on two hosts without a shared folder: the losses of one host, and its evaluation."""
    for name, hosts in (("one", lab.hosts[:1]), ("two", lab.hosts[:2])):
        done = lab.run("launch", "--run-id", name, *SHORT, *TWO_RANKS, *lab.overrides(*hosts, root=ROOT_FOLDER))
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (lab.home / "runs" / name for name in ("one", "two"))
    assert [node["host"] for node in record(two)["nodes"]] == [host.address for host in lab.hosts[:2]]
    assert record(two)["status"] == "finished" and record(two)["steps"] == 30
    assert [row["step"] for row in rows(two)] == list(range(1, 31))
    for mine, other in zip(rows(one), rows(two), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert record(one)["evaluation"]["exact_match"] == pytest.approx(record(two)["evaluation"]["exact_match"], abs=0.05)
    for number in (0, 1):
        assert (two / "logs" / f"node{number}.log").stat().st_size
        assert lab.hosts[number].run("ls", "-A", f"{ROOT_FOLDER}/runs/two", check=False).count(".env") == 0, "no environment file stays"


def test_ctrl_c_saves_and_leaves_nothing(lab: Lab, clean: Callable[[], None]) -> None:
    process = lab.start("launch", "--run-id", "stopped", "run.steps=100000", *TWO_RANKS, *lab.overrides(*lab.hosts[:2], root=ROOT_FOLDER))
    folder = lab.home / "runs" / "stopped"
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert record(folder)["status"] == "stopped" and record(folder)["checkpoint"]
    clean()


def test_a_killed_launcher_is_taken_up_again_and_a_second_run_is_untouched(lab: Lab, clean: Callable[[], None]) -> None:
    """Three launches: one killed with SIGKILL and attached again, one stopped by name, and a neighbour that lives through all of it."""
    steps = ("run.steps=120", "stage.global_batch=16", "stage.optimizer.warmup=5", "run.evaluation.limit=16")
    neighbour = lab.start("launch", "--run-id", "neighbour", *steps, *lab.overrides(lab.hosts[0], root=ROOT_FOLDER))
    try:
        wait_for(lambda: (lab.home / "runs/neighbour/metrics.jsonl").exists(), neighbour)
        killed = lab.start("launch", "--run-id", "killed", *steps, *lab.overrides(lab.hosts[0], root=ROOT_FOLDER))
        wait_for(lambda: (lab.home / "runs/killed/metrics.jsonl").exists(), killed)
        killed.kill()
        killed.wait()
        assert "running" in lab.run("status", "killed").stdout
        attached = lab.run("attach", "killed")
        assert attached.returncode == 0, attached.stdout + attached.stderr
        assert [row["step"] for row in rows(lab.home / "runs/killed")] == list(range(1, 121))
        assert record(lab.home / "runs/killed")["status"] == "finished"
        said, _ = neighbour.communicate(timeout=300)
        assert neighbour.returncode == 0, said
    finally:
        neighbour.kill()


def test_detached_then_stopped_by_name(lab: Lab, clean: Callable[[], None]) -> None:
    done = lab.run("launch", "--detach", "--run-id", "long", "run.steps=100000", *lab.overrides(lab.hosts[0], root=ROOT_FOLDER))
    assert done.returncode == 0 and "omnilaunch attach long" in done.stdout, done.stdout + done.stderr
    assert len(lab.hosts[0].containers()) == 1
    stopped = lab.run("stop", "long")
    assert stopped.returncode == 0 and "nothing of run long is left" in stopped.stdout, stopped.stdout + stopped.stderr
    clean()
    attached = lab.run("attach", "long")
    assert attached.returncode in (5, 130), "its end is found out afterwards"


def test_a_node_without_power_is_named_and_the_others_are_stopped(lab: Lab) -> None:
    argv = ("launch", "--run-id", "dark", "run.steps=100000", "cluster.node_timeout_s=5", *lab.overrides(*lab.hosts[1:], root=ROOT_FOLDER))
    process = lab.start(*argv)
    try:
        wait_for(lambda: (lab.home / "runs/dark/metrics.jsonl").exists(), process)
        lab.hosts[2].power_off()
        said, _ = process.communicate(timeout=180)
    finally:
        process.kill()
        lab.hosts[2].power_on()
    assert process.returncode in (4, 5), said
    assert lab.hosts[2].address in said
    assert lab.hosts[1].containers() == ()
    lost = [node for node in record(lab.home / "runs/dark")["nodes"] if node["lost"]]
    assert [node["host"] for node in lost] == [lab.hosts[2].address]
    lab.hosts[2].run("sh", "-c", "docker ps -aq | xargs -r docker rm -f")


def wait_for(condition: Callable[[], bool], process: Any, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.2)
