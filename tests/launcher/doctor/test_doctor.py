"""Every check of the doctor, on healthy nodes and on a node with the fault that it looks for: recorded texts in, findings out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest

from launcher.doctor.doctor import CROSS_NODE_CHECKS, LIVE_CHECKS, NODE_CHECKS
from launcher.doctor.findings import EVERY_NODE, has_errors
from launcher.doctor.smi import NVIDIA_FIELDS
from launcher.errors import NodeFailed
from tests.launcher.fake_nodes import (
    CPU,
    DATA,
    DENIED,
    H200,
    HOSTS,
    LOCAL,
    NO_DOCKER,
    NPU,
    NPU_RUNTIME,
    OFFLOAD,
    P4,
    PULL,
    STOPPED,
    FakeNode,
    PlanFor,
    Said,
    ascend,
    df,
    docker_info,
    examined,
    found,
    healthy,
    healthy_nodes,
    network,
    p4,
    room,
    tcp,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan_for(plan_for: PlanFor) -> PlanFor:
    """Composing a plan takes longer than examining it."""
    return cache(plan_for)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of one node of a plan, the second unless `place` is 0, and parts of the finding: evidence, fix, level."""

    words: tuple[str, ...] = CPU
    answers: Mapping[str, str | Said]
    says: str
    fix: str = ""
    level: str = "error"
    place: int = 1


def npu_table(old: str, new: str) -> dict[str, str | Said]:
    return {"devices": ascend()["devices"].replace(old, new)}


def gpu(
    mig: str = "Disabled",
    mode: str = "Default",
    retired: str = "No",
    remapped: str = "No",
    failure: str = "No",
    fabric: str = "Completed, Success",
) -> dict[str, str | Said]:
    """The answer of a driver that knows all fields."""
    states = ", ".join((mig, mode, retired, remapped, failure, fabric))
    return {"devices": f"fields: {','.join(NVIDIA_FIELDS)}\n{p4()['devices'].strip()}, {states}\n"}


FIVE = "\n".join(ascend()["devices"].splitlines()[: 6 + 5 * 3]) + "\n"
BUSY = ascend()["devices"].replace("| No running processes found in NPU 2 |", "| 2       0  | 1333928  |  python3  | 37709  |")

