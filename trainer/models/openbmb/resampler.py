"""The perceiver resampler of MiniCPM-V 2.6: learned queries attend to the patches of a part of an image, with any grid of patches.

As in Qwen-VL (Bai et al., arXiv 2308.12966, section 2.1) and MiniCPM-V (Yao et al., arXiv 2408.01800, section 3.1). The parameters have the
names of the published checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import initialization

from trainer.models.openbmb.cross_attention import CrossAttention

EPSILON = 1e-6
WAVELENGTH = 10_000.0


class Resampler(torch.nn.Module):
    """`queries` vectors of `width` for each part of an image whose patches have `patch_width`."""

    def __init__(self, *, queries: int, width: int, heads: int, patch_width: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(queries, width))
        self.proj = torch.nn.Parameter(torch.empty(width, width))
        self.kv_proj = torch.nn.Linear(patch_width, width, bias=False) if patch_width != width else torch.nn.Identity()
        self.attn = CrossAttention(width, heads)
        self.ln_q = torch.nn.LayerNorm(width, eps=EPSILON)
        self.ln_kv = torch.nn.LayerNorm(width, eps=EPSILON)
        self.ln_post = torch.nn.LayerNorm(width, eps=EPSILON)

    def forward(self, patches: Tensor, sizes: Sequence[Sequence[int]], mask: Tensor | None) -> Tensor:
        """(parts, most patches, patch width) -> (parts, queries, width). `sizes`: rows and columns of patches of each part; `mask`: as in
        CrossAttention."""
        values = self.ln_kv(self.kv_proj(patches))
        places = grid_positions(sizes, values.shape[-1], values.device).to(values.dtype)
        out = self.ln_post(self.attn(self.ln_q(self.query), values + places, values, mask))
        return out @ self.proj  # type: ignore[no-any-return]

    def initialise(self) -> None:
        """Random values of the bare tensors; transformers skips those that were loaded."""
        initialization.normal_(self.query, std=0.02)
        initialization.normal_(self.proj, std=self.proj.shape[0] ** -0.5)


def grid_positions(sizes: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """(parts, most patches, width) float32, zero after the last patch of a part. The first half has sines and cosines of the column, the
    second half those of the row, with the wavelengths of Vaswani et al. (arXiv 1706.03762), section 3.5."""
    half = width // 2
    longest = max(max(size) for size in sizes)
    table = side_positions(longest, half, device)
    parts = [
        torch.cat([table[:columns].expand(rows, -1, -1), table[:rows, None].expand(-1, columns, -1)], dim=-1).flatten(0, 1)
        for rows, columns in sizes
    ]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def side_positions(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width) float32."""
    frequencies = WAVELENGTH ** -(torch.arange(width // 2, dtype=torch.float32, device=device) / (width // 2))
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
