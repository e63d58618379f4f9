"""Weights of two types in one model: those that float16 cannot hold stay float32, and the modules that own them compute in float32.

transformers' from_pretrained gives every weight one type, and would make infinities of them again. So they are read a second time.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract import InputRefused, TrainSpec
from trainer.tensor.naming import name_in_memory
from trainer.tensor.stream import open_tensors, read_float32

FLOAT32_TENSORS = "float32_tensors"  # in config.json: names, as in the files
HALF_DTYPES = (torch.float16, torch.bfloat16)


def keep_float32(model: nn.Module, folder: Path, spec: TrainSpec, dtype: torch.dtype) -> None:
    """Bring the tensors that config.json of `folder` names to float32, in a model that was loaded in `dtype`; in place. Raises InputRefused
    for a stage that trains, whose engine makes all weights one type."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = frozenset(config.get(FLOAT32_TENSORS, ()))
    if not kept or dtype not in HALF_DTYPES:
        return
    if spec.stage.kind == "train":
        raise InputRefused(
            f"{folder}: {len(kept)} of its tensors do not fit into {config.get('dtype')} and are float32, and training has one type for all. "
            "Train with precision=fp32, or from the weights that it was converted from."
        )
    sources = {name: source for name, source in open_tensors(folder).items() if name in kept}
    for name, memory in name_in_memory(model, sources).items():
        owner, _, key = memory.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters[key]
        if parameter is not None and not parameter.is_meta:
            module._parameters[key] = nn.Parameter(read_float32(sources[name]), requires_grad=parameter.requires_grad)
            compute_in_float32(module, dtype)


def compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """All of the module in float32, between inputs and outputs of `dtype`."""
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype == dtype:
            module._parameters[key] = nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad)
    module.register_forward_pre_hook(lambda _, args: tuple(cast(value, dtype, torch.float32) for value in args))
    module.register_forward_hook(lambda _, __, output: cast(output, torch.float32, dtype))


def cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value
