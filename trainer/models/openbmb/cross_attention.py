"""Cross attention from learned queries to the patches of images, for the resamplers of OmniLMM and MiniCPM-V."""

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import initialization


class CrossAttention(torch.nn.Module):
    """Has the parameter names of torch.nn.MultiheadAttention. That module passes the weight of its output layer to a function, which bypasses
    the hooks that gather it under ZeRO 3, and creates masks that the kernels of some devices do not support."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = torch.nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * width))
        self.out_proj = torch.nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`queries` (queries, width), the same for every part of an image, `keys` and `values` (parts, patches, width) -> (parts, queries,
        width). `mask`: (parts, patches) bool, True for a patch and False for padding; None without padding."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = zip((queries.unsqueeze(0), keys, values), weights, biases, strict=True)
        q, k, v = (linear(*each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in inputs)
        seen = scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v, None if mask is None else mask[:, None, None, :])
        mixed: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return mixed

    def initialise(self) -> None:
        """Random values of the bare tensors; transformers skips those that were loaded."""
        initialization.xavier_uniform_(self.in_proj_weight)
        initialization.zeros_(self.in_proj_bias)
