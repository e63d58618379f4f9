"""The maps beside the paper's, the error of a code, and what comes out of a second quantization."""

import pytest
import torch
from torch import Tensor

from trainer.optim.blockwise import BLOCK, dequantize, make_index, make_map, quantize

CPU = torch.device("cpu")


def draw(blocks: int, *, signed: bool, seed: int = 0) -> Tensor:
    """Blocks whose elements lie decades apart, and so do the blocks; (blocks, BLOCK)."""
    draws = torch.Generator().manual_seed(seed)
    decades = torch.rand(blocks, BLOCK, generator=draws) * -9 + torch.rand(blocks, 1, generator=draws) * 20 - 15
    values = 10**decades * torch.randn(blocks, BLOCK, generator=draws)
    return values if signed else values.abs()


def test_the_maps_are_the_papers() -> None:
    """Section 2.1 and its reference implementation: the number of zeros before the indicator bit is the decade, what follows a linear
    fraction, seven bits of it in the map without a sign."""
    signed, unsigned = (make_map(CPU, signed=each)[0].tolist() for each in (True, False))
    assert len(set(signed)) == len(set(unsigned)) == 256
    assert signed == sorted(signed) and unsigned == sorted(unsigned)
    assert max(signed) == max(unsigned) == 1.0 and 0.0 in signed and min(unsigned) == 0.0
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert len([n for n in signed if low < n < high]) == len([n for n in signed if -high < n < -low]) == 2**decade
        assert len([n for n in unsigned if low < n < high]) == 2 ** (decade + 1)
    assert signed[:2] == pytest.approx([-0.99296875, -0.97890625]) and signed[-2:] == pytest.approx([0.99296875, 1.0])
    assert [n for n in signed if abs(n) < 1e-6] == pytest.approx([-5.5e-7, 0.0, 5.5e-7])
    assert unsigned[:3] == pytest.approx([0.0, 3.25e-7, 7.75e-7])


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_number(signed: bool) -> None:
    """The error is at most half of the widest gap beside it, which the paper's map bounds by 0.9 / 2**7 of the block's largest."""
    values = draw(64, signed=signed)
    codes, scales = quantize(values, signed=signed)
    back = dequantize(codes, scales, signed=signed)
    numbers, _ = make_map(CPU, signed=signed)
    shares = (values / scales.unsqueeze(1)).double()
    best = (shares.unsqueeze(2) - numbers.double()).abs().amin(dim=2)
    taken = (shares - numbers[codes.long()].double()).abs()
    vanishing = (shares > 0) & (shares < float(numbers[1])) if not signed else torch.zeros_like(shares, dtype=torch.bool)
    assert torch.allclose(taken[~vanishing], best[~vanishing], atol=1e-7, rtol=0)
    assert (back[vanishing] > 0).all() and vanishing.any() != signed, "what is not zero does not become zero"
    largest = values.abs().amax(dim=1, keepdim=True)
    assert ((back - values).abs() <= largest * 0.9 / 2**7 * 1.001).all()
    assert torch.equal(back.abs().amax(dim=1, keepdim=True), largest)


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_of_many_roundings_is_the_value_and_a_number_of_the_map_stays(signed: bool) -> None:
    numbers, _ = make_map(CPU, signed=signed)
    draws, blocks = torch.Generator().manual_seed(0), 500
    for low in (3, 90, 200, 254):
        below, above = float(numbers[low]), float(numbers[low + 1])
        value = below + 0.2 * (above - below)
        values = torch.full((blocks, BLOCK), value)
        values[:, 0] = 1.0  # the scale
        bits = torch.randint(0, 2**16, (values.numel(),), generator=draws, dtype=torch.int32)
        rounded = dequantize(*quantize(values, signed=signed, bits=bits), signed=signed)[:, 1:]
        share = float((rounded == above).double().mean())
        assert sorted(rounded.unique().tolist()) == [below, above]
        assert abs(share - 0.2) < 5 * (0.2 * 0.8 / rounded.numel()) ** 0.5, "five standard deviations of a mean of so many"
    for bits in (torch.zeros(256, dtype=torch.int32), torch.full((256,), 2**16 - 1, dtype=torch.int32)):
        codes, scales = quantize(numbers.view(1, BLOCK), signed=signed, bits=bits)
        assert codes.flatten().tolist() == list(range(256)) and scales.tolist() == [1.0]


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_quantized_comes_out_of_a_second_quantization_bit_by_bit(signed: bool) -> None:
    codes, scales = quantize(draw(512, signed=signed, seed=3), signed=signed)
    assert signed == bool((scales < 0).any()), "blocks whose largest element is negative"
    values = dequantize(codes, scales, signed=signed)
    again = quantize(values, signed=signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize("signed", [True, False])
def test_the_index_finds_what_a_search_does(signed: bool) -> None:
    """At each bound, and at the numbers just below and above it."""
    _, bounds = make_map(CPU, signed=signed)
    inner = bounds[:-1]
    assert len((inner.view(torch.int32) >> 16).unique()) == 255, "two bounds in one entry of the index"
    assert make_index(CPU, signed=signed).shape == (2**16,)
    up, down = (torch.nextafter(inner, torch.tensor(edge)) for edge in (torch.inf, -torch.inf))
    tried = torch.cat([inner, up, down, torch.tensor([0.0, -0.0, 1.0] + ([-1.0] if signed else []))])
    tried = tried[tried >= (-1.0 if signed else 0.0)]
    blocks = torch.zeros(-(-len(tried) // (BLOCK - 1)), BLOCK)
    blocks[:, 0] = 1.0  # the scale
    for place, part in enumerate(tried.split(BLOCK - 1)):
        blocks[place, 1 : 1 + len(part)] = part
    codes, scales = quantize(blocks, signed=signed)
    assert (scales == 1).all()
    assert torch.equal(codes.int(), torch.searchsorted(inner, blocks, out_int32=True))


def test_nothing_is_made_of_nothing_and_a_nan_is_not_hidden() -> None:
    values = torch.zeros(3, BLOCK)
    values[1, 7] = torch.nan
    values[2, 9] = -2.0
    for signed in (True, False):
        back = dequantize(*quantize(values if signed else values.abs(), signed=signed), signed=signed)
        assert not back[0].any() and back[1].isnan().any()
        assert float(back[2, 9]) == (-2.0 if signed else 2.0) and int(back[2].count_nonzero()) == 1
