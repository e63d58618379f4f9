"""What a node hands to a container or process for each kind of device: options, mounts, variables. Pure.

Sources: Ascend device files and mounts, github.com/Ascend/cann-container-image README and vllm-ascend installation.md;
CUDA, the NVIDIA container toolkit's `--gpus`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.schema import Accelerator

# Read-only, at the same place inside: the driver belongs to the host, never to the image.
ASCEND_MOUNTS = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
)
ASCEND_NETWORK_MOUNTS = ("/usr/local/Ascend/driver/tools/hccn_tool", "/etc/hccn.conf")
ASCEND_MANAGERS = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """`options`: arguments of `docker run`. `environment`: for the process or container."""

    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def attach_cpu(devices: int, nodes: int) -> Attachment:
    return Attachment(environment={"DS_ACCELERATOR": "cpu"})


def attach_cuda(devices: int, nodes: int) -> Attachment:
    ids = ",".join(str(i) for i in range(devices))
    # docker reads --gpus as CSV: without the inner quotes a second id would be taken for a new key.
    options = ("--gpus", f'"device={ids}"')
    return Attachment(options=options, environment={"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ids})


def attach_npu(devices: int, nodes: int) -> Attachment:
    files = tuple(f"/dev/davinci{i}" for i in range(devices)) + ASCEND_MANAGERS
    mounts = ASCEND_MOUNTS + (ASCEND_NETWORK_MOUNTS if nodes > 1 else ())
    options = tuple(part for path in files for part in ("--device", path))
    options += tuple(part for path in mounts for part in ("--mount", f"type=bind,source={path},target={path},readonly"))
    visible = ",".join(str(i) for i in range(devices))  # ascending and without spaces: what follows a space is ignored
    return Attachment(options=options, environment={"DS_ACCELERATOR": "npu", "ASCEND_RT_VISIBLE_DEVICES": visible})


ATTACH: dict[Accelerator, Callable[[int, int], Attachment]] = {"cpu": attach_cpu, "cuda": attach_cuda, "npu": attach_npu}


def attach(accelerator: Accelerator, *, devices: int, nodes: int) -> Attachment:
    """Options and variables that give a node's first `devices` devices to the run."""
    return ATTACH[accelerator](devices, nodes)
