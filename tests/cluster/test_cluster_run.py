"""Runs on several hosts, each with its own sshd, engine and disk, from a launcher that knows them by SSH alone."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import ENDLESS, FOLDER, SMALL, Lab

pytestmark = pytest.mark.cluster

TWO_RANKS = ("cluster.devices_per_node=2",)


def test_two_nodes_train_as_one(lab: Lab, clean: Callable[[], None]) -> None:
    """Four ranks on two hosts without a shared folder end with the very losses, weights and answers of four ranks on one host."""
    words = ("run.steps=40", "hardware.threads=1")
    for name, ranks, hosts in (("two", 2, lab.hosts[:2]), ("one", 4, lab.hosts[:1])):
        done = lab.run("launch", "--run-id", name, *words, f"cluster.devices_per_node={ranks}", *lab.overrides(*hosts), timeout_s=580)
        assert done.returncode == 0, done.stdout
    one, two = lab.record("one"), lab.record("two")
    assert [node["host"] for node in two["nodes"]] == [host.address for host in lab.hosts[:2]]
    assert (two["status"], two["steps"]) == ("finished", 40)
    assert lab.steps("two") == list(range(1, 41))
    assert [row["loss"] for row in lab.rows("two")] == [row["loss"] for row in lab.rows("one")]
    assert two["weights_sha256"] == one["weights_sha256"]
    assert two["evaluation"] == one["evaluation"] and two["evaluation"]["exact_match"] > 0
    for number in (0, 1):
        assert (lab.home / "runs" / "two" / "logs" / f"node{number}.log").stat().st_size
        assert lab.hosts[number].run("find", FOLDER, "-name", "two*.env") == "", "no environment file stays"


def test_ctrl_c_saves_and_leaves_nothing(lab: Lab, clean: Callable[[], None]) -> None:
    words = (*ENDLESS, *TWO_RANKS, "run.stop_timeout_s=60")  # however slow this machine is
    with lab.launch("stopped", *words, *lab.overrides(*lab.hosts[:2])) as launch:
        launch.until(lambda: lab.steps("stopped"))
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(90) == 130, launch.said
    assert lab.record("stopped")["status"] == "stopped" and lab.record("stopped")["checkpoint"]


def test_a_launcher_that_was_killed_is_attached_again(lab: Lab, alone: dict[str, Any], clean: Callable[[], None]) -> None:
    """The ranks do not notice: the end is that of a run whose launcher lived."""
    with lab.launch("killed", "run.steps=60", *SMALL, *lab.overrides(lab.hosts[0])) as launch:
        launch.until(lambda: lab.steps("killed"))
        os.kill(launch.process.pid, signal.SIGKILL)
        launch.wait(10)
    assert not (lab.home / "runs/killed/result.json").exists()
    assert lab.run("status", "killed").stdout.split()[:2] == [lab.hosts[0].address, "running"]
    attached = lab.run("attach", "killed")
    assert attached.returncode == 0, attached.stdout
    assert lab.steps("killed") == list(range(1, 61))
    assert lab.record("killed")["weights_sha256"] == alone["weights_sha256"]
