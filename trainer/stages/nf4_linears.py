"""Frozen linear layers of a LoRA run in 4 bits: normal floats with double-quantized scales (Dettmers et al., QLoRA, arXiv 2305.14314,
section 3), by bitsandbytes, whose kernels are for CUDA.

A layer is marked here and quantized when the engine moves the model to its device. Embeddings, norms and the head keep their dtype.
"""

import importlib.util
import re
from collections.abc import Sequence

import torch

from trainer.contract import InputRefused


def quantize_linears(model: torch.nn.Module, groups: Sequence[str]) -> None:
    """Replace the linear layers of some groups, in place. `groups`: their regexes over names. Raises InputRefused if the package is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputRefused(
            "stage.lora.base=nf4: the package bitsandbytes is not installed here. Add it to the environment, or set stage.lora.base=''."
        )
    import bitsandbytes

    linear = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    chosen = ((name, module) for name, module in linear if any(re.match(group, f"{name}.weight") for group in groups))
    for name, module in chosen:
        packed = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        packed.bias = module.bias
        outer, _, own = name.rpartition(".")
        setattr(model.get_submodule(outer), own, packed)
    model.is_loaded_in_4bit = True  # peft 0.21 selects its 4-bit adapter layer by this; transformers refuses to cast such a model
