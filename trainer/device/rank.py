"""The rank of this process in its run, and its device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.contract import SINGLE_PROCESS_KINDS, InputRefused, TrainSpec
from trainer.device.device import Device, open_device

SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True, kw_only=True)
class Rank:
    """`number`: global rank; `local`: rank on this node."""

    number: int
    local: int
    world_size: int
    device: Device
    torch_device: torch.device


def open_rank(spec: TrainSpec, environ: Mapping[str, str]) -> Rank:
    """Read the variables of torchrun; without them, a single-process stage is rank 0 of 1. Raises InputRefused if variables are missing or
    do not match the plan."""
    variables = environ if spec.stage.kind not in SINGLE_PROCESS_KINDS or "RANK" in environ else {**environ, **SINGLE_RANK}
    try:
        number, local, world_size = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise InputRefused(f"{error} is not set by torchrun. Start a run with: torchrun --nproc-per-node N -m trainer run SPEC") from error
    if world_size != spec.device.world_size:
        raise InputRefused(
            f"WORLD_SIZE is {world_size}, but the plan (spec.device.world_size) is for {spec.device.world_size} ranks, so the batch would "
            "change. Start as many ranks as planned, or plan again."
        )
    device, torch_device = open_device(spec.device, local)
    return Rank(number=number, local=local, world_size=world_size, device=device, torch_device=torch_device)