NODE_FAULTS: dict[str, tuple[Fault, ...]] = {
    "ssh_config": (),  # not a fault of a node: what the launcher does not honour
    "shell": (),  # commands are run by /bin/sh where the login shell is another one
    "architecture": (
        Fault(answers={"machine": "aarch64\n"}, says="it is aarch64, the cluster file says x86_64", fix="architecture: aarch64"),
    ),
    "kernel": (Fault(answers={"kernel": "4.18.0-553.el8\n"}, says="older than 5.5", level="warning"),),
    "memory": (
        Fault(
            words=OFFLOAD,
            answers={"memory": "MemTotal: 12000 kB\nMemAvailable: 11000 kB\n"},
            says="needed (offloaded states",
            fix="strategy.offload",
        ),
        Fault(
            words=OFFLOAD, answers={"memory": "MemTotal: 4000000 kB\nMemAvailable: 2000 kB\n"}, says="needed", fix="ps -eo", level="warning"
        ),
    ),
    "shm": (
        Fault(
            answers={"memory": "MemTotal: 8000000 kB\nMemAvailable: 8000000 kB\n"},
            says="cluster.shm_size=16g of 7.6 GiB",
            fix="cluster.shm_size=3g",
        ),
        Fault(words=LOCAL, answers={"shm": df(64_000)}, says="0.1 GiB free", fix="mount -o remount", level="warning", place=0),
    ),
    "memlock": (
        Fault(
            words=(*NPU, "cluster.ulimits={memlock: '65536'}"),
            answers={},
            says="limited (65536)",
            fix="cluster.ulimits.memlock=-1",
            level="warning",
        ),
    ),
    "room": (
        Fault(answers={"root": room(free_kib=4_000)}, says="0.0 GiB free at /srv/omnilaunch", fix="cluster.root=FOLDER"),
        Fault(words=LOCAL, answers={"root": room(free_kib=5_000)}, says="free at /srv/omnilaunch", fix="cluster.root=FOLDER", place=0),
    ),
    "writable": (
        Fault(
            answers={"root": room("/srv", "no")}, says="trainer may not write to /srv,", fix="sudo install -d -o trainer /srv/omnilaunch"
        ),
    ),
    "inodes": (Fault(answers={"root": room(inodes="200")}, says="200 free inodes", fix="du --inodes", level="warning"),),
    "contents": (
        Fault(
            words=DATA,
            answers={"content1": (1, "file\n", "sh: cannot open /d/eval.json: No such file")},
            says="/d/eval.json: sh: cannot",
            fix="cluster.sync=[/d/eval.json]",
        ),
    ),
    "leftovers": (
        Fault(answers={"containers": "old-n0\texited\tother\n"}, says="old-n0 (exited)", fix="docker rm old-n0", level="warning"),
        Fault(answers={"containers": "sib-n0\trunning\tsib\n"}, says="sib-n0 (running)", fix="omnilaunch stop sib", level="warning"),
    ),
    "docker_client": (Fault(answers={"docker": NO_DOCKER, "docker_client": NO_DOCKER}, says="no docker command", fix="install it"),),
    "docker_engine": (
        Fault(answers={"docker": DENIED}, says="trainer may not use Docker", fix="sudo usermod -aG docker trainer"),
        Fault(answers={"docker": STOPPED}, says="Cannot connect", fix="sudo systemctl enable --now docker"),
        Fault(answers={"docker": (124, "", "")}, says="no answer in time", fix="systemctl"),
    ),
    "docker_version": (Fault(answers={"docker": docker_info("19.03.15")}, says="19.03.15 is older than 20.10"),),
    "docker_storage": (Fault(answers={"docker": docker_info(storage="vfs")}, says="vfs", fix="overlay2", level="warning"),),
    "docker_room": (
        Fault(answers={"docker_room": df(1_000_000)}, says="1.0 GiB free", fix="docker system df"),
        Fault(
            words=P4,
            answers={"docker_room": df(9_000_000), "image": (1, "", "No such image")},
            says="the image takes about 25",
            level="warning",
        ),
    ),
    "toolkit": (
        Fault(words=P4, answers={"toolkit": (127, "", ""), "docker": docker_info(runtimes='"runc":{}')}, says="--gpus", fix="nvidia-ctk"),
    ),
    "image": (),  # never a fault: launch brings a missing image
    "rendezvous_port": (
        Fault(answers={"tcp": tcp(29500, 29501)}, says="port 29500 is in use", fix="cluster.rendezvous_port=29502", place=0),
    ),
    "hccl_ports": (Fault(words=NPU, answers={"tcp": tcp(60003, 60031)}, says="60003, 60031 are in use", fix="HCCL_IF_BASE_PORT"),),
    "hccl_reserved": (
        Fault(words=NPU, answers={"ephemeral": "32768\t60999\n\n"}, says="32768-60999", fix="sudo sysctl -w", level="warning"),
    ),
    "device_tool": (
        Fault(
            words=NPU,
            answers={"devices": (1, "", "dcmi model initialized failed, ret is -8005")},
            says="npu-smi info: the driver is there, but it does not answer this user",
            fix="sudo usermod -aG HwHiAiUser trainer",
        ),
        Fault(
            words=P4,
            answers={"devices": (9, "NVIDIA-SMI has failed\n", "")},
            says="its kernel module is not loaded",
            fix="sudo modprobe nvidia",
        ),
        Fault(words=P4, answers={"devices": (77, "cannot\n", "")}, says="nvidia-smi: cannot", fix="nvidia-smi must work for trainer"),
        Fault(
            words=P4,
            answers={"devices": (14, p4()["devices"] + "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n", "")},
            says="the infoROM of GPU 0000:3B:00.0 is corrupted",
            fix="nothing for this run",
            level="warning",
        ),
        Fault(words=P4, answers={"devices": (6, "No devices were found\n", "")}, says="it could start no GPU", fix="dmesg"),
    ),
    "device_count": (
        Fault(words=NPU, answers={"devices": FIVE}, says="5 devices, the plan takes 8", fix="cluster.devices_per_node=4"),
        Fault(
            words=P4,
            answers={"devices": p4()["devices"].replace("0, Tesla", "1, Tesla")},
            says="no device 0; the node has 1",
            fix="devices: [1]",
        ),
    ),
    "chip": (
        Fault(words=NPU, answers=npu_table("910B3", "910A "), says="it has 910A; hardware=ascend910b is 910B1", fix="options hardware"),
        Fault(words=P4, answers={"devices": p4()["devices"].replace("Tesla P4", "Tesla T4")}, says="it has Tesla T4"),
    ),
    "device_memory": (
        Fault(
            words=NPU,
            answers=npu_table("65536", "32768"),
            says="32.0 GiB, the plan assumes 64",
            fix="hardware.memory_gib=32",
            level="warning",
        ),
    ),
    "fit": (
        Fault(
            words=(*NPU, "model=llava_1_5_7b", "tune=null", "strategy=zero2"),
            answers=npu_table("65536", "32768"),
            says="GiB, 28.7 of 32.0 are free",
            fix="hardware.memory_gib=28.6 hardware.host_memory_gib=476",
        ),
    ),
    "device_health": (
        Fault(
            words=NPU,
            answers=npu_table("| 3     910B3               | OK ", "| 3     910B3               | Alarm "),
            says="device 3: Alarm",
            fix="npu-smi",
        ),
        Fault(
            words=P4,
            answers={"devices": p4()["devices"].replace("7680, 0", "[Unknown Error], 0")},
            says="device 0: Unknown Error",
            fix="gpu-reset",
        ),
    ),
    "device_idle": (
        Fault(words=NPU, answers={"devices": BUSY}, says="device 2: process 1333928 python3", fix="kill 1333928"),
        Fault(words=P4, answers={"apps": "GPU-7af15080-238c-fd1d-66da-4f8984053664, 77, python, 900\n"}, says="process 77", fix="kill 77"),
        Fault(words=NPU, answers=npu_table("3400 / 65536", "41052/ 65536"), says="device 2: 40.1 GiB", fix="docker ps", level="warning"),
    ),
    "mig": (Fault(words=P4, answers=gpu("Enabled"), says="MIG is on: device 0", fix="nvidia-smi -i 0 -mig 0"),),
    "compute_mode": (
        Fault(words=P4, answers=gpu(mode="Prohibited"), says="Prohibited (no process may use it)", fix="nvidia-smi -i 0 -c DEFAULT"),
        Fault(words=P4, answers=gpu(mode="Exclusive_Process"), says="one process may use it", fix="-c DEFAULT", level="warning"),
    ),
    "memory_repair": (
        Fault(words=P4, answers=gpu(retired="Yes"), says="bad memory of device 0 waits", fix="--gpu-reset -i 0", level="warning"),
        Fault(words=P4, answers=gpu(remapped="1"), says="bad memory of device 0 waits", fix="--gpu-reset -i 0", level="warning"),
        Fault(words=P4, answers=gpu(failure="Yes"), says="could not be replaced", fix="vendor"),
    ),
    "fabric": (
        Fault(
            words=P4, answers=gpu(fabric="In Progress, N/A"), says="device 0: In Progress", fix="nvidia-fabricmanager; its version must be"
        ),
    ),
    "driver": (
        Fault(
            words=NPU,
            answers={"driver": "Version=25.0.rc1.1\n"},
            says="older than 25.2, the oldest for Huawei Ascend 910B",
            fix="upgrade the driver to 25.2 or newer",
        ),
        Fault(
            words=P4,
            answers={"devices": p4()["devices"].replace("580.173.02", "590.44.01")},
            says="newer than 580, the newest for NVIDIA Tesla P4",
        ),
        Fault(words=P4, answers={"devices": p4()["devices"].replace("580.173.02", "470.256.02")}, says="older than 525"),
    ),
    "device_files": (
        Fault(words=NPU, answers={"files": ascend()["files"].replace("/dev/davinci6\n", "")}, says="missing: /dev/davinci6"),
        Fault(
            words=P4, answers={"files": "/dev/nvidia0\n/dev/nvidiactl\n"}, says="/dev/nvidia-uvm", fix="nvidia-modprobe", level="warning"
        ),
    ),
    "device_access": (
        Fault(
            words=NPU,
            answers={"modes": ascend()["modes"].replace("/dev/davinci6 666 0 1000", "/dev/davinci6 660 0 1900")},
            says="user 1000:1000 of the container may not use /dev/davinci6 (660, owner 0:1900)",
            fix="cluster.user=1000:1900",
        ),
        Fault(words=NPU, answers={"modes": ascend()["modes"].replace("666 0 1000", "600 0 0")}, says="and 8 more", fix="--install-for-all"),
    ),
    "driver_mounts": (
        Fault(words=NPU, answers={"files": ascend()["files"].replace("/etc/hccn.conf\n", "")}, says="missing: /etc/hccn.conf"),
    ),
    "ascend_runtime": (
        Fault(
            words=NPU_RUNTIME,
            answers={"docker": docker_info(runtimes='"runc":{}')},
            says="the engine has no runtime 'ascend', only runc",
            fix="cluster.ascend_runtime=false",
        ),
    ),
}
# A second node that is healthy by itself and differs from the first.
CROSS_NODE_FAULTS: dict[str, tuple[Fault, ...]] = {
    "distinct": (Fault(answers=healthy(HOSTS[0]), says="the same machine as 192.0.2.11", fix="name each machine once"),),
    "same_architecture": (Fault(answers={"machine": "aarch64\n"}, says="it is aarch64, the others are x86_64"),),
    "same_chips": (Fault(words=NPU, answers=npu_table("910B3", "910B1"), says="it has 910B1, the others have 910B3"),),
    "same_count": (
        Fault(words=NPU, answers={"devices": FIVE}, says="it has 5 devices, the others have 8", fix="cluster.devices_per_node=4"),
        Fault(words=(*NPU, "cluster.devices_per_node=4"), answers={"devices": FIVE}, says="the run takes 4 of each", level="warning"),
    ),
    "same_driver": (
        Fault(words=NPU, answers={"driver": "Version=25.5.1\n"}, says="driver 25.5.1, the others have 25.2.0", level="warning"),
    ),
    "network": (
        Fault(answers=network("198.51.100.7"), says="192.0.2.12 has no interface 'eth0' with address '192.0.2.12'", fix="interface: eth0"),
    ),
    "same_mtu": (
        Fault(answers={"links": "eth0 up 1500 100000\n"}, says="MTU 1500 on eth0, the others have 9000", fix="mtu 9000", level="warning"),
    ),
    "same_contents": (Fault(words=DATA, answers={"content2": "folder\ndd  -\n"}, says="/d/images is dd, on the others cc", fix="rsync"),),
    "same_image": (
        Fault(answers={"image": '{"Id": "sha256:cdcd"}\n'}, says="has the id sha256:cdcd", fix="docker image rm", level="warning"),
        Fault(words=PULL, answers={"image": '{"Id": "sha256:cdcd"}\n'}, says="has the id sha256:cdcd", fix="docker image rm"),
    ),
}


