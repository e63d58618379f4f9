"""int8 weights of linear layers, one scale per output channel, in the format of compressed-tensors, which transformers and vLLM read.

A weight w of (out, in) becomes q = round(w / s) in [-128, 127], with one s per row (symmetric, Jacob et al., arXiv 1712.05877, section
2.1, without a zero point). In the files X.weight becomes X.weight_packed (int32, four q + 128 per word, the first in the lowest byte),
X.weight_scale (out, 1) in the model's dtype and X.weight_shape (2,) int64: format pack-quantized, which vLLM requires for 16-bit activations
(compressed_tensors/compressors/pack_quantized; vllm, compressed_tensors.py, _get_scheme_from_parts).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.tensor.stream import TensorSource, TensorToWrite, read_pieces

LOW, HIGH = -128, 127
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # suffixes of the weight's name
# Shares of a row's largest weight that its scale may cover; the one with the least output error is chosen (OmniQuant's clipping, Shao et
# al., arXiv 2308.13137, section 3.2, by search instead of learning).
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """`error`: norm of the difference over the norm of the weight. `clipped`: number of rows whose scale is smaller than their largest weight
    needs."""

    error: float
    clipped: int


def choose_scales(weight: Tensor, dtype: torch.dtype, power: Tensor | None = None) -> Tensor:
    """(rows, in) float32 -> (rows, 1) in `dtype`. `power`: mean square of each input, (in,) float32; with it each row takes the clip with
    the least output error, the sum over inputs of power * (w - s q)^2."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    best = to_scale(largest, dtype)
    if power is None:
        return best
    least = output_error(weight, best, power)
    for clip in CLIPS[1:]:
        scales = to_scale(largest * clip, dtype)
        error = output_error(weight, scales, power)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def to_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """A row of zeros, or one whose scale would underflow in `dtype`, gets the smallest scale."""
    limits = torch.finfo(dtype)
    return (largest / HIGH).to(dtype).clamp(min=limits.tiny * limits.eps)


def output_error(weight: Tensor, scales: Tensor, power: Tensor) -> Tensor:
    """(rows, 1) float32."""
    difference = weight - round_weight(weight, scales) * scales.float()
    return (difference.square() * power).sum(dim=1, keepdim=True)


def round_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """The codes q, as float32."""
    return (weight / scales.float()).round_().clamp_(LOW, HIGH)


def pack(codes: Tensor) -> Tensor:
    """(rows, in) whole numbers in [-128, 127] -> (rows, ceil(in / 4)) int32."""
    rows, width = codes.shape
    held = torch.zeros(rows, -(-width // 4) * 4, dtype=torch.uint8)
    held[:, :width] = (codes + 128).to(torch.uint8)
    return held.view(torch.int32)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The reverse: (rows, width) float32."""
    return packed.contiguous().view(torch.uint8)[:, :width].float() - 128


def scale_rows(source: TensorSource, power: Tensor | None) -> tuple[Tensor, QuantizationLoss]:
    """The scales of a whole weight, (out, 1) in its dtype, and the loss by them; reads the weight once."""
    scales, lost, norm, clipped = [], 0.0, 0.0, 0
    for rows in read_pieces(source):
        weight = rows.float()
        scales.append(choose_scales(weight, source.dtype, power))
        lost += float((round_weight(weight, scales[-1]) * scales[-1].float()).sub_(weight).double().square().sum())
        norm += float(weight.double().square().sum())
        clipped += int((scales[-1] != choose_scales(weight, source.dtype)).sum())
    return torch.cat(scales), QuantizationLoss(error=(lost / norm) ** 0.5 if norm else 0.0, clipped=clipped)


def quantize_tensor(name: str, source: TensorSource, scales: Tensor) -> tuple[TensorToWrite, ...]:
    """The three tensors that replace the weight `name`."""
    out, width = source.shape

    def pieces() -> Iterator[Tensor]:
        start = 0
        for rows in read_pieces(source):
            yield pack(round_weight(rows.float(), scales[start : start + len(rows)]))
            start += len(rows)

    return (
        TensorToWrite(name=name + PACKED, dtype=torch.int32, shape=(out, -(-width // 4)), pieces=pieces),
        TensorToWrite(name=name + SCALE, dtype=scales.dtype, shape=tuple(scales.shape), pieces=lambda: iter((scales,))),
        TensorToWrite(name=name + SHAPE, dtype=torch.int64, shape=(2,), pieces=lambda: iter((torch.tensor(source.shape),))),
    )


@dataclass(frozen=True, kw_only=True)
class Dequantized:
    """A quantized weight, read as float32 values."""

    packed: TensorSource
    scales: TensorSource
    width: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.packed.shape[0], self.width)

    def read(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor, which must be whole rows: (count,)."""
        first, rows, words = start // self.width, count // self.width, self.packed.shape[1]
        packed = self.packed.read(first * words, rows * words).view(rows, words)
        return (unpack(packed, self.width) * self.scales.read(first, rows).float()[:, None]).view(-1)

    def read_whole(self) -> Tensor:
        return self.read(0, self.shape[0] * self.width).view(self.shape)


def dequantize_sources(sources: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a quantized checkpoint with its weights dequantized; other checkpoints are not changed."""
    found = {name: source for name, source in sources.items() if not is_quantized_part(name, sources)}
    for name in (name for name in sources if name.endswith(f".weight{PACKED}")):
        weight = name.removesuffix(PACKED)
        width = int(sources[weight + SHAPE].read_whole()[1])
        found[weight] = Dequantized(packed=sources[name], scales=sources[weight + SCALE], width=width)
    return found


def is_quantized_part(name: str, sources: Mapping[str, Any]) -> bool:
    return any(name.endswith(f".weight{end}") and f"{name.removesuffix(end)}{PACKED}" in sources for end in (PACKED, SCALE, SHAPE))


def describe_format(ignore: Sequence[str]) -> dict[str, Any]:
    """quantization_config of config.json. `ignore`: linear layers that are not quantized, by regex."""
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
