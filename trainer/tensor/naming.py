"""Maps the tensor names of a checkpoint's files to the names of the model's parameters. transformers renames many when it loads, above all
those of LLaVA, InternVL and Qwen-VL, whose files are older than their classes."""

from collections.abc import Iterable

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

Names = dict[str, str]


def name_in_memory(model: torch.nn.Module, saved: Iterable[str]) -> Names:
    """Name in the files -> name in `model`, which transformers has loaded, possibly on the meta device. Left out: tensors that the model does
    not have, as the talker of Qwen2.5-Omni, and those that it stores in another form."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter) and not only_dequantizes(one)]
    has = model.state_dict(keep_vars=True)  # including tied parameters
    found: Names = {}
    for name in saved:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, has)
        if renamed not in has and name in has:  # transformers does the same
            renamed, converted = name, None
        if converted is None and renamed in has:
            found[name] = renamed
    return found


def find_tied(model: torch.nn.Module) -> Names:
    """Name of a tied parameter -> name of the parameter whose values it uses."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def only_dequantizes(converter: WeightConverter) -> bool:
    """Whether its only operation is dequantization, under the same name."""
    return all(type(operation).__name__.endswith("Dequantize") for operation in converter.operations)
