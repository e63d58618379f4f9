"""Which devices of a node a run gets, by which options and variables, and what the doctor looks at of them."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.doctor.findings import EVERY_NODE
from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, TOOL_FOLDERS
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.ssh.transport import Local
from tests.launcher.doctor.fault_table import RDMA
from tests.launcher.fake_nodes import HOSTS, NPU, NPU_RUNTIME, P4, ascend, docker_info, examined, found, healthy_nodes, p4

PlanFor = Callable[..., Plan]
TWO = ("cluster.devices_per_node=2", "cluster.nodes.0.devices=[5,3]")
NAMED = (*TWO, "cluster.nodes.1.devices=[0,7]")
MANAGERS = ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
LOCAL_CUDA = ("hardware=rtx3090", "cluster.devices_per_node=2")
GPU_LINE = "{index}, Tesla {chip}, GPU-{index}, 7680, 0, 580.173.02, 6.1, 0\n"


def after(argv: tuple[str, ...], option: str) -> list[str]:
    return [argv[place + 1] for place, word in enumerate(argv) if word == option]


def visible(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if "VISIBLE" in name or "ORDER" in name}


# ------------------------------------------------------------------------------------------- what the commands hand over


def test_each_ascend_node_hands_over_the_devices_that_it_names(plan_for: PlanFor) -> None:
    first, second = plan_for(*NPU, *NAMED).commands
    assert after(first.start, "--device") == ["/dev/davinci3", "/dev/davinci5", *MANAGERS]
    assert after(second.start, "--device") == ["/dev/davinci0", "/dev/davinci7", *MANAGERS]
    for command in (first, second):
        assert visible(command.environment) == {"ASCEND_RT_VISIBLE_DEVICES": "0,1"}, "a container counts its own from 0"


def test_the_ascend_runtime_is_asked_by_number_and_gets_no_device_file(plan_for: PlanFor) -> None:
    first, second = plan_for(*NPU_RUNTIME, *NAMED).commands
    assert after(first.start, "--runtime") == ["ascend"] and "--device" not in first.start and "--runtime" not in first.prepare
    assert visible(first.environment) == {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "ASCEND_VISIBLE_DEVICES": "3,5"}
    assert visible(second.environment)["ASCEND_VISIBLE_DEVICES"] == "0,7"
    sources = {text.split("source=")[1].split(",")[0] for text in after(first.start, "--mount")}
    assert "/usr/local/Ascend/driver/version.info" in sources and "/etc/hccn.conf" in sources
    assert not {"/usr/local/dcmi", "/usr/local/bin/npu-smi", "/usr/local/Ascend/driver/lib64"} & sources, "the runtime mounts these"


def test_the_ascend_runtime_is_nothing_to_other_hardware(plan_for: PlanFor) -> None:
    for hardware in ("cpu", "rtx3090"):
        plain = plan_for(f"hardware={hardware}", "cluster.runtime=docker").commands
        assert plan_for(f"hardware={hardware}", "cluster.runtime=docker", "cluster.ascend_runtime=true").commands == plain


@pytest.mark.parametrize(("runtime", "counted"), [("docker", "0,1"), ("process", "1,3")])
def test_cuda_devices_in_a_container_and_without(plan_for: PlanFor, runtime: str, counted: str) -> None:
    (command,) = plan_for(*LOCAL_CUDA, f"cluster.runtime={runtime}", "cluster.nodes.0.devices=[3,1]").commands
    assert after(command.start, "--gpus") == (['"device=1,3"'] if runtime == "docker" else [])
    assert visible(command.environment) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": counted}


def test_npus_without_a_container_are_named_by_their_own_numbers(plan_for: PlanFor) -> None:
    words = ("hardware=ascend910b", "cluster.devices_per_node=2", "cluster.nodes.0.devices=[6,2]", "cluster.ascend_runtime=true")
    (command,) = plan_for(*words, "cluster.runtime=process").commands
    assert visible(command.environment) == {"ASCEND_RT_VISIBLE_DEVICES": "2,6"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("cluster.nodes.0.devices=[3,3]", "cluster.devices_per_node=2"), ("3 of node 192.0.2.11 is listed twice",)),
        (("cluster.nodes.0.devices=[3,3]", "cluster.devices_per_node=1"), ("3 of node 192.0.2.11 is listed twice", "devices=[3]")),
        (("cluster.nodes.1.devices=[3,4]",), ("192.0.2.12 lists 2 devices, but 8 are used", "cluster.devices_per_node=2")),
        ((*TWO, "cluster.nodes.1.devices=[1,2,3]"), ("192.0.2.12 lists 3 devices, but 2 are used",)),
        (("cluster.nodes.1.devices=[-1]",), ("-1 of node 192.0.2.12 is out of range",)),
    ],
)
def test_devices_that_cannot_be_meant(plan_for: PlanFor, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigRefused) as caught:
        plan_for(*NPU, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_the_dies_of_a_module_stay_together(plan_for: PlanFor) -> None:
    words = ("cluster=example", "hardware=ascend910c", "cluster.devices_per_node=2")
    assert plan_for(*words, "cluster.nodes.0.devices=[6,7]").verdict.ok
    with pytest.raises(ConfigRefused, match=r"192\.0\.2\.11 lists only a part of 4-5, 6-7"):
        plan_for(*words, "cluster.nodes.0.devices=[5,6]")


# ----------------------------------------------------------------------------------------------- what the doctor looks at


def test_only_the_named_devices_must_be_idle_and_well(plan_for: PlanFor) -> None:
    busy = ascend()["devices"].replace("| No running processes found in NPU 2 |", "| 2       0  | 1333928  |  python3  | 37709  |")
    fault = {"devices": busy.replace("| 6     910B3               | OK ", "| 6     910B3               | Alarm ")}
    apart, among = plan_for(*NPU, *NAMED), plan_for(*NPU, *TWO, "cluster.nodes.1.devices=[2,6]")
    examination = examined(apart, healthy_nodes(apart, second=fault))
    assert {found(examination, name, HOSTS[1]).level for name in ("device_idle", "device_health", "device_count")} == {"ok"}
    examination = examined(among, healthy_nodes(among, second=fault))
    assert "device 2: process 1333928" in found(examination, "device_idle", HOSTS[1]).evidence
    assert "device 6: Alarm" in found(examination, "device_health", HOSTS[1]).evidence


def test_a_card_of_another_kind_beside_the_named_one(plan_for: PlanFor) -> None:
    """nvidia-smi lists a T4 first; the run is to use the P4 behind it."""
    mixed = {
        "devices": GPU_LINE.format(index=0, chip="T4") + GPU_LINE.format(index=1, chip="P4"),
        "files": p4()["files"] + "/dev/nvidia1\n",
    }
    plain = plan_for(*P4)
    assert "Tesla T4" in found(examined(plain, healthy_nodes(plain, second=mixed)), "chip", HOSTS[1]).evidence
    named = plan_for(*P4, "cluster.nodes.1.devices=[1]")
    assert {finding.level for finding in examined(named, healthy_nodes(named, second=mixed)).findings if finding.host == HOSTS[1]} <= {
        "ok",
        "warning",
    }


def test_a_device_that_is_not_there_by_its_number(plan_for: PlanFor) -> None:
    """Device 3 has fallen off the bus: the first four are then not 0 to 3."""
    lines = ascend()["devices"].splitlines(keepends=True)
    at = next(place for place, line in enumerate(lines) if line.startswith("| 3     910B3"))
    without = {"devices": "".join(lines[:at] + lines[at + 3 :])}
    plan = plan_for(*NPU, "cluster.devices_per_node=4")
    finding = found(examined(plan, healthy_nodes(plan, second=without)), "device_count", HOSTS[1])
    assert finding.level == "error" and finding.evidence == "no device 3; the node has 0, 1, 2, 4, 5, 6, 7"
    assert finding.fix == "{host: 192.0.2.12, devices: [0, 1, 2, 4]} in the cluster file"


def test_npu_smi_where_the_container_does_not_look(plan_for: PlanFor) -> None:
    moved = {"files": ascend()["files"].replace("/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi")}
    plan = plan_for(*NPU)
    finding = found(examined(plan, healthy_nodes(plan, second=moved)), "driver_mounts", HOSTS[1])
    assert (finding.level, finding.fix) == ("error", "sudo ln -s /usr/local/sbin/npu-smi /usr/local/bin/npu-smi")
    plan = plan_for(*NPU_RUNTIME)
    assert found(examined(plan, healthy_nodes(plan, second=moved)), "driver_mounts", HOSTS[1]).level == "ok", "the runtime finds its own"


def test_a_trial_start_asks_for_the_same_devices(plan_for: PlanFor) -> None:
    for words in ((*NPU, *NAMED), (*NPU_RUNTIME, *NAMED)):
        plan = plan_for(*words)
        ways = healthy_nodes(plan, first={"docker": docker_info()})
        examined(plan, ways)
        trial = next(
            argv for argv in ways[0].asked if argv[:2] == ("docker", "run") and "-c" in argv and "trial" in argv[argv.index("-c") + 1]
        )
        for option in ("--device", "--runtime"):
            assert after(trial, option) == after(plan.commands[0].start, option)


def test_the_container_gets_the_groups_that_own_the_devices(plan_for: PlanFor) -> None:
    """The trial has them, and so has the run (launcher.run.session); root's group is never given."""
    plan = plan_for(*NPU)
    closed = {"modes": ascend()["modes"].replace("davinci6 666 0 1000", "davinci6 660 0 1900").replace("svm 666 0 1000", "svm 660 0 1901")}
    ways = healthy_nodes(plan, first=closed)
    examination = examined(plan, ways)
    finding = found(examination, "device_access", HOSTS[0])
    assert (finding.level, finding.evidence) == (
        "ok",
        "user 1000:1000 of the container, in group 1900, 1901 of the node may use the device files",
    )
    assert examination.groups == {HOSTS[0]: (1900, 1901)}
    trials = [
        next(argv for argv in way.asked if argv[:2] == ("docker", "run") and "-c" in argv and "trial" in argv[argv.index("-c") + 1])
        for way in ways
    ]
    assert [after(trial, "--group-add") for trial in trials] == [["1900", "1901"], []]
    named = plan_for(*NPU, "cluster.nodes.0.groups=[44]")
    assert after(named.commands[0].start, "--group-add") == ["44"] and after(named.commands[1].start, "--group-add") == []
    assert after(named.commands[0].prepare, "--group-add") == [], "the check of the data needs no device"


