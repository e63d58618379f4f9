import math

import pytest
import torch

from trainer.optim.stochastic_rounding import as_int32, derive_keys, random_words, round_stochastically, split_words

CPU = torch.device("cpu")
COUNT = 2**18


def bits_of(*parts: int | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return split_words(random_words(derive_keys(*parts), 0, COUNT, CPU))


def test_bits_depend_on_the_element_and_not_on_how_it_is_reached() -> None:
    keys = derive_keys(3, 7, "lm_head.weight")
    whole = random_words(keys, 0, 1000, CPU)
    assert torch.equal(whole[333:], random_words(keys, 333, 667, CPU))
    torch.rand(5)  # what else is drawn does not matter
    assert torch.equal(whole, random_words(keys, 0, 1000, CPU))
    beyond = random_words(keys, 2**31 - 2, 4, CPU)  # past the signed range
    assert torch.equal(beyond[2:], random_words(keys, 2**31, 2, CPU))
    others = [derive_keys(4, 7, "lm_head.weight"), derive_keys(3, 8, "lm_head.weight"), derive_keys(3, 7, "lm_head.bias")]
    assert len({keys, *others}) == 4


@pytest.mark.parametrize("parts", [(0, 1, "a"), (1, 1, "a"), (0, 2, "a")])
def test_bits_are_even_and_independent(parts: tuple[int | str, ...]) -> None:
    """Bounds are four standard deviations of what an ideal source shows."""
    drawn = [bits.double() for bits in bits_of(*parts)]
    bound = 4 / math.sqrt(COUNT)
    for bits in drawn:
        assert bits.min() >= 0 and bits.max() <= 0xFFFF
        assert abs(float(bits.mean()) / 65535 - 0.5) < bound / math.sqrt(12)
        counts = torch.bincount((bits.long() >> 8), minlength=256).double()
        chi = float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())
        assert abs(chi - 255) < 4 * math.sqrt(2 * 255)
        for lag in (1, 2, 3, 64):
            assert abs(correlation(bits[lag:], bits[:-lag])) < bound
    later = bits_of(parts[0], 99, parts[2])[0].double()
    for one, other in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2]), (drawn[0], later)):
        assert abs(correlation(one, other)) < bound


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


@pytest.mark.parametrize("value", [1.001, -3.14159, 0.1, 1e-30, 1e-40, 65504.3, 2.0**-126 * 1.3])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    exact = torch.full((COUNT,), value)
    rounded = round_stochastically(exact, bits_of(0, 1, "x")[0]).double()
    low, high = rounded.min(), rounded.max()
    assert low <= float(exact[0]) <= high and len(rounded.unique()) == 2
    step = float(high - low)
    assert abs(float(rounded.mean()) - float(exact[0].double())) < 4 * step * 0.5 / math.sqrt(COUNT)
    nearest = float(exact[0].bfloat16().double())
    assert abs(nearest - float(exact[0].double())) > 0.02 * step  # to nearest there would be a bias to see


def test_exact_values_stay_and_what_is_not_finite_stays_so() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, math.inf, -math.inf])
    ones = torch.full(exact.shape, 0xFFFF, dtype=torch.int32)
    assert torch.equal(round_stochastically(exact, ones).view(torch.int16), exact.bfloat16().view(torch.int16))
    # NaN as the CPU, CUDA and a signal make it: a carry would turn the last ones into zeros and a small number
    patterns = torch.tensor(
        [as_int32(pattern) for pattern in (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)], dtype=torch.int32
    )
    rounded = round_stochastically(patterns.view(torch.float32), ones[:5])
    assert not rounded.isfinite().any()
