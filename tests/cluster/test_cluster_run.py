"""Runs on several hosts, each with its own sshd, engine and disk, from a launcher that reaches them only by SSH."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import ENDLESS, FOLDER, SMALL, Lab
from tests.cluster.host import INTERFACE, USER
from tests.images.conftest import ROOT

pytestmark = pytest.mark.cluster

TWO_RANKS = ("cluster.devices_per_node=2",)


@pytest.fixture
def user(lab: Lab, tmp_path: Path) -> Path:
    """A project folder like a user's, with a cluster file of two hosts and with its tools set up."""
    for name in ("conf", "images", "launcher", "trainer"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    cluster = yaml.safe_load((ROOT / "conf/cluster/example.yaml").read_text(encoding="utf-8"))
    nodes = [{"host": host.address, "user": USER, "address": host.address, "interface": INTERFACE} for host in lab.hosts[:2]]
    given = {key.removeprefix("cluster.delivery."): value.strip("'") for key, _, value in (word.partition("=") for word in lab.image)}
    cluster |= {"name": "lab", "nodes": nodes, "devices_per_node": 2, "root": FOLDER, "delivery": given}
    cluster |= {"ulimits": {}, "shm_size": "1g"}  # hosts inside containers may raise none
    (tmp_path / "conf/cluster/lab.yaml").write_text(yaml.safe_dump(cluster), encoding="utf-8")
    tools = tmp_path / ".venv"
    (tools / "bin").mkdir(parents=True)
    (tools / "bin/omnilaunch").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher.cli "$@"\n', encoding="utf-8")
    (tools / "bin/omnilaunch").chmod(0o755)
    for stamp in (".python", ".launcher"):
        (tools / stamp).touch()
    return tmp_path


def test_two_nodes_train_as_one(lab: Lab, user: Path, clean: Callable[[], None]) -> None:
    """Four ranks on two hosts without a shared folder, started as a user does, end with the same losses, weights and answers as four ranks on one
    host."""
    words = ("run.steps=40", "hardware.threads=1")
    made = subprocess.run(
        ("make", "train", "HW=cpu", "CLUSTER=lab", f"ARGS={' '.join(words)} --run-id two"), cwd=user, timeout=580,
        env={**lab.environment, "PYTHONPATH": str(user)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    (lab.home / "runs").mkdir(exist_ok=True)
    (lab.home / "runs/two").symlink_to(user / "runs/two")
    done = lab.run("launch", "--run-id", "one", *words, "cluster.devices_per_node=4", *lab.overrides(*lab.hosts[:1]), timeout_s=580)
    assert done.returncode == 0, done.stdout
    one, two = lab.record("one"), lab.record("two")
    assert [node["host"] for node in two["nodes"]] == [host.address for host in lab.hosts[:2]]
    assert (two["status"], two["steps"]) == ("finished", 40)
    assert lab.steps("two") == list(range(1, 41))
    assert [row["loss"] for row in lab.rows("two")] == [row["loss"] for row in lab.rows("one")]
    assert two["weights_sha256"] == one["weights_sha256"]
    assert two["evaluation"] == one["evaluation"] and two["evaluation"]["exact_match"] > 0
    for number in (0, 1):
        log = (lab.home / "runs" / "two" / "logs" / f"node{number}.log").read_text(encoding="utf-8")
        assert {f"[rank {rank}]" for rank in (2 * number, 2 * number + 1)} <= {line[:8] for line in log.splitlines()}
        assert lab.hosts[number].run("find", FOLDER, "-name", "two*.env") == "", "no environment file stays"


def test_ctrl_c_while_one_node_is_slow_to_start(lab: Lab, clean: Callable[[], None]) -> None:
    """The launcher ends within 10 s, and the container of the other node is removed."""
    first, second = lab.hosts[:2]
    with second.slow_start(), lab.launch("hasty", *ENDLESS, *lab.overrides(first, second)) as launch:
        launch.until(lambda: any("-hasty-" in name for name in first.containers()))
        asked = time.monotonic()
        launch.process.send_signal(signal.SIGINT)
        code = launch.wait(30)
        took_s = time.monotonic() - asked
    assert code == 130, launch.said
    assert took_s <= 10, f"{took_s:.1f} s"
    assert not any("-hasty-" in name for host in (first, second) for name in host.containers())
    assert lab.record("hasty")["status"] == "stopped"


def test_ctrl_c_saves_and_leaves_nothing(lab: Lab, clean: Callable[[], None]) -> None:
    words = (*ENDLESS, *TWO_RANKS, "run.stop_timeout_s=60")  # however slow this machine is
    with lab.launch("stopped", *words, *lab.overrides(*lab.hosts[:2])) as launch:
        launch.until(lambda: lab.steps("stopped"))
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(90) == 130, launch.said
    assert lab.record("stopped")["status"] == "stopped" and lab.record("stopped")["checkpoint"]


def test_a_launcher_that_was_killed_is_attached_again(lab: Lab, alone: dict[str, Any], clean: Callable[[], None]) -> None:
    """The ranks are not affected: the result is that of a run whose launcher was not killed."""
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
