"""environment.json: facts that the running process reports about itself."""

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from trainer.contract import SCHEMA, EnvReport, RankFacts
from trainer.contract.secret_name import names_a_secret
from trainer.device.device import Device, find_determinism, torch_build
from trainer.distributed.collective import gather_objects
from trainer.stages.group import Group

# Variables that the launcher or the user sets to configure a run. Any other variable could hold a token, so no other is written.
PREFIXES = (
    *("OMP_", "MKL_", "NCCL_", "HCCL_", "GLOO_", "MASTER_", "CUDA_", "CUBLAS_", "ASCEND_", "LCCL_"),
    *("PYTORCH_", "TORCH_", "TORCHELASTIC_", "TOKENIZERS_", "OMNILAUNCH_", "DS_", "ATB_", "KMP_", "OPENBLAS_", "ONEDNN_", "DNNL_", "NVTE_"),
)
NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "PYTHONHASHSEED"),
    *("HF_HUB_OFFLINE", "CLOSE_MATMUL_K_SHIFT", "NVIDIA_TF32_OVERRIDE", "ATEN_CPU_CAPABILITY", "LD_PRELOAD", "LD_LIBRARY_PATH"),
)


def report_environment(
    device: Device, local_rank: int, groups: tuple[Group, ...], deepspeed: dict[str, Any], environ: Mapping[str, str]
) -> EnvReport | None:
    """Every rank must call it, since each reports its own device. Returns the report on rank 0, None on the others."""
    own = describe_rank(device, local_rank)
    ranks = gather_objects(own)
    if torch.distributed.get_rank():
        return None
    return EnvReport(
        schema=SCHEMA,
        hostname=socket.gethostname(),
        platform=platform.platform(),
        python=platform.python_version(),
        packages=dict(sorted((found.name, found.version) for found in importlib.metadata.distributions() if found.name)),
        accelerator=device.name,
        devices=tuple(rank.device for rank in ranks),
        driver=own.driver,
        world_size=torch.distributed.get_world_size(),
        threads=torch.get_num_threads(),
        environment=select(environ),
        parameters={group.name: group.parameters for group in groups},
        trainable={group.name: group.trainable for group in groups},
        deepspeed=deepspeed,
        toolkit={name: version for name, version in {**torch_build(), **device.toolkit()}.items() if version},
        settings=device.settings(),
        determinism=find_determinism(device.name, environ),
        ranks=tuple(ranks),
    )


def describe_rank(device: Device, local_rank: int) -> RankFacts:
    return RankFacts(
        hostname=socket.gethostname(),
        device=f"{socket.gethostname()} {device.name} {local_rank}: {device.title(local_rank)}",
        driver=device.driver(),
        firmware=device.firmware(),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        processors=len(os.sched_getaffinity(0)),
    )


def select(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that configure a run, by name; never one whose name suggests a secret."""
    steering = {name: value for name, value in environ.items() if name in NAMES or name.startswith(PREFIXES)}
    return {name: value for name, value in sorted(steering.items()) if not names_a_secret(name)}
