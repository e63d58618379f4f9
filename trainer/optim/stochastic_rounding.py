"""Stochastic rounding of float32 to bfloat16, with counter-based random bits.

A bfloat16 has 8 significant bits: rounded to nearest, a weight of 1 never changes under updates below 0.002, however many there are.
Rounded up with the probability given by the discarded bits, it moves correctly on average (Gupta et al., Deep Learning with Limited
Numerical Precision, arXiv 1502.02551, section 3; for training in bfloat16 alone Zamirai et al., arXiv 2010.06192).

The bits of an element depend on seed, update, parameter and the element's index, not on earlier draws or on which rank holds it: a run that
is resumed, or split over another number of ranks, rounds the same way. Only int32 arithmetic is used, which every device has.
"""

import hashlib
import math

import torch
from torch import Tensor

WORD = 2**32
LOW = 0xFFFF
# A 32-bit mixer in which every input bit affects every output bit (github.com/skeeto/hash-prospector, [16 21f0aaad 15 d35a2d97 15]).
MULTIPLIERS, SHIFTS = (0x21F0AAAD, 0xD35A2D97), (16, 15, 15)


def derive_keys(*parts: int | str) -> tuple[int, int]:
    """Two 32-bit keys from the values that identify a stream of random bits."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_words(keys: tuple[int, int], start: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements [start, start + count) of a stream: (count,) int32, a pure function of the arguments."""
    words = torch.arange(count, dtype=torch.int32, device=device)
    mix(words.add_(as_int32(start)).bitwise_xor_(as_int32(keys[0])), keys[1])
    return words


def split_words(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers from 0 to 65535 per word, int32; any two of them are independent."""
    low, high = words & LOW, (words >> 16).bitwise_and_(LOW)
    return low, high, low ^ high


def mix(words: Tensor, key: int) -> None:
    """Spread every bit of each int32 over all bits, in place. The masks make the shifts logical: shifts of int32 keep the sign."""
    first, second, third = SHIFTS
    words.bitwise_xor_((words >> first).bitwise_and_(WORD // 2**first - 1)).mul_(as_int32(MULTIPLIERS[0]))
    words.bitwise_xor_((words >> second).bitwise_and_(WORD // 2**second - 1)).bitwise_xor_(as_int32(key)).mul_(as_int32(MULTIPLIERS[1]))
    words.bitwise_xor_((words >> third).bitwise_and_(WORD // 2**third - 1))


def as_int32(value: int) -> int:
    """The signed integer with the lowest 32 bits of `value`: torch accepts no others."""
    value %= WORD
    return value - WORD if value >= WORD // 2 else value


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact; `bits`: int32 from 0 to 65535, one for each value.

    Adding 16 random bits to the 16 bits to be cut off carries into the kept bits with exactly that probability. Exact values and infinities
    stay; NaN becomes infinite, since a carry would turn CUDA's NaN, 0x7FFFFFFF, into a zero. Values above the largest bfloat16 may become
    infinite, as with rounding to nearest. The result is a view of every other 16 bits, to be copied.
    """
    patterns = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).view(torch.int32).add_(bits)
    return patterns.view(torch.bfloat16).view(*values.shape, 2)[..., 1]  # little-endian, as all our hosts and devices are
