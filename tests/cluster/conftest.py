"""Three hosts for the test session, a home folder whose SSH files know them, and the launcher started from there."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.host import INTERFACE, USER, Host, build_image, end_hosts, known_hosts, make_key, start_hosts
from tests.images.conftest import ROOT, Built, base, built, delivery, make, project  # noqa: F401  # fixtures

NETWORK = "omnilaunch-test"
NODES = 3
FOLDER = f"/home/{USER}/omnilaunch"
# One thread per rank, since the hosts share this machine's cores; a small evaluation, since the result of the training is not tested; a learning
# rate that does not depend on the number of steps, so that runs of different lengths start with the same losses.
SMALL = (
    "hardware.threads=1", "stage.global_batch=16", "stage.optimizer.warmup=5", "stage.optimizer.schedule=constant", "run.evaluation.limit=16",
)  # fmt: skip
ENDLESS = ("run.steps=100000", *SMALL)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launcher that runs. Its output goes to a file, so that it never waits for a reader."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {timeout_s:g} s:\n{self.said}")

    def until(self, condition: Callable[[], Any], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"the condition was not met within {timeout_s:g} s:\n{self.said}"
            time.sleep(0.2)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The hosts, and a home folder from which the launcher reaches them. `image`: overrides that name the image which is built already."""

    hosts: tuple[Host, ...]
    home: Path
    image: tuple[str, ...]

    def overrides(self, *hosts: Host, root: str = FOLDER, spares: tuple[Host, ...] = ()) -> tuple[str, ...]:
        """`cluster.nodes` and the other overrides that a cluster file of these hosts would have."""
        nodes = [f"{{host: '{host.address}', user: {USER}, address: '{host.address}', interface: {INTERFACE}}}" for host in hosts]
        nodes += [
            f"{{host: '{host.address}', user: {USER}, address: '{host.address}', interface: {INTERFACE}, spare: true}}" for host in spares
        ]
        return ("cluster.runtime=docker", f"cluster.nodes=[{', '.join(nodes)}]", f"cluster.root={root}", *self.image)

    def command(self, *words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "launcher.cli", *words)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home), "PYTHONPATH": str(ROOT), "SSH_AUTH_SOCK": ""}

    def run(self, *words: str, timeout_s: float = 300, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run the launcher from the home folder to its end; `stdout` has all of its output."""
        return subprocess.run(
            self.command(*words), cwd=self.home, env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout_s,
        )  # fmt: skip

    def launch(self, run_id: str, *words: str, **environment: str) -> AbstractContextManager[Launch]:
        return self.start("launch", "--run-id", run_id, *words, **environment)

    @contextmanager
    def start(self, *words: str, **environment: str) -> Iterator[Launch]:
        """Start the launcher in its own session, as in its own terminal. It is killed at the end of the test."""
        log = self.home / f"{uuid.uuid4().hex}.said"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(*words), cwd=self.home, env={**self.environment, **environment}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        with process:
            try:
                yield Launch(process=process, log=log)
            finally:
                process.kill()

    def record(self, run_id: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.home / "runs" / run_id / "result.json").read_text(encoding="utf-8"))
        return content

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl on this machine; none before the first step."""
        path = self.home / "runs" / run_id / "metrics.jsonl"
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self, run_id: str) -> list[int]:
        return [row["step"] for row in self.rows(run_id)]


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


@pytest.fixture(scope="session")
def alone(lab: Lab) -> dict[str, Any]:
    """The record of an undisturbed run: one rank on the first host, 60 steps."""
    done = lab.run("launch", "--run-id", "alone", "run.steps=60", *SMALL, *lab.overrides(lab.hosts[0]))
    assert done.returncode == 0, done.stdout
    return lab.record("alone")


@pytest.fixture
def clean(lab: Lab) -> Iterator[Callable[[], None]]:
    """After the test no host has a container that it did not have before."""
    before = {host.name: set(host.containers()) for host in lab.hosts}

    def check() -> None:
        for host in lab.hosts:
            assert set(host.containers()) <= before[host.name], host.name

    yield check
    check()
