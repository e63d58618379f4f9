"""The questions: its script on this machine, whatever a path is called, and its answers as facts."""

import os
import time
from math import inf
from pathlib import Path

import pytest

from launcher.doctor.network import Interface
from launcher.doctor.node_facts import Clock, Container
from launcher.doctor.parse import NOT_ASKED, PODMAN, CommandOutput, read_clock, read_docker, read_interfaces, read_ports
from launcher.doctor.questions import DEVICE_QUESTIONS, DOCKER_QUESTIONS, QUESTIONS, NodeQuery, ask_node, questions
from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.transport import Local
from tests.launcher.fake_nodes import IMAGE_ID, NOW_S, FakeNode, Said, ascend, healthy, network, p4, tcp
from tests.launcher.sshd import Sshd, access_in, make_key, node_at

DOCKER = NodeQuery(accelerator="cpu", root="/srv/omnilaunch", image="omnilaunch:cpu-1")


def ask(bed: FakeNode, inquiry: NodeQuery = DOCKER):  # type: ignore[no-untyped-def]
    return ask_node(bed, inquiry, now=lambda: NOW_S)  # type: ignore[arg-type]


def test_this_machine(tmp_path: Path) -> None:
    """The whole script by the shell that is here, without Docker."""
    hostile = tmp_path / "a 'b' $(touch x) \n =omnilaunch= machine"
    hostile.mkdir()
    (hostile / "data.json").write_text("[]")
    wanted = NodeQuery(
        accelerator="cuda", root=str(tmp_path / "not" / "yet"), contents=(str(hostile), str(hostile / "data.json"), "/no such")
    )
    facts = ask_node(Local(os.environ), wanted, now=time.time)
    assert facts.machine == os.uname().machine and facts.hostname == os.uname().nodename
    assert facts.memory_total_gib > facts.memory_available_gib > 0.01
    assert facts.root and facts.root.path == str(tmp_path) and facts.root.writable and facts.root.free_gib > 0
    assert facts.ephemeral_ports[1] > facts.ephemeral_ports[0] > 0 and facts.docker is None
    assert -1 < facts.clock.behind_s <= 0 <= facts.clock.ahead_s < 1
    folder, file, missing = (facts.contents[path] for path in wanted.contents)
    assert (folder.kind, file.kind, missing.digest) == ("folder", "file", "") and "No such file" in missing.error
    assert file.digest == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # sha256 of []
    assert not list(Path.cwd().glob("x")) and not list(tmp_path.glob("x"))
    (hostile / "more").write_text("")
    assert ask_node(Local(os.environ), wanted, now=time.time).contents[str(hostile)].digest != folder.digest


