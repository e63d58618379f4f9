"""Bad cluster files: what the file alone shows is refused by `plan` (exit code 4 for its nodes, 2 for the rest), what only the nodes show by
`doctor` and `launch` (exit code 4). Always with the node's name, and with nothing started on the nodes that are fine."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.doctor.doctor import Examination
from launcher.plan.plan import Plan
from tests.launcher.fake_docker import FakeDocker
from tests.launcher.fake_nodes import HOSTS, NPU, P4, Said, ascend, examined, found, healthy_nodes, network, p4, tcp
from tests.launcher.sshd import Sshd, free_port, make_key
from trainer.contract import Exit

PlanFor = Callable[..., Plan]
A, B = "{host: 192.0.2.1}", "{host: 192.0.2.2}"
NODES = "cluster.nodes=[{}]"


def nodes(*texts: str) -> tuple[str, ...]:
    return ("cluster=example", NODES.format(", ".join(texts)))


# ----------------------------------------------------------------------------------------------- what the file alone shows

FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "host twice": (nodes(A, A), ("cluster.nodes.host", "listed twice: 192.0.2.1;", "Keep one of them in the cluster file")),
    "host twice, once with the usual port": (nodes(A, "{host: 192.0.2.1, port: 22}"), ("listed twice: 192.0.2.1:22",)),
    "host twice, once in capitals": (nodes("{host: gpu1}", "{host: GPU1.}"), ("listed twice: gpu1:22",)),
    "this machine twice": (nodes("{host: localhost}", "{host: 127.0.0.1}"), ("listed twice: localhost",)),
    "address twice": (nodes("{host: a, address: 192.0.2.1}", "{host: b, address: 192.0.2.1}"), ("listed twice: 192.0.2.1",)),
    "typo in a key": (nodes("{host: gpu1, interfce: eth0}"), ("cluster.nodes.0.interfce of node gpu1", "did you mean 'interface'?")),
    "typo in the key of the host": (nodes("{hots: gpu1}"), ("cluster.nodes.0.hots", "did you mean 'host'?", "cluster.nodes.0.host", "is missing")),
    "typo in a value": (nodes("{host: gpu1, architecture: x86}"), ("cluster.nodes.0.architecture of node gpu1", "did you mean 'x86_64'?")),
    "no list": (("cluster=example", "cluster.nodes=gpu1"), ("cluster.nodes", "must be a list")),
    "a name with a space": (nodes("{host: 'gpu 1'}"), ("cluster.nodes.0.host: 'gpu 1' of node 'gpu 1' is not a valid host",)),
    "a name that is an option": (nodes("{host: '-oProxyCommand=x'}"), ("is not a valid host",)),
    "user before the host": (nodes("{host: ann@gpu1}"), ("cluster.nodes.0.host=gpu1 cluster.nodes.0.user=ann",)),
    "port behind the host": (nodes("{host: 'gpu1:2222'}"), ("cluster.nodes.0.host=gpu1 cluster.nodes.0.port=2222",)),
    "a user that is none": (nodes("{host: gpu1, user: 'a b'}"), ("cluster.nodes.0.user: 'a b' of node 'gpu1' is not a valid user",)),
    "a jump host that is none": (nodes("{host: gpu1, jump: 'door:x'}"), ("cluster.nodes.0.jump: 'door:x' of node 'gpu1'", "user@host:port")),
    "an interface that is none": (nodes("{host: gpu1, interface: 'eth0,eth1'}"), ("'eth0,eth1' of node 'gpu1' is not a valid interface",)),
    "port out of range": (nodes(A, "{host: gpu2, port: 70000}"), ("cluster.nodes.1.port: 70000 of node gpu2 is out of range",)),
    "rendezvous port of the system": (("cluster=example", "cluster.rendezvous_port=80"), ("cluster.rendezvous_port: 80 is out of range",)),
    "loopback as an address": (nodes(A, "{host: gpu2, address: 127.0.0.1}"), ("127.0.0.1 of node gpu2 is the loopback address",)),
    "mixed architectures": (nodes(A, "{host: gpu2, architecture: aarch64}"), ("gpu2 is aarch64, but 192.0.2.1 is x86_64",)),
    "an interface for one alone": (nodes("{host: a, interface: eth0}", "{host: b}"), ("no interface is set for b",)),
    "unequal counts": (
        ("cluster=example", "hardware=ascend910b", "cluster.devices_per_node=2", "cluster.nodes.1.devices=[1,2,3]"),
        ("node 192.0.2.12 lists 3 devices, but 2 are used",),
    ),
    "only spares": (nodes("{host: a, spare: true}"), ("every node is a spare",)),
    "no nodes": (nodes(), ("no node is listed: add them to the cluster file, example.yaml",)),
    "processes on other machines": ((*nodes(A), "cluster.runtime=process"), ("cluster.runtime=docker",)),
    "this machine among others": (nodes(A, "{host: localhost}"), ("this machine is listed as localhost next to 192.0.2.1",)),
    "a folder that means nothing there": ((*nodes(A), "cluster.root=runs"), ("'runs' is a relative path, which is not defined on 192.0.2.1",)),
    "time for nothing": (("cluster=example", "cluster.connect_timeout_s=0"), ("cluster.connect_timeout_s: 0 is out of range",)),
}  # fmt: skip
NOT_OF_A_NODE = ("rendezvous port of the system", "processes on other machines", "a folder that means nothing there", "time for nothing")


@pytest.mark.parametrize("verb", ["plan", "doctor", "launch"])
@pytest.mark.parametrize("name", FILES)
def test_what_the_file_alone_shows(
    name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, words = FILES[name]
    assert main([verb, *overrides]) == (Exit.USAGE if name in NOT_OF_A_NODE else Exit.NODE)
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert name == "processes on other machines" or "cluster=local" not in said, "that is another machine"
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_the_name_of_a_forwarded_port_is_a_node_of_its_own(plan_for: PlanFor) -> None:
    """Two machines behind one address, as virtual machines have them: not this machine, and not twice the same."""
    plan = plan_for(*nodes("{host: 127.0.0.1, port: 2201}", "{host: 127.0.0.1, port: 2202}"))
    assert [node.is_local for node in plan.config.cluster.nodes] == [False, False] and plan.verdict.ok


# ------------------------------------------------------------------------------------------------ what only the nodes show

FIVE = "\n".join(ascend()["devices"].splitlines()[: 6 + 5 * 3]) + "\n"
# words of the plan, answers of the second node, the check that says so, its words
SEEN: dict[str, tuple[tuple[str, ...], Mapping[str, str | Said], str, str]] = {
    "mixed chips": (NPU, {"devices": ascend()["devices"].replace("910B3", "910B1")}, "same_chips", "it has 910B1, the others have 910B3"),
    "another chip": (P4, {"devices": p4()["devices"].replace("Tesla P4", "Tesla T4")}, "chip", "it has Tesla T4"),
    "fewer devices": (NPU, {"devices": FIVE}, "same_count", "it has 5 devices, the others have 8"),
    "too few devices": (NPU, {"devices": FIVE}, "device_count", "5 devices, the plan takes 8"),
    "HCCL's ports in use": (NPU, {"tcp": tcp(60003)}, "hccl_ports", "60003 are in use"),
    "interface lacking": (P4, network("198.51.100.7"), "network", "192.0.2.12 has no interface 'eth0' with address '192.0.2.12'"),
    "another architecture": (P4, {"machine": "aarch64\n"}, "architecture", "it is aarch64, the cluster file says x86_64"),
}


@pytest.mark.parametrize("launching", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_what_only_the_nodes_show(plan_for: PlanFor, name: str, launching: bool) -> None:
    words, answers, check, says = SEEN[name]
    plan = plan_for(*words)
    ways = healthy_nodes(plan, second=answers)
    finding = found(examined(plan, ways, launching=launching), check, HOSTS[1])
    assert finding.level == "error" and says in finding.evidence and finding.fix
    if launching:
        assert {argv[0] for way in ways for argv in way.asked} == {"sh", "date"}, "only looked at"


@pytest.mark.parametrize("launching", [False, True])
def test_the_rendezvous_port_is_in_use_on_the_first_node(plan_for: PlanFor, launching: bool) -> None:
    plan = plan_for(*NPU)
    finding = found(examined(plan, healthy_nodes(plan, first={"tcp": tcp(29500)}), launching=launching), "rendezvous_port", HOSTS[0])
    assert finding.level == "error" and "29500 is in use" in finding.evidence and finding.fix == "cluster.rendezvous_port=29501"


# ---------------------------------------------------------------------------------------------------------- over real sshds


class Lab:
    """Two sshds on loopback: `good`, which lets this user in, and `bad`, whose line of the cluster file each test writes."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.keys = self.home / ".ssh"
        self.keys.mkdir(parents=True)
        self.key = make_key(self.keys / "id_ed25519")
        self.docker = FakeDocker(folder / "bin")
        path = f"SetEnv PATH={self.docker.folder}:/usr/bin:/bin"
        self.good, self.bad = Sshd(folder / "good", self.key, path), Sshd(folder / "bad", make_key(folder / "other"), path)
        self.remember(self.good, self.bad)
        self.root = folder / "root"
        self.silent: socket.socket | None = None
        self.name("good", self.good.port)

    def name(self, host: str, port: int) -> None:
        with (self.keys / "config").open("a") as config:
            config.write(f"Host {host}\n  HostName 127.0.0.1\n  Port {port}\n")

    def remember(self, *servers: Sshd) -> None:
        (self.keys / "known_hosts").write_text("".join(server.known_line() for server in servers))

    def words(self, bad: str) -> tuple[str, ...]:
        return (
            "cluster.runtime=docker",
            f"cluster.root={self.root}",
            "cluster.connect_timeout_s=2",
            NODES.format(f"{{host: good}}, {bad}"),
        )


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    monkeypatch.setenv("HOME", str(lab.home))
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield lab
    for server in (lab.good, lab.bad):
        server.end()
    if lab.silent:
        lab.silent.close()


