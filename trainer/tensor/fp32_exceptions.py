"""Models with two dtypes: weights that do not fit in float16 stay float32, and the modules that own them compute in float32.

transformers' from_pretrained gives every weight one dtype and would turn them into infinities again. So they are read a second time.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract import InputRefused, TrainSpec
from trainer.tensor.naming import name_in_memory
from trainer.tensor.stream import open_tensors, read_float32

FLOAT32_TENSORS = "float32_tensors"  # key in config.json: names, as in the files
HALF_DTYPES = (torch.float16, torch.bfloat16)


def keep_float32(model: nn.Module, folder: Path, spec: TrainSpec, dtype: torch.dtype) -> None:
    """Reload, in float32 and in place, the tensors that config.json of `folder` names; the model was loaded in `dtype`. Raises InputRefused
    for a stage that trains, whose engine gives all weights one dtype."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    float32_names = frozenset(config.get(FLOAT32_TENSORS, ()))
    if not float32_names or dtype not in HALF_DTYPES:
        return
    if spec.stage.kind == "train":
        raise InputRefused(
            f"{folder}: {len(float32_names)} of its tensors do not fit into {config.get('dtype')} and are float32, but training has one dtype for all. "
            "Train with precision=fp32, or start from the weights that it was converted from."
        )
    sources = {name: source for name, source in open_tensors(folder).items() if name in float32_names}
    for name, memory in name_in_memory(model, sources).items():
        owner, _, key = memory.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters[key]
        if parameter is not None and not parameter.is_meta:
            module._parameters[key] = nn.Parameter(read_float32(sources[name]), requires_grad=parameter.requires_grad)
            compute_in_float32(module, dtype)


def compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Compute the whole module in float32; its inputs and outputs keep `dtype`."""
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype == dtype:
            module._parameters[key] = nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad)
    module.register_forward_pre_hook(lambda _, args: tuple(cast(value, dtype, torch.float32) for value in args))
    module.register_forward_hook(lambda _, __, output: cast(output, torch.float32, dtype))


def cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value
