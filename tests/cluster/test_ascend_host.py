"""An Ascend plan on hosts that look like Ascend hosts: real device files without a device, and an npu-smi that prints a recorded table.

It covers everything up to and including the start of the containers, but no further: CANN's base image is not available here, so the image with
the plan's tag is a small one whose `python` only waits.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.image.stack import LABEL
from tests.cluster.conftest import Lab
from tests.cluster.host import Host, docker
from tests.images.conftest import ROOT

pytestmark = pytest.mark.cluster

SAMPLE = ROOT / "tests/golden/smi/npu-25.2.0-910b3.txt"  # a process is on device 2
PROCESS = "| 2       0                 | 1333928       |                          | 37709                   |"
NO_PROCESS = "| No running processes found in NPU 2                                                            |"
PLAN = (
    "hardware=ascend910b", "cluster.delivery.kind=ship", "cluster.delivery.accept_licence=true",  # for software that this image does not contain
    "cluster.environment.HCCL_IF_BASE_PORT='61000'",
)  # fmt: skip
EVENT_TIMEOUT_S = 1868  # the default of HCCL_EVENT_TIMEOUT
DEVICES = [*(f"/dev/davinci{number}" for number in range(8)), "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
DRIVER = {
    "/usr/local/dcmi", "/usr/local/bin/npu-smi", "/usr/local/Ascend/driver/lib64", "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info", "/usr/local/Ascend/driver/tools/hccn_tool", "/etc/hccn.conf",
}  # fmt: skip
WAITING_PYTHON = """#!/bin/sh
# Stands in for the trainer, which needs CANN: its ranks wait until they are asked to stop, every other command succeeds.
case "$*" in *torch.distributed.run*) trap 'exit 0' TERM; sleep 600 & wait ;; esac
"""


@pytest.fixture
def nodes(lab: Lab) -> tuple[Host, ...]:
    """Two hosts with eight stand-in NPUs each, all idle except one."""
    for host in lab.hosts[1:]:
        host.add_npus(8, SAMPLE)
    return lab.hosts[1:]


@pytest.fixture
def words(lab: Lab, nodes: tuple[Host, ...], base: str, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """The overrides of the plan; an image with its tag exists on this machine."""
    words = (*PLAN, *lab.overrides(*nodes)[:3])
    image = json.loads(lab.run("plan", "--json", *words).stdout)["image"]
    shutil.copy(ROOT / "images/entrypoint.sh", tmp_path)
    (tmp_path / "python").write_text(WAITING_PYTHON, encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {base}\nLABEL {LABEL}fingerprint={image['fingerprint']}\n"
        "COPY python entrypoint.sh /usr/local/bin/\nRUN chmod 755 /usr/local/bin/*\n"
        'ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]\n',
        encoding="utf-8",
    )
    docker("build", "-q", "-t", image["tag"], str(tmp_path))
    yield words
    docker("image", "rm", image["tag"])
    for host in nodes:
        host.run("docker", "image", "rm", image["tag"])


def errors(lab: Lab, *words: str) -> dict[str, set[str]]:
    """The errors that the doctor finds: check -> hosts."""
    found: dict[str, set[str]] = {}
    for finding in json.loads(lab.run("doctor", "--json", *words).stdout)["findings"]:
        if finding["level"] == "error":
            found.setdefault(finding["name"], set()).add(finding["host"])
    return found


def state(host: Host, run_id: str) -> dict[str, Any]:
    """The run's container as `docker inspect` prints it."""
    (name,) = (name for name in host.containers() if f"-{run_id}-" in name and not name.endswith("-data"))
    container: dict[str, Any] = json.loads(host.run("docker", "inspect", name))[0]
    return container


def test_the_doctor_finds_the_npus_and_what_prevents_a_launch(lab: Lab, nodes: tuple[Host, ...], tmp_path: Path) -> None:
    """On both hosts a process uses device 2; on the second one the last device is missing."""
    first, second = nodes
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(place for place, line in enumerate(lines) if line.startswith("| 7     910B3"))
    (tmp_path / "seven.txt").write_text("".join((*lines[:last], *lines[last + 3 :])), encoding="utf-8")
    second.add_npus(7, tmp_path / "seven.txt")
    second.run("rm", "/dev/davinci7")
    words = (*PLAN, *lab.overrides(*nodes)[:3])
    one = {second.address}
    assert errors(lab, *words) == {
        "device_idle": {first.address, second.address}, "device_files": one, "device_count": one, "same_count": one,
    }  # fmt: skip
    refused = lab.run("launch", "--run-id", "refused", *words)
    assert refused.returncode == 4, refused.stdout
    for text in ("process 1333928", "/dev/davinci7", f"{second.address}: device_count", "7 devices, the plan takes 8"):
        assert text in refused.stdout, refused.stdout
    assert not any("-refused-" in name for host in nodes for name in host.containers())
    assert errors(lab, *words, "cluster.devices_per_node=2") == {}, "the first two exist and are idle"
    first.run("chmod", "660", "/dev/davinci1")
    assert errors(lab, *words, "cluster.devices_per_node=2") == {"device_access": {first.address}}
    first.run("chmod", "666", "/dev/davinci1")


