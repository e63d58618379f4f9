"""Position embeddings of image patches: sines of rows and columns, and interpolation of learned positions to another grid.

Interpolation along a side is a multiplication by a constant matrix, which torch's bicubic kernel computes once on the CPU. On the device only
matrix products run, forward and backward: NPUs have no backward pass of the antialiased kernel.
"""

from functools import cache
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

BASE = 10_000.0  # of the wavelengths


def sines(width: int, side: int) -> Tensor:
    """(side * side, width) float32: sines and cosines of the column in the first half, of the row in the second (Vaswani et al., arXiv
    1706.03762, section 3.5, for two dimensions as in MAE, He et al., arXiv 2111.06377)."""
    frequencies = BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = along.expand(side, side, -1), along[:, None].expand(side, side, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()


def interpolate_pos_embed(positions: Tensor, side: int, *, antialias: bool) -> Tensor:
    """Positions of a square grid (positions, width), interpolated to `side` x `side`: (side * side, width), in the same dtype."""
    before = isqrt(len(positions))
    if before == side:
        return positions
    weights = interpolation_matrix(before, side, antialias).to(positions.device)
    grid = positions.float().view(before, before, -1)
    return torch.einsum("ip,jq,pqd->ijd", weights, weights, grid).flatten(0, 1).to(positions.dtype)


@cache
def interpolation_matrix(before: int, after: int, antialias: bool) -> Tensor:
    """(after, before) float32: the weights of the old positions for each new one along a side (Keys, 1981, a = -0.75; edges repeated)."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(before, dtype=torch.float32, device="cpu")[None, None]  # one row for each old position
        return interpolate(identity, size=(before, after), mode="bicubic", antialias=antialias)[0, 0].T.contiguous()
