"""environment.json: what the running process says of itself."""

import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from trainer.contract import SCHEMA, EnvReport
from trainer.device import Device
from trainer.stages.group import Group

# Variables that the launcher or the user sets to steer a run. A token can hide in any other one, and so none is written.
PREFIXES = (
    *("OMP_", "MKL_", "NCCL_", "HCCL_", "GLOO_", "MASTER_", "CUDA_", "CUBLAS_", "ASCEND_", "LCCL_"),
    *("PYTORCH_", "TORCH_", "TORCHELASTIC_", "TOKENIZERS_", "OMNILAUNCH_", "DS_"),
)
NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
    "PYTHONHASHSEED",
    "HF_HUB_OFFLINE",
)
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


def report_environment(
    device: Device, local_rank: int, groups: tuple[Group, ...], deepspeed: dict[str, Any], environ: Mapping[str, str]
) -> EnvReport | None:
    """Every rank must call it, since each names its device. Returns the report on rank 0, None on the others."""
    own = f"{socket.gethostname()} {device.name} {local_rank}: {device.title(local_rank)}"
    titles = [own]
    if torch.distributed.get_world_size() > 1:
        titles = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(titles, own)
    if torch.distributed.get_rank():
        return None
    return EnvReport(
        schema=SCHEMA,
        hostname=socket.gethostname(),
        platform=platform.platform(),
        python=platform.python_version(),
        packages=dict(sorted((found.name, found.version) for found in importlib.metadata.distributions() if found.name)),
        accelerator=device.name,
        devices=tuple(titles),
        driver=device.driver(),
        world_size=torch.distributed.get_world_size(),
        threads=torch.get_num_threads(),
        environment=select(environ),
        parameters={group.name: group.parameters for group in groups},
        trainable={group.name: group.trainable for group in groups},
        deepspeed=deepspeed,
    )


def select(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer a run, by name; never one whose name speaks of a secret."""
    steering = {name: value for name, value in environ.items() if name in NAMES or name.startswith(PREFIXES)}
    return {name: value for name, value in sorted(steering.items()) if not any(word in name.upper() for word in SECRET)}
