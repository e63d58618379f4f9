"""Block-wise dynamic quantization of float32 to 8 bits (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
section 2), in operations that torch has on every device.

An element is stored as a code, an index into a map of 256 numbers, and is that number times the scale of its block. The maps are the
paper's: seven decades up to 1, each divided into twice as many equal parts as the one below; the unsigned map into twice as many again.
Two things are our own:

- The scale is the element with the largest magnitude, with its sign. The paper's map has 1 but not -1, so each block has one element that
  is exact whatever its sign, and quantizing a second time gives bitwise identical results.
- In the unsigned map only zero becomes zero. If a second moment became zero where the first one is not, the update would be divided by
  epsilon alone and be thousands of times too large.

Codes are rounded to nearest or, with random bits, stochastically so that the mean is exact. Second moments need that: with a beta of 0.999
they move by a thousandth of their value per step, codes are up to a tenth apart, and rounding to nearest would keep them in place.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # elements per scale: as bitsandbytes since 0.44 (optim/optimizer.py); the paper has 2048
DECADES = 7
LEADING = 16  # bits of a float32: sign, exponent, 7 of the fraction. No two bounds have these in common


@cache
def make_map(device: torch.device, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The numbers by code, (256,) float32, ascending; and the upper bounds, (256,) float32, the last one infinite: a value between bounds
    i - 1 and i has the code i."""
    numbers = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        middles = [(0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade + 1 - DECADES) for part in range(parts)]
        numbers += [*middles, *(-middle for middle in middles if signed)]
    table = torch.tensor(sorted(numbers), dtype=torch.float64)
    bounds = torch.cat([(table[:-1] + table[1:]) / 2, torch.tensor([torch.inf])])
    if not signed:
        bounds[0] = 0.0
    return table.to(device, torch.float32), bounds.to(device, torch.float32)


@cache
def make_index(device: torch.device, *, signed: bool) -> Tensor:
    """(2**16,) int32: the code of the smallest number with these leading bits, indexed by the bits as a signed number plus 2**15. It replaces
    a binary search, which is six times slower on a CPU and may differ between devices."""
    bits = torch.arange(-(2 ** (LEADING - 1)), 2 ** (LEADING - 1), dtype=torch.int32)
    least = torch.where(bits < 0, (bits << LEADING) | 0xFFFF, bits << LEADING).view(torch.float32)
    _, bounds = make_map(torch.device("cpu"), signed=signed)
    return torch.searchsorted(bounds, least, out_int32=True).clamp_(max=255).to(device)


def quantize(values: Tensor, *, signed: bool, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(blocks, BLOCK) float32 -> codes of that shape, uint8, and scales (blocks,), float32. A block with a NaN becomes NaN. `bits`: int32
    from 0 to 65535 for each value, flat, for stochastic rounding; without them to nearest."""
    high, low = values.amax(dim=1), values.amin(dim=1)
    scales = torch.where(high >= -low, high, low)
    shares = (values / torch.where(scales == 0, 1.0, scales).unsqueeze(1)).view(-1)
    codes = make_index(values.device, signed=signed).index_select(0, (shares.view(torch.int32) >> LEADING) + 2 ** (LEADING - 1))
    numbers, bounds = make_map(values.device, signed=signed)
    codes += shares > bounds.index_select(0, codes)
    if bits is not None:
        codes = round_codes(codes, shares, numbers, bits)
    return codes.to(torch.uint8).view(values.shape), scales


def round_codes(nearest: Tensor, shares: Tensor, numbers: Tensor, bits: Tensor) -> Tensor:
    """The code below or above each value, with the probability that makes the mean exact: (n,) int32."""
    low = nearest - (numbers.index_select(0, nearest) > shares).int()
    below, above = numbers.index_select(0, low), numbers.index_select(0, (low + 1).clamp_(max=255))
    low += bits * ((above - below) / 2**16) < shares - below
    return torch.where((numbers[0] == 0) & (shares > 0), low.clamp(min=1), low)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """(blocks, BLOCK) uint8 and (blocks,) float32 -> (blocks, BLOCK) float32."""
    numbers, _ = make_map(codes.device, signed=signed)
    return numbers.index_select(0, codes.view(-1).int()).view(codes.shape).mul_(scales.unsqueeze(1))
