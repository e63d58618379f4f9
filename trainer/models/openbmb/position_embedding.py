"""Where the patches of an image lie: sines of their rows and columns, and learned positions of one grid carried over to another.

Interpolation along a side is a product with a fixed matrix. It is made once, on the CPU, by torch's own bicubic kernel; what runs on the
device, forward and backward, are products, which every accelerator has, as no NPU has the backward pass of the antialiased kernel.
"""

from functools import cache
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

BASE = 10_000.0  # of the sines' wavelengths


def sines(width: int, side: int) -> Tensor:
    """(side * side, width) float32: sines and cosines of the column in the first half, of the row in the second (Vaswani et al., arXiv
    1706.03762, section 3.5, for each of two dimensions, as in MAE, He et al., arXiv 2111.06377)."""
    speeds = BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * speeds
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = along.expand(side, side, -1), along[:, None].expand(side, side, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()


def interpolate_pos_embed(positions: Tensor, side: int, *, antialias: bool) -> Tensor:
    """Positions of a square grid, (places, width), for one of `side` by `side`: (side * side, width), in the same dtype."""
    before = isqrt(len(positions))
    if before == side:
        return positions
    weights = weigh(before, side, antialias).to(positions.device)
    grid = positions.float().view(before, before, -1)
    return torch.einsum("ip,jq,pqd->ijd", weights, weights, grid).flatten(0, 1).to(positions.dtype)


@cache
def weigh(before: int, after: int, antialias: bool) -> Tensor:
    """(after, before) float32: what each old place adds to each new one along a side (Keys, 1981, with a = -0.75; edges repeated)."""
    with torch.inference_mode(False), torch.no_grad():
        each = torch.eye(before, dtype=torch.float32, device="cpu")[None, None]  # a row for each old place, which stays a row
        return interpolate(each, size=(before, after), mode="bicubic", antialias=antialias)[0, 0].T.contiguous()
