"""Attention over packed rows, one sample at a time.

Instead of a mask for the whole row, the attention gets the ends of the samples and computes each sample separately: in a row of many samples
most of the attention matrix would be masked. torch's scaled_dot_product_attention uses its fast path for each, because no mask is needed.
Flash attention does not need this: it finds the samples in a single row from positions that restart at 0.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.contract import InputRefused


def attend_by_sample() -> None:
    """Make every model of this process with sdpa attention accept `sample_ends` (trainer.data.batch.pack) as attention mask."""
    AttentionInterface.register("sdpa", attend)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, (1, heads, T, width) each to (1, T, heads, width). With `sample_ends` as mask, each sample attends only to itself,
    causally. Raises InputRefused for a layer with a sliding window, which needs a mask."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        answer: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return answer
    if options.get("sliding_window") is not None:
        raise InputRefused("this model's layers have a sliding window, which is not supported in packed rows\n    set data.packing=false")
    ends = attention_mask.flatten().tolist()
    lengths = [last - first for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, *sample, None, **{**options, "is_causal": True})[0] for sample in samples]
    return torch.cat(parts, dim=1), None