def no_key(lab: Lab) -> str:
    lab.name("bad", lab.bad.port)
    return "{host: bad}"


def wrong_user(lab: Lab) -> str:
    lab.name("bad", lab.good.port)
    return "{host: bad, user: stranger}"


def closed_port(lab: Lab) -> str:
    lab.name("bad", free_port())
    return "{host: bad}"


def says_nothing(lab: Lab) -> str:
    """Takes connections as something else than sshd does, which speaks first."""
    lab.silent = socket.create_server(("127.0.0.1", 0))
    lab.name("bad", lab.silent.getsockname()[1])
    return "{host: bad}"


def typo_in_the_host(lab: Lab) -> str:
    return "{host: bad.invalid}"


def unknown_host_key(lab: Lab) -> str:
    lab.remember(lab.good)
    return no_key(lab)


def unknown_jump_host(lab: Lab) -> str:
    return "{host: bad, jump: door.invalid}"


@pytest.mark.parametrize("verb", ["doctor", "launch"])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (no_key, ("bad (root@127.0.0.1", "the login of user 'root' was refused", "id_ed25519: refused", "ssh-copy-id")),
        (wrong_user, ("bad (stranger@127.0.0.1", "the login of user 'stranger' was refused", "nodes[].user")),
        (closed_port, ("bad (root@127.0.0.1", "refused the connection")),
        (says_nothing, ("bad (root@127.0.0.1", "did not answer with SSH", "within 2.0 s")),
        (typo_in_the_host, ("root@bad.invalid:22", "the name 'bad.invalid' could not be resolved")),
        (unknown_host_key, ("bad (root@127.0.0.1", "its host key is unknown", "ssh-keyscan")),
        (unknown_jump_host, ("door.invalid", "could not be resolved")),
    ],
)
def test_a_node_that_refuses_the_login(
    lab: Lab, verb: str, line: Callable[[Lab], str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *lab.words(line(lab))]) == Exit.NODE
    out, err = capsys.readouterr()
    for word in words:
        assert word in out + err
    assert "Accepted" in (lab.good.folder / "log").read_text(), "the good node was looked at"
    assert {call[0] for call in lab.docker.commands()} <= {"info", "--version", "ps", "image"}, "and nothing was started there"
    assert not lab.root.exists() and not (Path.cwd() / "runs").exists()
    assert os.environ["HOME"] == str(lab.home), "the real ~/.ssh is neither read nor written"


@pytest.mark.parametrize(
    "words", [(), ("model=qwen2_5_vl_32b", "stage=lora"), ("stage.global_batch=7",), ("model=qwen2_5_vl_7b", "stage=evaluate")]
)
def test_the_doctor_asks_nodes_that_cannot_share_the_batch(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """64 samples cannot be divided among 24 ranks: a matter of the run, and not of its nodes."""
    asked: list[Plan] = []

    def examine(plan: Plan, *_: object, **__: object) -> Examination:
        asked.append(plan)
        return Examination(findings=(), facts={}, choices=())

    monkeypatch.setattr("launcher.run.session.examine_nodes", examine)
    three = nodes(*(f"{{host: gpu{number}}}" for number in range(3)))
    assert main(["doctor", *three, "hardware=ascend910b", "cluster.delivery.accept_licence=true", *words]) == Exit.OK
    (plan,) = asked
    assert plan.spec.device.world_size == 24
    assert len(plan.config.cluster.working) == 3 and plan.spec.batch.global_batch % plan.spec.device.world_size == 0
