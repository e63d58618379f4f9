"""peft's layer of single token rows, without its copy of the whole matrix in each forward pass."""

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor
from torch.nn.functional import embedding, linear


class TokenRows(TrainableTokensLayer):  # type: ignore[misc]
    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings: ids (...) -> (..., width). Head: (..., width) -> logits (..., vocabulary)."""
        if self.disable_adapters or self.merged or not active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in active_adapters:
            ids = torch.tensor(self.token_indices[name], device=result.device)
            rows = self.trainable_tokens_delta[name].to(result.dtype)
            if isinstance(self.base_layer, torch.nn.Embedding):
                found = x[..., None] == ids
                result = torch.where(found.any(dim=-1, keepdim=True), embedding(found.int().argmax(dim=-1), rows), result)
            else:
                result = result.index_copy(-1, ids, linear(x, rows))
        return result
