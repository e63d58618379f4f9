"""Attention over packed rows, sample by sample.

In place of a mask of the whole square the attention is told where each sample ends, and computes each sample's own square: at rows of many
samples most of the square would be computed for nothing. torch's scaled_dot_product_attention takes its fast path for each, since none
needs a mask. Flash attention finds the samples by itself, from positions that begin anew, in a single row.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.contract import InputRefused


def attend_by_sample() -> None:
    """Let every model of this process take `sample_ends` for its attention mask, where its attention is sdpa."""
    AttentionInterface.register("sdpa", attend)


def sample_ends(lengths: list[int]) -> Tensor:
    """Where samples end, [1, 1, 1, samples] int32, on the CPU: transformers hands on what has four dimensions as it is
    (masking_utils._preprocess_mask_arguments), and each layer reads it without waiting for the device."""
    return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).view(1, 1, 1, -1)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, (1, heads, T, width) each to (1, T, heads, width); with `sample_ends` for a mask each sample sees itself alone,
    causally. Raises InputRefused where a layer has a sliding window, which no mask is left to tell."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        answer: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return answer
    if options.get("sliding_window") is not None:
        raise InputRefused("this model's layers have a sliding window, which packed rows do not keep\n    set data.packing=false")
    ends = attention_mask.flatten().tolist()
    lengths = [last - first for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)  # a slice's gradient is as long as the row
    parts = [sdpa_attention_forward(module, *sample, None, **{**options, "is_causal": True})[0] for sample in samples]
    return torch.cat(parts, dim=1), None
