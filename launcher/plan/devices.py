"""What gives a container or process its accelerators, for each kind of device: device files, mounts, variables. Pure.

Sources: Ascend device files and mounts, github.com/Ascend/cann-container-image README and vllm-ascend installation.md; what Ascend
Docker Runtime mounts by itself, its build/scripts/base.list; CUDA, the NVIDIA container toolkit's `--gpus`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.config.schema import Accelerator, Cluster, Node
from launcher.plan.docker_run import Mount

NPU_SMI = "/usr/local/bin/npu-smi"
# Mounted read-only at the same path: the driver belongs to the host, never to the image.
ASCEND_MOUNTS = (
    "/usr/local/dcmi",
    NPU_SMI,
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
)
OTHER_NPU_SMI = "/usr/local/sbin/npu-smi"  # where some drivers install it; a container does not look there
ASCEND_NETWORK_MOUNTS = ("/usr/local/Ascend/driver/tools/hccn_tool", "/etc/hccn.conf")
ASCEND_MANAGERS = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
RDMA_FOLDER = "/dev/infiniband"  # docker maps every device file in it
ASCEND_RUNTIME = "ascend"  # its name in the engine's configuration, which its installer writes
# What that runtime mounts when devices are requested from it.
ASCEND_RUNTIME_MOUNTS = ("/usr/local/dcmi", NPU_SMI, "/usr/local/Ascend/driver/lib64")


@dataclass(frozen=True, kw_only=True)
class Share:
    """The devices of a node that a run takes. `devices`: their numbers on the host, ascending. `in_container`: the process sees them
    numbered from 0. `several_nodes`: other nodes take part. `rdma`: the container gets the node's RDMA devices. `ascend_runtime`: the container
    gets its devices from Ascend Docker Runtime."""

    devices: tuple[int, ...]
    in_container: bool
    several_nodes: bool
    ascend_runtime: bool
    rdma: bool = False

    @property
    def visible(self) -> str:
        """The device numbers as the process counts them. Ascending and without spaces: CANN ignores what follows a space."""
        return write_numbers(tuple(range(len(self.devices))) if self.in_container else self.devices)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """`devices`, `gpus`, `runtime`, `mounts`: as in ContainerOptions. `environment`: for the process or container."""

    devices: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    runtime: str = ""
    mounts: tuple[Mount, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def cpu_options(share: Share) -> DeviceOptions:
    return DeviceOptions(environment={"DS_ACCELERATOR": "cpu"})


def cuda_options(share: Share) -> DeviceOptions:
    # By default CUDA numbers the fastest device 0, nvidia-smi goes by PCI bus; the cluster file uses the numbers of nvidia-smi.
    environment = {"DS_ACCELERATOR": "cuda", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": share.visible}
    return DeviceOptions(devices=(RDMA_FOLDER,) if share.rdma else (), gpus=share.devices, environment=environment)


def npu_options(share: Share) -> DeviceOptions:
    environment = {"DS_ACCELERATOR": "npu", "ASCEND_RT_VISIBLE_DEVICES": share.visible}
    mounts = tuple(Mount(path=path) for path in ascend_mounts(share))
    if share.ascend_runtime:  # never together with --device
        environment["ASCEND_VISIBLE_DEVICES"] = write_numbers(share.devices)
        return DeviceOptions(runtime=ASCEND_RUNTIME, mounts=mounts, environment=environment)
    return DeviceOptions(devices=ascend_device_files(share.devices), mounts=mounts, environment=environment)


def ascend_device_files(numbers: tuple[int, ...]) -> tuple[str, ...]:
    return (*(f"/dev/davinci{number}" for number in numbers), *ASCEND_MANAGERS)


def ascend_mounts(share: Share) -> tuple[str, ...]:
    """Files of the driver that we mount ourselves."""
    wanted = ASCEND_MOUNTS + (ASCEND_NETWORK_MOUNTS if share.several_nodes else ())
    return tuple(path for path in wanted if not (share.ascend_runtime and path in ASCEND_RUNTIME_MOUNTS))


DEVICE_OPTIONS: dict[Accelerator, Callable[[Share], DeviceOptions]] = {"cpu": cpu_options, "cuda": cuda_options, "npu": npu_options}


def share_of(cluster: Cluster, node: Node, count: int) -> Share:
    """The devices of `node` for a run that takes `count` of each node."""
    in_container = cluster.runtime == "docker"
    return Share(
        devices=device_numbers(node, count),
        in_container=in_container,
        several_nodes=len(cluster.working) > 1,
        ascend_runtime=in_container and cluster.ascend_runtime,
        rdma=in_container and node.rdma,
    )


def device_numbers(node: Node, count: int) -> tuple[int, ...]:
    """The numbers on the host of the devices that a run takes: those that the cluster file names, else the first `count`."""
    return tuple(sorted(node.devices)) or tuple(range(count))


def write_numbers(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
