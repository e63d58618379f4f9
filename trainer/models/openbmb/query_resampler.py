"""The resampler of OmniLMM and MiniCPM-V 1.0: a fixed number of learned queries attend to the patches of an image.

One cross attention as in Qwen-VL (Bai et al., arXiv 2308.12966, section 2.1). Queries and patches are both on square grids with sinusoidal
position embeddings. The parameters have the names of the published checkpoints.
"""

from math import isqrt

import torch
from torch import Tensor
from transformers import initialization

from trainer.models.openbmb.cross_attention import CrossAttention
from trainer.models.openbmb.position_embedding import interpolate_pos_embed, sines

EPSILON = 1e-6
STD = 0.02  # of random initial values


class QueryResampler(torch.nn.Module):
    """`width`: of the decoder; `source`: of the tower; `queries`: a square number."""

    def __init__(self, *, width: int, source: int, queries: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("pos_embed", sines(width, isqrt(queries)).to(torch.get_default_dtype()))
        self.query = torch.nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = torch.nn.Linear(source, width, bias=False) if source != width else torch.nn.Identity()
        self.attn = CrossAttention(width, heads)
        self.ln_q = torch.nn.LayerNorm(width, eps=EPSILON)
        self.ln_kv = torch.nn.LayerNorm(width, eps=EPSILON)
        self.ln_post = torch.nn.LayerNorm(width, eps=EPSILON)
        self.proj = torch.nn.Parameter(torch.zeros(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(images, patches, source) -> (images, queries, width). The patches are those of a square, row by row."""
        places = interpolate_pos_embed(self.pos_embed, isqrt(patches.shape[1]), antialias=False)
        values = self.ln_kv(self.kv_proj(patches))
        seen: Tensor = self.ln_post(self.attn(self.ln_q(self.query) + self.pos_embed, values + places, values))
        return seen @ self.proj

    def initialise(self) -> None:
        """Random values of the bare tensors; transformers skips those that were loaded."""
        initialization.trunc_normal_(self.query, std=STD)
        initialization.normal_(self.proj, std=len(self.proj) ** -0.5)
        initialization.copy_(self.pos_embed, sines(self.pos_embed.shape[1], isqrt(len(self.pos_embed))).to(self.pos_embed))