def test_the_number_of_checks() -> None:
    assert (len(NODE_CHECKS), len(CROSS_NODE_CHECKS), len(LIVE_CHECKS)) == (38, 10, 3)
    assert set(NODE_FAULTS) == set(NODE_CHECKS) and set(CROSS_NODE_FAULTS) | {"clocks"} == set(CROSS_NODE_CHECKS)
    assert sum(check.launch for check in (*NODE_CHECKS.values(), *CROSS_NODE_CHECKS.values())) == 38


@pytest.mark.parametrize("words", [CPU, NPU, NPU_RUNTIME, P4, LOCAL, OFFLOAD, DATA, PULL], ids=lambda words: " ".join(words[:2]))
def test_healthy_nodes(plan_for: PlanFor, words: tuple[str, ...]) -> None:
    plan = plan_for(*words)
    findings = examined(plan, healthy_nodes(plan)).findings
    assert [finding for finding in findings if finding.level != "ok"] == []


def test_a_gpu_without_a_fault_in_any_field(plan_for: PlanFor) -> None:
    plan = plan_for(*P4)
    for states in (gpu(), gpu(mig="[N/A]", retired="[N/A]", remapped="[N/A]", failure="[N/A]", fabric="[N/A], [N/A]")):
        findings = examined(plan, healthy_nodes(plan, first=states, second=states)).findings
        assert [finding for finding in findings if finding.level != "ok"] == []


