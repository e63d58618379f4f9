"""Learned queries look at the patches of images: the attention of both resamplers, OmniLMM's and MiniCPM-V's."""

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import initialization


class CrossAttention(torch.nn.Module):
    """torch.nn.MultiheadAttention's parameters by its names. That module hands the weight of its last layer to a function, past the
    hooks by which ZeRO 3 brings it, and makes masks that not every device's kernels take."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = torch.nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * width))
        self.out_proj = torch.nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(queries, width), the same for every part of an image, (parts, patches, width) twice -> (parts, queries, width). `mask`:
        (parts, patches) bool, True where there is a patch; None where there is one everywhere."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = zip((queries.unsqueeze(0), keys, values), weights, biases, strict=True)
        q, k, v = (linear(*each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in inputs)
        seen = scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v, None if mask is None else mask[:, None, None, :])
        mixed: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return mixed

    def initialise(self) -> None:
        """A random start of the bare tensors; what transformers marks as loaded stays."""
        initialization.xavier_uniform_(self.in_proj_weight)
        initialization.zeros_(self.in_proj_bias)