def test_a_folder_is_the_same_whatever_was_in_it_once(tmp_path: Path) -> None:
    """Its own size is the file system's: on ext4 one that held thousands of files stays large."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, count in ((one, 0), (other, 3000)):
        (folder / "images").mkdir(parents=True)
        for number in range(count):
            (folder / "images" / f"{number:0100}").touch()
        for path in (folder / "images").iterdir():
            path.unlink()
        (folder / "images" / "img 1.jpg").write_text("x")
    known = tmp_path / "data"  # a link, as a data folder often is

    def digest(folder: Path) -> str:
        known.unlink(missing_ok=True)
        known.symlink_to(folder)
        content = ask_node(Local(os.environ), NodeQuery(accelerator="cpu", root="/", contents=(str(known),)), now=time.time).contents[
            str(known)
        ]
        assert content.kind == "folder" and content.digest
        return content.digest

    assert digest(one) == digest(other)
    (other / "images" / "img 1.jpg").rename(other / "images" / "img 2.jpg")
    assert digest(one) != digest(other), "a name is all of its words"
    (other / "images" / "img 2.jpg").rename(other / "images" / "img 1.jpg")
    (other / "images" / "img 1.jpg").write_text("xy")
    assert digest(one) != digest(other)


def test_over_ssh(tmp_path: Path) -> None:
    """The same script through sshd and the login shell of this user."""
    key = make_key(tmp_path / "id_ed25519")
    server = Sshd(tmp_path / "node", key)
    try:
        client = ConnectionPool(access_in(tmp_path / "access", key, server.known_line()))
        facts = ask_node(
            Ssh(node_at(server), client), NodeQuery(accelerator="cpu", root="/", contents=(f"{tmp_path}/it's",)), now=time.time
        )
        client.close()
    finally:
        server.end()
    assert facts.machine == os.uname().machine and facts.network.reached_at == "127.0.0.1" and facts.shell.startswith("/")
    assert "No such file" in facts.contents[f"{tmp_path}/it's"].error


def test_this_machines_network_is_what_the_kernel_uses() -> None:
    """The address that a packet would leave with is among those read, on an interface with a route there."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        try:
            probe_socket.connect(("192.0.2.200", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no route out of it")
        own = probe_socket.getsockname()[0]
    facts = ask_node(Local(os.environ), NodeQuery(accelerator="cpu", root="/"), now=time.time)
    assert own in {each.address for each in facts.network.interfaces}


def test_a_port_that_somebody_listens_on_is_seen() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port in ask_node(Local(os.environ), NodeQuery(accelerator="cpu", root="/"), now=time.time).ports
    assert port not in ask_node(Local(os.environ), NodeQuery(accelerator="cpu", root="/"), now=time.time).ports


def test_one_script_and_one_clock() -> None:
    bed = FakeNode("a", healthy())
    ask(bed)
    assert [argv[0] for argv in bed.asked] == ["sh", "date"]


def test_what_is_asked() -> None:
    assert list(questions(NodeQuery(accelerator="cpu", root="/r"))) == [*QUESTIONS, "root"]
    assert set(questions(NodeQuery(accelerator="npu", root="/r", image="i", contents=("/a",)))) == (
        set(QUESTIONS) | set(DOCKER_QUESTIONS) | set(DEVICE_QUESTIONS["npu"]) | {"root", "image", "content0"}
    )


def test_facts_of_a_healthy_node() -> None:
    facts = ask(FakeNode("a", healthy() | {"containers": "omnilaunch-x-n0\trunning\tx\n"}))
    assert (facts.machine, facts.user, facts.shell, facts.image_id) == ("x86_64", "trainer", "/bin/bash", IMAGE_ID)
    assert facts.docker and (facts.docker.engine, facts.docker.storage_driver, facts.docker.runtimes) == (
        "27.5.1",
        "overlay2",
        ("ascend", "nvidia", "runc"),
    )
    assert facts.containers == (Container(name="omnilaunch-x-n0", state="running", run_id="x"),)
    assert facts.network.reached_at == "192.0.2.11" and facts.reserved_ports == ((60000, 60031),)
    assert facts.memlock_kib is None and facts.root and facts.root.inodes == 250_000_000


def test_the_clock_is_known_within_the_time_that_asking_took() -> None:
    times = iter((100.0, 100.5))
    facts = ask_node(FakeNode("a", healthy(), clock_s=103.0), DOCKER, now=lambda: next(times))  # type: ignore[arg-type]
    assert facts.clock == Clock(behind_s=2.5, ahead_s=3.0)


def test_a_clock_without_fractions_or_without_an_answer() -> None:
    assert read_clock("103.%N\n", sent_s=100.0, received_s=100.5) == Clock(behind_s=2.5, ahead_s=4.0)
    assert read_clock("", sent_s=100.0, received_s=100.5) == Clock(behind_s=-inf, ahead_s=inf)


def test_devices_and_driver() -> None:
    npu = ask(FakeNode("a", healthy() | ascend()), NodeQuery(accelerator="npu", root="/r"))
    assert len(npu.devices) == 8 and npu.driver == "25.2.0" and "/dev/davinci7" in npu.files
    banner = ask(FakeNode("a", healthy() | ascend() | {"driver": (1, "", "No such file")}), NodeQuery(accelerator="npu", root="/r"))
    assert banner.driver == "25.2.0"
    cuda = ask(FakeNode("a", healthy() | p4()), NodeQuery(accelerator="cuda", root="/r"))
    assert [device.name for device in cuda.devices] == ["Tesla P4"] and cuda.driver == "580.173.02"


NO_DEVICES: dict[str, tuple[Said, str]] = {
    "missing": ((127, "", "timeout: failed to run command 'nvidia-smi': No such file or directory"), "not installed"),
    "broken": ((9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""), "kernel module is not loaded"),
    "hangs": ((124, "", ""), "did not end in time"),
    "unreadable": ((0, "0, something else\n", ""), "something else"),
}


@pytest.mark.parametrize("case", NO_DEVICES)
def test_why_there_are_no_devices(case: str) -> None:
    said, why = NO_DEVICES[case]
    facts = ask(FakeNode("a", healthy() | p4() | {"devices": said}), NodeQuery(accelerator="cuda", root="/r"))
    assert facts.devices == () and [why in fault.described for fault in facts.device_faults] == [True]


def test_docker_that_may_not_be_used() -> None:
    denied: Said = (1, '{"ServerErrors":["Got permission denied while trying to connect"],"ServerVersion":""}\n', "")
    facts = ask(FakeNode("a", healthy() | {"docker": denied, "docker_room": (1, "", "")}))
    assert facts.docker and facts.docker.engine == "" and "permission denied" in facts.docker.error and facts.docker.space is None
    missing: Said = (127, "", "timeout: failed to run command 'docker': No such file or directory")
    facts = ask(FakeNode("a", healthy() | dict.fromkeys(DOCKER_QUESTIONS, missing)))
    assert facts.docker and facts.docker.client == "" and "No such file" in facts.docker.error


def test_podman_behind_the_name_of_docker_is_called_so() -> None:
    info = CommandOutput(
        code=0, output='{"host": {"arch": "amd64"}, "store": {}, "version": {"Version": "4.9.3"}}', errors="Emulate Docker CLI"
    )
    client = CommandOutput(code=0, output="podman version 4.9.3", errors="")
    docker = read_docker({"docker": info, "docker_client": client, "docker_room": NOT_ASKED, "toolkit": NOT_ASKED})
    assert (docker.engine, docker.error) == ("", PODMAN)


def test_a_shell_that_runs_nothing_is_the_nodes_fault() -> None:
    with pytest.raises(NodeFailed, match="did not run the doctor's script"):
        ask(FakeNode("a", {}))
    with pytest.raises(NodeFailed, match="did not run the doctor's script"):
        ask(FakeNode("a", dict.fromkeys(healthy(), (127, "", "sh: 1: timeout: not found"))))


def test_interfaces_with_state_and_speed() -> None:
    texts = network("192.0.2.11")
    assert tuple(read_interfaces(texts["addresses"], texts["routes"], texts["links"])) == (
        Interface(name="docker0", address="172.17.0.1", prefix=16, up=False, mtu=1500),
        Interface(name="eth0", address="192.0.2.11", prefix=24, mtu=9000, speed_mb_s=100_000),
    )


def test_ports_that_are_listened_on() -> None:
    assert read_ports(tcp(29500)) == (22, 29500)
    assert read_ports("sl\n 0: 00000000000000000000000000000000:EA60 00000000000000000000000000000000:0000 0A 0\n") == (60000,)