def test_a_driver_that_only_another_stack_takes(plan_for: PlanFor) -> None:
    """That stack is offered where the plan can have it; a driver that is too old for all of them is to be upgraded."""
    plan = plan_for("cluster=example", "hardware=h200", "hardware.stack=cuda130")
    for driver, fix in {
        "570.133.20": "upgrade the driver to 580 or newer; or hardware.stack=cuda126",
        "470.10": "upgrade the driver to 580 or newer",
    }.items():
        answers = {"devices": H200["devices"].replace("580.159.03", driver)}
        assert found(examined(plan, healthy_nodes(plan, first=answers)), "driver", HOSTS[0]).fix.split(", which")[0] == fix


def test_every_check_passes_on_healthy_nodes(plan_for: PlanFor) -> None:
    plans = [plan_for(*words) for words in (CPU, NPU_RUNTIME, P4, DATA)]
    names = {finding.name for plan in plans for finding in examined(plan, healthy_nodes(plan)).findings if finding.level == "ok"}
    assert names == {*NODE_CHECKS, *CROSS_NODE_CHECKS, *LIVE_CHECKS, "reach"}


FAULTS = [(name, fault) for table in (NODE_FAULTS, CROSS_NODE_FAULTS) for name, faults in table.items() for fault in faults]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}-{fault.says[:30]}" for name, fault in FAULTS])
def test_each_check_finds_its_fault(plan_for: PlanFor, name: str, fault: Fault) -> None:
    plan = plan_for(*fault.words)
    ways = healthy_nodes(plan, **{("first", "second")[fault.place]: fault.answers})
    host = plan.config.cluster.nodes[fault.place].host
    finding = found(examined(plan, ways), name, host)
    assert finding.level == fault.level and fault.says in finding.evidence and fault.fix in finding.fix and finding.fix
    others = {each.level for each in examined(plan, ways).findings if each.name == name and each.host not in (host, EVERY_NODE)}
    assert others <= {"ok"} or not fault.answers, "a fault of the plan itself is found on every node"


