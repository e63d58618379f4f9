"""The names of a checkpoint's tensors as those of the model's parameters: transformers renames many on the way in, above all of LLaVA,
InternVL and Qwen-VL, whose files are older than their classes."""

from collections.abc import Iterable

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

Names = dict[str, str]


def name_in_memory(model: torch.nn.Module, saved: Iterable[str]) -> Names:
    """Name in the files -> name in `model`, which transformers has loaded, hollow or not. Without the names of tensors that the model
    does not have, as the talker of Qwen2.5-Omni, and of those that it holds in another form."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter) and not only_dequantizes(one)]
    has = model.state_dict(keep_vars=True)  # with what transformers counts as tied
    found: Names = {}
    for name in saved:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, has)
        if renamed not in has and name in has:  # as transformers itself looks again
            renamed, converted = name, None
        if converted is None and renamed in has:
            found[name] = renamed
    return found


def find_tied(model: torch.nn.Module) -> Names:
    """Name of a parameter that is another one's -> that one."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def only_dequantizes(converter: WeightConverter) -> bool:
    """Whether it does nothing but make numbers of codes, under the same name."""
    return all(type(operation).__name__.endswith("Dequantize") for operation in converter.operations)