def test_a_node_with_rdma_hands_it_to_the_container(plan_for: PlanFor) -> None:
    plan = plan_for(*P4)
    examination = examined(plan, healthy_nodes(plan, first={"rdma": RDMA}, second={"rdma": RDMA}))
    assert (
        examination.rdma == set(HOSTS) and found(examination, "rdma", HOSTS[0]).evidence == "NCCL takes mlx5_0 port 1 (InfiniBand, ACTIVE)"
    )
    assert found(examination, "same_rdma", EVERY_NODE).evidence == "all have InfiniBand"
    without = plan_for(*P4, "cluster.environment.NCCL_IB_DISABLE='1'")
    assert examined(without, healthy_nodes(without, first={"rdma": RDMA})).rdma == frozenset()
    given = plan_for(*P4, "cluster.nodes.0.rdma=true")
    assert after(given.commands[0].start, "--device") == ["/dev/infiniband"] and "memlock=-1" in after(given.commands[0].start, "--ulimit")
    assert after(given.commands[1].start, "--device") == [] and after(given.commands[0].prepare, "--device") == []


@pytest.mark.parametrize(("name", "query"), [("npu-smi", NPU_QUERY), ("nvidia-smi", NVIDIA_APPS_QUERY)])
def test_a_tool_outside_the_path_of_the_login_is_found(tmp_path: Path, name: str, query: tuple[str, ...]) -> None:
    assert {"/usr/local/sbin", "/usr/local/bin", "/usr/bin", "/usr/lib/wsl/lib"} <= set(TOOL_FOLDERS.split(":"))
    tool = tmp_path / name
    tool.write_text('#!/bin/sh\nprintf "%s\\n" found "$@"\n')
    tool.chmod(0o755)
    moved = tuple(word.replace(TOOL_FOLDERS, str(tmp_path)) for word in query)
    printed = Local({"PATH": "/usr/bin:/bin"}).run(moved).output.splitlines()
    assert printed == ["found", *query[query.index(name) + 1 :]]
    bare = tuple(word.replace(TOOL_FOLDERS, "/usr/bin") for word in query)
    assert Local({"PATH": "/usr/bin:/bin"}).run(bare).code == 127


