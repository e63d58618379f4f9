"""The forward pass of peft's layer of single token rows, without its copy of the whole matrix in each pass."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear


def put_rows(layer: Any, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
    """TrainableTokensLayer.forward_adapters. Embeddings: ids (...) -> (..., width). Head: (..., width) -> logits (..., vocabulary)."""
    if layer.disable_adapters or layer.merged or not active_adapters:
        return type(layer).forward_adapters(layer, x, active_adapters, *args, **kwargs)  # type: ignore[no-any-return]
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    for name in active_adapters:
        ids = torch.tensor(layer.token_indices[name], device=result.device)
        rows = layer.trainable_tokens_delta[name].to(result.dtype)
        if isinstance(layer.base_layer, torch.nn.Embedding):
            found = x[..., None] == ids
            result = torch.where(found.any(dim=-1, keepdim=True), embedding(found.int().argmax(dim=-1), rows), result)
        else:
            result = result.index_copy(-1, ids, linear(x, rows))
    return result
