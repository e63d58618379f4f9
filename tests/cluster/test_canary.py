"""Secrets on real hosts: the ranks get them byte for byte, and they are found nowhere else, during the run or after it."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import ENDLESS, FOLDER, Lab
from tests.cluster.host import Host, docker

pytestmark = pytest.mark.cluster

CANARY = f"hf_{secrets.token_hex(16)}"
# The second value has characters that a shell, an environment file or a line-based protocol could misread.
VALUES = {"HF_TOKEN": CANARY, "TEST_PASSWORD": f"{CANARY}'\"$(touch {FOLDER}/executed) `id` \\ #x=y\nsecond line"}
PLACES = ("/home", "/tmp", "/run", "/etc", "/var/log", "/var/lib/docker/containers", "/dev/shm")


class Watch:
    """Looks at every argv on this machine's kernel, which the hosts and their containers share, and keeps those that contain the canary."""

    def __init__(self) -> None:
        self.looks, self.found, self.over = 0, set[str](), threading.Event()

    def look(self) -> None:
        while not self.over.is_set():
            self.looks += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:  # it has just ended
                    continue
                if CANARY.encode() in line:
                    self.found.add(line.replace(b"\0", b" ").decode(errors="replace").replace(CANARY, "CANARY"))
            time.sleep(0.02)


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    thread = threading.Thread(target=watch.look)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def environments(run_id: str) -> list[dict[bytes, bytes]]:
    """The environments of the run's ranks, wherever they run on this machine's kernel."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            pairs = dict(pair.split(b"=", 1) for pair in path.read_bytes().split(b"\0") if b"=" in pair)
            training = b"trainer\0run" in (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if training and pairs.get(b"OMNILAUNCH_RUN_ID") == run_id.encode() and b"RANK" in pairs:
            found.append(pairs)
    return found


def files_with_canary(host: Host) -> str:
    """Their names. The pattern goes over stdin, so that the search does not find itself."""
    layers = host.run("sh", "-c", "docker ps -aq | xargs -r docker inspect --format '{{.GraphDriver.Data.UpperDir}}'").split()
    command = ("grep", "--recursive", "--devices=skip", "--files-with-matches", "--fixed-strings", "--file=-", *PLACES, *layers)
    return docker("exec", "--interactive", host.name, *command, input=CANARY, check=False)


def test_the_search_finds_what_is_there(lab: Lab) -> None:
    docker("exec", "--interactive", lab.hosts[0].name, "dd", "of=/tmp/planted", "status=none", input=f"x{CANARY}x")
    assert files_with_canary(lab.hosts[0]) == "/tmp/planted"
    lab.hosts[0].run("rm", "/tmp/planted")


def test_secrets_reach_only_the_ranks(lab: Lab, clean: Callable[[], None]) -> None:
    """A detached run, stopped by its name from a terminal without the secrets."""
    hosts = lab.hosts[:2]
    with watched() as watch:
        done = lab.run(
            "launch", "--detach", "--run-id", "canary", f"cluster.secrets=[{','.join(VALUES)}]", *ENDLESS, *lab.overrides(*hosts), **VALUES
        )
        assert done.returncode == 0 and "omnilaunch attach canary" in done.stdout, done.stdout
        wait_for_steps(hosts[0])
    assert watch.looks > 50 and watch.found == set()
    ranks = environments("canary")
    assert {rank[b"RANK"] for rank in ranks} == {b"0", b"1"}
    for rank in ranks:
        assert {name: rank[name.encode()].decode() for name in VALUES} == VALUES
    for host in hosts:
        inspected = host.run("sh", "-c", "docker ps -aq | xargs docker inspect; docker ps -aq | xargs -n1 docker logs 2>&1")
        assert "OMNILAUNCH_SECRETS=HF_TOKEN TEST_PASSWORD" in inspected and CANARY not in inspected
        assert files_with_canary(host) == ""
        assert host.run("sh", "-c", "docker ps -q | xargs -I NAME docker exec NAME find /dev/shm -name 'omnilaunch*'") == ""
        assert host.run("ls", FOLDER).split() == ["runs"], "nothing of a value was executed"
    stopped = lab.run("stop", "canary")
    assert stopped.returncode == 0 and "nothing of run canary is left" in stopped.stdout, stopped.stdout
    clean()
    assert [files_with_canary(host) for host in hosts] == ["", ""]
    attached = lab.run("attach", "canary", **VALUES)
    assert attached.returncode in (5, 130), attached.stdout  # how far it came is found out afterwards
    assert [host.run("find", FOLDER, "-name", "*.env") for host in hosts] == ["", ""]
    everything = (path for path in lab.home.rglob("*") if path.is_file())
    assert [path for path in everything if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + stopped.stdout + attached.stdout


def wait_for_steps(host: Host, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not host.run("sh", "-c", f"cat {FOLDER}/runs/canary/metrics.jsonl", check=False):
        assert time.monotonic() < deadline, host.run("sh", "-c", "docker ps -aq | xargs docker logs", check=False)
        time.sleep(0.5)