# ------------------------------------------------------------------------------------------------- as an engine reads it


@pytest.fixture
def empty_image() -> Iterator[str]:
    """An image with nothing in it, whose containers are made and never started."""
    name = f"omnilaunch-test-empty:{os.getpid()}"
    subprocess.run(("docker", "import", "-", name), input=b"\0" * 1024, check=True, capture_output=True)  # the end of a tar archive
    yield name
    subprocess.run(("docker", "rmi", name), check=True, capture_output=True)


@pytest.mark.docker
@pytest.mark.parametrize(("devices", "ids"), [("[1,3]", ["1", "3"]), ("[2]", ["2"])])
def test_the_engine_reads_the_numbers_of_gpus(plan_for: PlanFor, empty_image: str, devices: str, ids: list[str]) -> None:
    count = f"cluster.devices_per_node={len(ids)}"
    (command,) = plan_for("hardware=rtx3090", "cluster.runtime=docker", count, f"cluster.nodes.0.devices={devices}").commands
    (word,) = after(command.start, "--gpus")
    made = subprocess.run(("docker", "create", "--gpus", word, empty_image, "true"), check=True, capture_output=True, text=True)
    container = made.stdout.strip()
    try:
        asked = ("docker", "inspect", "--format", "{{json .HostConfig.DeviceRequests}}", container)
        (request,) = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    finally:
        subprocess.run(("docker", "rm", container), check=True, capture_output=True)
    assert (request["DeviceIDs"], request["Count"], request["Capabilities"]) == (ids, 0, [["gpu"]])
