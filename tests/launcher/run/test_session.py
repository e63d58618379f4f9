"""The connections and files that a session opens, and the examination of the nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.doctor.smi import FIRST_FIELDS, NVIDIA_FIELDS
from launcher.errors import NodeFailed
from launcher.plan.plan import LocalContext, Plan
from launcher.run import session
from launcher.run.session import FILES_PER_NODE, open_session
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.transport import Local
from tests.launcher.hostile import running
from tests.launcher.sshd import Sshd, access_in, make_key, node_at

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "smi"
DATA = ("data=files", "data.train=a.json", "data.images=photos")
PLACE = LocalContext(project=Path("/"), here=Path("/"), interpreter="python", user="0:0")
LIMIT = """
import resource
from launcher.run.session import raise_open_files_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
raise_open_files_limit({nodes})
print(*resource.getrlimit(resource.RLIMIT_NOFILE), hard)
"""


def test_the_connections_of_an_attempt_end_with_it(plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def reach(*_: Any) -> Iterator[tuple[None, tuple[Local, ...]]]:
        seen.append("open")
        yield None, (Local({}),)
        seen.append("close")

    monkeypatch.setattr(session, "connect_with", reach)
    monkeypatch.setattr(session, "move_to_reached", lambda plan, *_: plan)
    with open_session(plan_for(), PLACE, {}, say=print, terminal=False) as (_, opened):
        plan, opened = opened.move(plan_for(), frozenset())
        assert seen == ["open", "close", "open"]
        opened.move(plan, frozenset())
        assert seen[3:] == ["close", "open"]
    assert seen.count("open") == seen.count("close") == 3


@pytest.fixture
def p4_here(tmp_path: Path) -> dict[str, str]:
    """An environment with an nvidia-smi that gives a recorded answer: an idle P4 with 7.5 GiB, with a driver that knows the first eight fields."""
    tool = tmp_path / "nvidia-smi"
    unknown = "".join(
        f"case $* in *{field}*) echo 'Field \"{field}\" is not a valid field to query.'; exit 2 ;; esac\n"
        for field in NVIDIA_FIELDS[len(FIRST_FIELDS) :]
    )
    tool.write_text(f"#!/bin/sh\n{unknown}case $* in *compute-apps*) ;; *) cat {GOLDEN / 'nvidia-p4.csv'} ;; esac\n")
    tool.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_free_memory_of_this_machine_replaces_the_data_sheet(plan_for: Callable[..., Plan], p4_here: dict[str, str]) -> None:
    plan = plan_for("hardware=p4", "cluster.runtime=process", "hardware.memory_gib=80")
    examined = look_at(plan, p4_here)
    assert plan.memory is not None and examined.memory is not None
    assert (plan.memory.limit_bytes, examined.memory.limit_bytes) == (80 * 2**30, 7.5 * 2**30)


def test_what_does_not_fit_this_machines_accelerator_is_refused(plan_for: Callable[..., Plan], p4_here: dict[str, str]) -> None:
    """The data sheet alone would allow it: the test says 80 GiB."""
    plan = plan_for(
        "hardware=p4", "cluster.runtime=process", "hardware.memory_gib=80", "model=llava_1_5_7b", "precision=fp16", "stage=lora", *DATA
    )
    with pytest.raises(NodeFailed, match=r"error +localhost: fit\n.* 7\.5 of 7\.5 are free"):
        look_at(plan, p4_here)


def test_a_machine_without_the_accelerator_is_named(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(NodeFailed, match=r"error +localhost: device_tool\n"):
        look_at(plan_for("hardware=p4"), {"PATH": "/usr/bin:/bin"})


def look_at(plan: Plan, environ: dict[str, str]) -> Plan:
    with open_session(plan, replace(PLACE, project=ROOT), environ, say=print, terminal=False) as (examined, _):
        return examined


def test_the_limit_of_open_files_is_raised_for_many_nodes() -> None:
    done = subprocess.run((sys.executable, "-c", LIMIT.format(nodes=128)), capture_output=True, text=True, check=True)
    soft, hard, before = map(int, done.stdout.split())
    assert hard == before and soft >= min(hard, 128 * FILES_PER_NODE)


def test_how_many_files_a_node_takes(tmp_path: Path) -> None:
    """Its connection, and the logs of its ranks and of its data check, with a command under way."""
    key = make_key(tmp_path / "key")
    sshd = Sshd(tmp_path / "sshd", key)
    client = ConnectionPool(access_in(tmp_path / "home", key, sshd.known_line()))
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        ssh = Ssh(node_at(sshd), client)
        followed = [ssh.start(("sleep", "4811"), log=tmp_path / name) for name in ("ranks", "data")]
        with ssh.stream(("sh", "-c", "echo here; exec sleep 4811")) as chunks:
            next(chunks)
            assert len(list(Path("/proc/self/fd").iterdir())) - before <= FILES_PER_NODE
        for command in followed:
            command.signal(signal.SIGKILL)
            command.wait(5)
    finally:
        client.close()
        sshd.end()


def test_followed_logs_are_closed_with_the_pool(tmp_path: Path) -> None:
    """Such as the logs of containers that outlive the launcher, or of an earlier attempt."""
    key = make_key(tmp_path / "key")
    sshd = Sshd(tmp_path / "sshd", key)
    client = ConnectionPool(access_in(tmp_path / "home", key, sshd.known_line()))
    followed = Ssh(node_at(sshd), client).start(("sleep", "4812"), log=tmp_path / "log")
    client.close()
    sshd.end()
    assert followed.followed.file.closed
    for pid in running("sleep", "4812"):
        os.kill(pid, signal.SIGKILL)
