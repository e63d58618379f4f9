"""What each check of the doctor looks for: an answer of a node, and the finding that it must give."""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.doctor.smi import NVIDIA_FIELDS
from tests.launcher.fake_nodes import (
    CPU,
    DATA,
    DENIED,
    HOSTS,
    LOCAL,
    NO_DOCKER,
    NPU,
    NPU_RUNTIME,
    OFFLOAD,
    P4,
    PULL,
    STOPPED,
    Said,
    ascend,
    df,
    docker_info,
    healthy,
    network,
    p4,
    room,
    tcp,
)  # fmt: skip


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


RDMA = "port mlx5_0 1 ACTIVE InfiniBand\nport mlx5_1 1 DOWN InfiniBand\nfile /dev/infiniband/uverbs0\n"
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
    "docker_version": (
        Fault(answers={"docker": docker_info("19.03.15")}, says="19.03.15 is older than 20.10.10"),
        Fault(answers={"docker": docker_info("20.10.7")}, says="can start no thread", fix="update it"),
    ),
    "rootless": (
        Fault(
            answers={"docker": docker_info(SecurityOptions=["name=seccomp", "name=rootless"])}, says="cannot reach", fix="unset DOCKER_HOST"
        ),
        Fault(
            words=("cluster.runtime=docker", "cluster.user=1000:1000"),
            answers={"docker": docker_info(SecurityOptions=["name=rootless"])},
            says="user 1000:1000 of the container may not write",
            fix="cluster.user=0:0",
            place=0,
        ),
    ),
    "user_namespace": (Fault(answers={"docker": docker_info(SecurityOptions=["name=userns"])}, says="userns-remap", fix="daemon.json"),),
    "snap": (
        Fault(
            answers={"docker": docker_info(DockerRootDir="/var/snap/docker/common/var-lib-docker")},
            says="sees no files at /srv/omnilaunch",
            fix="cluster.root=FOLDER below /home",
        ),
    ),
    "docker_disk": (Fault(answers={"docker_disk": "nfs\n"}, says="/var/lib/docker is on nfs", fix="data-root", level="warning"),),
    "docker_proxy": (
        Fault(
            words=(*CPU, "cluster.delivery.kind=build_on_nodes"),
            answers={"docker": docker_info(HttpsProxy="http://xxxxx:xxxxx@proxy:3128"), "image": (1, "", "No such image")},
            says="the build of the image would not use it",
            fix="cluster.delivery.proxy=URL",
            level="warning",
        ),
    ),
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
    "rdma": (
        Fault(
            words=P4,
            answers={"rdma": "port mlx5_0 1 DOWN InfiniBand\n"},
            says="mlx5_0 port 1 (InfiniBand, DOWN)",
            fix="ibstat",
            level="warning",
        ),
        Fault(
            words=P4,
            answers={"rdma": "port mlx5_0 1 ACTIVE Ethernet\n"},
            says="no /dev/infiniband/uverbs*",
            fix="modprobe ib_uverbs",
            level="warning",
        ),
        Fault(
            words=(*P4, "cluster.runtime=docker", "cluster.ulimits={memlock: '65536'}"),
            answers={"rdma": RDMA},
            says="cluster.ulimits.memlock=65536 forbids it",
            fix="cluster.ulimits.memlock=-1",
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
            answers={"modes": ascend()["modes"].replace("/dev/davinci6 666 0 1000", "/dev/davinci6 660 0 0")},
            says="user 1000:1000 of the container may not use /dev/davinci6 (660, owner 0:0)",
            fix="--install-for-all",
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
    "same_rdma": (
        Fault(words=P4, answers={"rdma": RDMA}, says="it has InfiniBand, the others have sockets", fix="NCCL_IB_DISABLE", level="warning"),
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


FAULTS = [(name, fault) for table in (NODE_FAULTS, CROSS_NODE_FAULTS) for name, faults in table.items() for fault in faults]
