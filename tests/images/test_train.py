"""`make train ARGS="cluster.runtime=docker"` and the process runtime give bitwise identical results; a stopped container is removed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images.conftest import ROOT, Built, inspect, run
from tests.launcher.planted import rows_of

pytestmark = pytest.mark.docker

SHORT = ("run.steps=4", "stage.optimizer.warmup=1", "run.evaluation.limit=8", "stage.global_batch=8")


def command(folder: Path, name: str, *overrides: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "launcher.cli", "launch", "--run-id", name, f"cluster.root={folder}", *overrides)


def docker_overrides(built: Built) -> tuple[str, ...]:
    given = {key: getattr(built.delivery, key) for key in ("base", "find_links", "ca_bundle", "index")}
    return ("cluster.runtime=docker", *(f"cluster.delivery.{key}='{value}'" for key, value in given.items() if value))


def test_both_runtimes_give_the_same_bits(built: Built, tmp_path: Path, prove: Callable[..., None]) -> None:
    tmp_path.chmod(0o755)  # the container's user must be able to walk to the run's folder
    for name, overrides in (("process", ()), ("docker", docker_overrides(built))):
        done = subprocess.run(command(tmp_path, name, *SHORT, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    process, docker = (tmp_path / "runs" / name for name in ("process", "docker"))
    assert rows_of(process) == rows_of(docker)
    results = [json.loads((folder / "result.json").read_text()) for folder in (process, docker)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["evaluation"] == results[1]["evaluation"]
    assert results[1]["image"] == built.image.tag
    assert (docker / "metrics.jsonl").stat().st_uid == (os.getuid() or 1000), "written by the container's user, which is not root"
    assert run("docker", "ps", "--all", "--quiet", "--filter", "label=omnilaunch.run=docker") == ""
    prove(
        "cpu",
        "x86_64",
        base="stand-in base",
        size_bytes=inspect(built.image.tag)["Size"],
        shown=("pip check", "compiled operators used", "a digits run as a user who is not root, bitwise equal to the process runtime"),
        missing="",
    )


def test_a_stopped_container_is_gone_and_its_record_says_so(built: Built, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    name = f"stop-{time.monotonic_ns()}"
    rows = tmp_path / "runs" / name / "metrics.jsonl"
    argv = command(tmp_path, name, "run.steps=100000", *docker_overrides(built))
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (rows.exists() and rows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert run("docker", "ps", "--all", "--quiet", "--filter", f"label=omnilaunch.run={name}") == ""
    assert json.loads((tmp_path / "runs" / name / "result.json").read_text())["status"] == "stopped"
