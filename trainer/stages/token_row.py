"""Rows of new tokens, trained with LoRA while the other rows of embeddings and head stay frozen, by peft's trainable_token_indices.

peft's own layer (0.21, tuners/trainable_tokens/layer.py) copies the whole matrix in each forward pass, one gigabyte for 150,000 tokens, and
does not call the layer that it wraps, so that hooks on it are lost. Here the frozen layer is called, and the trained rows are put in
its output (trainer.stages.token_layer). Names, files and what a merge gives are peft's.
"""

from types import MethodType
from typing import Any

import torch

from trainer.models.added_token import ADDED_IDS
from trainer.stages.token_layer import put_rows

TOKEN_ROWS = ".trainable_tokens_delta."  # part of the name of the parameter that has the rows


def find_token_rows(model: Any) -> dict[str, list[int]]:
    """Module name -> the rows of the new tokens, of embeddings and head; {} without new tokens. A tied head is not listed: peft follows the
    embeddings."""
    ids = getattr(model, ADDED_IDS, ())
    if not ids:
        return {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = () if head is None or head.weight is embeddings.weight else (head,)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: list(ids) for module in (embeddings, *apart)}


def train_rows(wrapped: torch.nn.Module) -> None:
    """Use `put_rows` in a model that peft has wrapped. Hooks before the head choose the positions whose logits are computed: they now act
    before the trained rows too."""
    if not wrapped.peft_config["default"].trainable_token_indices:  # type: ignore[index,union-attr]
        return
    from peft.utils.other import TrainableTokensWrapper

    for module in wrapped.modules():
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            layer.forward_adapters = MethodType(put_rows, layer)
            if not isinstance(layer.base_layer, torch.nn.Embedding):
                module._forward_pre_hooks.update(layer.base_layer._forward_pre_hooks)
                layer.base_layer._forward_pre_hooks.clear()