def test_mixed_chips_are_refused_by_the_nodes_names(lab: Lab, nodes: tuple[Host, ...], tmp_path: Path, clean: Callable[[], None]) -> None:
    second = nodes[1]
    (tmp_path / "other.txt").write_text(SAMPLE.read_text(encoding="utf-8").replace("910B3", "910B4"), encoding="utf-8")
    second.add_npus(8, tmp_path / "other.txt")
    words = (*PLAN, *lab.overrides(*nodes)[:3], "cluster.devices_per_node=2")
    refused = lab.run("launch", "--run-id", "mixed", *words)
    assert refused.returncode == 4, refused.stdout
    assert "same_chips" in refused.stdout and second.address in refused.stdout and "910B4" in refused.stdout
    assert not (lab.home / "runs/mixed").exists()


def test_everything_up_to_the_start_of_the_containers(
    lab: Lab, nodes: tuple[Host, ...], words: tuple[str, ...], tmp_path: Path, clean: Callable[[], None]
) -> None:
    idle = tmp_path / "idle.txt"
    idle.write_text(SAMPLE.read_text(encoding="utf-8").replace(PROCESS, NO_PROCESS), encoding="utf-8")
    for host in nodes:
        host.add_npus(8, idle)
    done = lab.run("launch", "--detach", "--run-id", "npus", *words)
    assert done.returncode == 0, done.stdout
    for host in nodes:
        container = state(host, "npus")
        assert container["State"]["Status"] == "running"
        assert [device["PathOnHost"] for device in container["HostConfig"]["Devices"]] == DEVICES
        assert [device["PathInContainer"] for device in container["HostConfig"]["Devices"]] == DEVICES
        assert {mount["Source"] for mount in container["Mounts"] if not mount["RW"]} == DRIVER
        assert all(mount["Source"] == mount["Destination"] for mount in container["Mounts"])
        assert not container["HostConfig"]["Privileged"]
        started = " ".join(container["Args"])
        assert f"--nnodes 2 --node-rank {nodes.index(host)} --master-addr {nodes[0].address}" in started and "--nproc-per-node 8" in started
        check_environment(container["Config"]["Env"], host)
        seen = host.run("docker", "exec", container["Id"], "sh", "-c", "ls /dev/davinci? /dev/hisi_hdc").split()
        assert seen == [*DEVICES[:8], "/dev/hisi_hdc"]
        assert host.run("docker", "exec", "--user", "root", container["Id"], "touch", "/usr/local/dcmi/mine", check=False) == ""
        assert not host.run("ls", "/usr/local/dcmi"), "a container cannot write into the driver"
        written = ("docker", "exec", container["Id"], "sh", "-c", 'echo "[ERROR] HCCL" >"$ASCEND_PROCESS_LOG_PATH/plog-1.log" && id -u')
        assert host.run(*written) != "0", "CANN's log can be written by the container's user"
    stopped = lab.run("stop", "npus")
    assert stopped.returncode == 0, stopped.stdout
    for number in range(len(nodes)):
        kept = lab.home / f"runs/npus/logs/node{number}-cann.tgz"
        assert f"cann/node{number}/plog-1.log" in subprocess.run(("tar", "-tzf", kept), capture_output=True, text=True, check=True).stdout


def check_environment(lines: list[str], host: Host) -> None:
    environment = dict(line.split("=", 1) for line in lines)
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert environment["HCCL_IF_IP"] == host.address
    assert (environment["HCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("=eth0", "eth0")
    limits_s = [int(environment[f"HCCL_{name}_TIMEOUT"]) for name in ("CONNECT", "EXEC")]
    assert sorted({*limits_s, EVENT_TIMEOUT_S}) == [*limits_s, EVENT_TIMEOUT_S]
    assert environment["HCCL_IF_BASE_PORT"] == "61000"
