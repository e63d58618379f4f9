"""Commands and files over a real sshd of this test's own, on loopback."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.ssh.channel import command_line
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from tests.launcher.hostile import every_argv, hostile, running
from tests.launcher.sshd import Sshd, access_in, make_key, node_at


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "id_ed25519")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd") / "node", key)
    yield server
    server.end()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory, sshd: Sshd, key: Path) -> Iterator[Ssh]:
    client = ConnectionPool(access_in(tmp_path_factory.mktemp("access"), key, sshd.known_line()))
    yield Ssh(node_at(sshd), client)
    client.close()


def test_a_thousand_hostile_arguments_arrive_byte_equal_and_none_is_executed(ssh: Ssh, tmp_path: Path) -> None:
    words = hostile(1000)
    assert len(set(words)) > 900 and sum("touch C" in word for word in words) > 100
    for start in range(0, len(words), 200):
        batch = words[start : start + 200]
        output = ssh.run(("printf", r"%s\0", *batch), folder=tmp_path).output
        assert output.split("\0")[:-1] == batch
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", [shell for shell in ("sh", "bash", "dash", "zsh", "ksh") if Path("/bin", shell).exists()])
def test_every_posix_shell_reads_the_line_alike(shell: str, tmp_path: Path) -> None:
    words = hostile(300)
    done = subprocess.run((shell, "-c", command_line(("printf", r"%s\0", *words), folder=tmp_path)), capture_output=True, check=True)
    _, _, output = done.stdout.partition(b"\n")
    assert output.split(b"\0")[:-1] == [word.encode() for word in words]
    assert list(tmp_path.iterdir()) == []


def test_hostile_environment_values_arrive_and_are_in_no_argv(ssh: Ssh, tmp_path: Path) -> None:
    values = {f"V{number}": word for number, word in enumerate(hostile(150))}
    output = ssh.run(("env", "-0"), environment=values, folder=tmp_path).output
    received = dict(line.split("=", 1) for line in output.split("\0") if "=" in line)
    assert {name: received[name] for name in values} == values
    assert list(tmp_path.iterdir()) == []
    process = ssh.start(("sleep", "30"), log=tmp_path / "log", environment={"HF_TOKEN": "canary-4711"})
    deadline = time.monotonic() + 5  # its id is printed just before the shell becomes the program
    while not running("sleep", "30") and time.monotonic() < deadline:
        pass
    argvs = every_argv()
    process.signal(signal.SIGKILL)
    assert b"sleep\x0030" in argvs and b"canary-4711" not in argvs
    assert process.wait(5) == -1


def test_what_no_command_line_carries_is_refused_by_name(ssh: Ssh) -> None:
    for argv, words in (
        (("echo", "a\0b"), r"an argument contains a NUL character.*'a\\x00b'"),
        (("echo", "\ud800"), "half a character"),
        (("echo", "x" * 200_000), r"200\d\d\d bytes is too long for SSH"),
    ):
        with pytest.raises(NodeFailed, match=words):
            ssh.run(argv)
    with pytest.raises(NodeFailed, match="the value of TOKEN contains a NUL"):
        ssh.run(("true",), environment={"TOKEN": "\0"})
    with pytest.raises(NodeFailed, match="'A B' cannot be the name"):
        ssh.run(("true",), environment={"A B": "1"})


def test_a_timeout_ends_the_command_there(ssh: Ssh) -> None:
    started = time.monotonic()
    with pytest.raises(NodeFailed, match=r"no answer within 0\.8 s: sh -c sleep 4801"):
        ssh.run(("sh", "-c", "sleep 4801; true"), timeout_s=0.8)
    assert time.monotonic() - started < 4
    assert not running("sleep", "4801")


def test_a_lost_connection_is_reported_at_once_and_opened_again_by_the_next_call(ssh: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    followed = ssh.start(("sleep", "4804"), log=tmp_path / "log")
    threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in sshd.children()]).start()
    started = time.monotonic()
    with pytest.raises(
        NodeFailed, match=r"lost the connection during this command, which may still be running there: sleep 4805(.|\n)*Next: ssh -p"
    ):
        ssh.run(("sleep", "4805"), timeout_s=30)
    with pytest.raises(NodeFailed, match="lost the connection"):
        followed.wait(5)
    assert time.monotonic() - started < 5
    assert ssh.run(("echo", "again")).output == "again\n"
    followed.signal(signal.SIGKILL)
    for pid in running("sleep", "4805"):
        os.kill(pid, signal.SIGKILL)
    assert not running("sleep", "4804")


def test_a_loss_that_is_noticed_late_ends_no_newer_connection(ssh: Ssh, sshd: Sshd, tmp_path: Path) -> None:
    """Of two commands on a connection that is lost, one is asked again at once; the other one's reader comes to it only then."""
    with ssh.stream(("sh", "-c", "echo first; exec sleep 4806")) as chunks:
        assert next(chunks) == b"first\n"
        for pid in sshd.children():
            os.kill(pid, signal.SIGKILL)
        assert sshd.has_children(0)
        with contextlib.suppress(NodeFailed):  # the loss may be seen while this asks
            ssh.run(("true",))
        followed = ssh.start(("sleep", "4807"), log=tmp_path / "log")
        with pytest.raises(NodeFailed, match="lost the connection"):
            next(chunks)
        assert followed.wait(0.5) is None, "it is on the newer connection, which is well"
    assert ssh.run(("echo", "again")).output == "again\n"
    followed.signal(signal.SIGKILL)
    for pid in running("sleep", "4806"):
        os.kill(pid, signal.SIGKILL)