def test_a_missing_image_is_brought_and_what_needs_it_is_not_checked(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    examination = examined(plan, healthy_nodes(plan, second={"image": (1, "", "Error: No such image")}))
    assert "launch builds and sends it" in found(examination, "image", HOSTS[1]).evidence
    assert found(examination, "image", HOSTS[1]).level == "ok" and not has_errors(examination.findings)
    assert found(examination, "connections", EVERY_NODE).level == "unchecked"
    assert found(examination, "container", HOSTS[1]).level == "unchecked" and found(examination, "container", HOSTS[0]).level == "ok"


@pytest.mark.parametrize(("apart_s", "level"), [(0.5, ""), (5.0, "warning"), (3600.0, "error")])
def test_clocks(plan_for: PlanFor, apart_s: float, level: str) -> None:
    plan = plan_for(*CPU)
    ways = healthy_nodes(plan)
    ways[1].clock_s += apart_s
    levels = {finding.host: finding.level for finding in examined(plan, ways).findings if finding.name == "clocks"}
    assert levels == (dict.fromkeys(HOSTS, level) if level else {EVERY_NODE: "ok"})


# ----------------------------------------------------------------------------------------------------- the whole cluster


def test_a_node_that_cannot_be_reached(plan_for: PlanFor) -> None:
    """One error; its own checks and those that need two nodes are unchecked, the other node is checked."""
    plan = plan_for(*CPU)
    ways = [healthy_nodes(plan)[0], NodeFailed("trainer@192.0.2.12:22: no answer within 10 s\n  Next: ssh trainer@192.0.2.12 true")]
    examination = examined(plan, ways)
    theirs = [finding for finding in examination.findings if finding.host == HOSTS[1]]
    assert [(finding.name, finding.fix) for finding in theirs if finding.level == "error"] == [("reach", "ssh trainer@192.0.2.12 true")]
    assert {finding.level for finding in theirs if finding.name != "reach"} == {"unchecked"} and len(theirs) > 10
    assert {finding.level for finding in examination.findings if finding.host == EVERY_NODE} == {"unchecked"}
    assert {finding.level for finding in examination.findings if finding.host == HOSTS[0]} == {"ok"}
    assert examination.choices == () and set(examination.facts) == {HOSTS[0]}


def test_all_lines_of_a_failure_are_evidence_but_the_next_step(plan_for: PlanFor) -> None:
    plan = plan_for("cluster=example", "hardware=cpu", "cluster.nodes.1={host: gpu2, user: me, port: 2200, jump: gate}")
    tried = "gpu2: the login of user 'me' was refused. Tried:\n  id_rsa: refused\n  agent key x: refused"
    for text, fix in {f"{tried}\n  Next: ssh-copy-id gpu2": "ssh-copy-id gpu2", tried: "ssh -J gate -p 2200 me@gpu2 true"}.items():
        finding = found(examined(plan, [healthy_nodes(plan)[0], NodeFailed(text)]), "reach", "gpu2")
        assert (finding.evidence, finding.fix) == (tried, fix)


def test_a_launch_waits_for_less_and_tries_nothing(plan_for: PlanFor) -> None:
    plan = plan_for(*DATA)
    ways = healthy_nodes(plan)
    names = {finding.name for finding in examined(plan, ways, launching=True).findings}
    assert not names & {*LIVE_CHECKS, "contents", "same_contents", "kernel"} and {"room", "docker_engine", "clocks"} <= names
    assert all(argv[0] in ("sh", "date") for argv in ways[0].asked) and "/d/train.json" not in str(ways[0].asked)


def test_a_spare_is_examined_and_takes_no_part_in_the_network(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    cluster = plan.config.cluster
    spare = replace(cluster.nodes[1], host="spare", address="", interface="", spare=True)
    plan = replace(plan, config=replace(plan.config, cluster=replace(cluster, nodes=(*cluster.nodes, spare))))
    ways = [*healthy_nodes(plan_for(*CPU)), FakeNode("spare", healthy("192.0.2.13"))]
    examination = examined(plan, ways)
    assert [choice.address for choice in examination.choices] == list(HOSTS) and found(examination, "room", "spare").level == "ok"
