"""What a node hands to a container or process for each kind of device: options, mounts, variables. Pure.

Sources: Ascend device files and mounts, github.com/Ascend/cann-container-image README and vllm-ascend installation.md; what Ascend
Docker Runtime mounts by itself, its build/scripts/base.list; CUDA, the NVIDIA container toolkit's `--gpus`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.config.schema import Accelerator, Cluster, Node

NPU_SMI = "/usr/local/bin/npu-smi"
# Read-only, at the same place inside: the driver belongs to the host, never to the image.
ASCEND_MOUNTS = (
    "/usr/local/dcmi",
    NPU_SMI,
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
)
OTHER_NPU_SMI = "/usr/local/sbin/npu-smi"  # where some drivers put it, and the container does not look
ASCEND_NETWORK_MOUNTS = ("/usr/local/Ascend/driver/tools/hccn_tool", "/etc/hccn.conf")
ASCEND_MANAGERS = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
ASCEND_RUNTIME = "ascend"  # its name in the engine's configuration, which its installer writes
# What that runtime mounts when it is asked for devices.
ASCEND_RUNTIME_MOUNTS = ("/usr/local/dcmi", NPU_SMI, "/usr/local/Ascend/driver/lib64")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a run takes of a node. `devices`: numbers on the host, ascending. `contained`: in a container, where they are counted anew.
    `several`: other nodes take part. `ascend_runtime`: the container gets them from Ascend Docker Runtime."""

    devices: tuple[int, ...]
    contained: bool
    several: bool
    ascend_runtime: bool

    @property
    def visible(self) -> str:
        """The devices as the process counts them: a container sees only its own, from 0 on. Ascending, and without spaces: CANN ignores
        what follows one."""
        return write_numbers(tuple(range(len(self.devices))) if self.contained else self.devices)


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """`options`: arguments of `docker run`. `environment`: for the process or container."""

    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def attach_cpu(share: Share) -> Attachment:
    return Attachment(environment={"DS_ACCELERATOR": "cpu"})


def attach_cuda(share: Share) -> Attachment:
    # docker reads --gpus as CSV: without the inner quotes a second number would be taken for a count of devices.
    options = ("--gpus", f'"device={write_numbers(share.devices)}"')
    # CUDA counts the fastest first, nvidia-smi by bus; the numbers of the cluster file are those of nvidia-smi.
    environment = {"DS_ACCELERATOR": "cuda", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": share.visible}
    return Attachment(options=options, environment=environment)


def attach_npu(share: Share) -> Attachment:
    environment = {"DS_ACCELERATOR": "npu", "ASCEND_RT_VISIBLE_DEVICES": share.visible}
    mounts = tuple(part for path in ascend_mounts(share) for part in ("--mount", f"type=bind,source={path},target={path},readonly"))
    if share.ascend_runtime:  # never beside --device
        asked = {"ASCEND_VISIBLE_DEVICES": write_numbers(share.devices)}
        return Attachment(options=("--runtime", ASCEND_RUNTIME, *mounts), environment=environment | asked)
    files = tuple(f"/dev/davinci{number}" for number in share.devices) + ASCEND_MANAGERS
    return Attachment(options=(*(part for path in files for part in ("--device", path)), *mounts), environment=environment)


def ascend_mounts(share: Share) -> tuple[str, ...]:
    """Files of the driver that are mounted by us."""
    wanted = ASCEND_MOUNTS + (ASCEND_NETWORK_MOUNTS if share.several else ())
    return tuple(path for path in wanted if not (share.ascend_runtime and path in ASCEND_RUNTIME_MOUNTS))


ATTACH: dict[Accelerator, Callable[[Share], Attachment]] = {"cpu": attach_cpu, "cuda": attach_cuda, "npu": attach_npu}


def attach(accelerator: Accelerator, share: Share) -> Attachment:
    """Options and variables that give a run its share of a node."""
    return ATTACH[accelerator](share)


def share_of(cluster: Cluster, node: Node, count: int) -> Share:
    """What a run with `count` devices a node takes of this one."""
    contained = cluster.runtime == "docker"
    return Share(
        devices=device_numbers(node, count),
        contained=contained,
        several=len(cluster.working) > 1,
        ascend_runtime=contained and cluster.ascend_runtime,
    )


def device_numbers(node: Node, count: int) -> tuple[int, ...]:
    """The devices of a node that a run takes, by their numbers on the host: those that the cluster file names, else the first `count`."""
    return tuple(sorted(node.devices)) or tuple(range(count))


def write_numbers(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
