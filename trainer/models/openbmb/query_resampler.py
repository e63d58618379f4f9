"""A fixed number of learned queries that look at an image's patches once: the resampler of OmniLMM and MiniCPM-V 1.0.

One cross attention as in Qwen-VL (Bai et al., arXiv 2308.12966, section 2.1). Queries lie on a square grid and so do the patches; both carry
the sines of their places. Parameters have the names of the published checkpoints.
"""

from math import isqrt

import torch
from torch import Tensor
from transformers import initialization

from trainer.models.openbmb.cross_attention import CrossAttention
from trainer.models.openbmb.position_embedding import interpolate_pos_embed, sines

EPSILON = 1e-6
STD = 0.02  # of a random start


class QueryResampler(torch.nn.Module):
    """`width`: of the decoder, `source`: of the tower, `queries`: a square number."""

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
        """(images, patches, source) -> (images, queries, width). Patches are those of a square, row by row."""
        places = interpolate_pos_embed(self.pos_embed, isqrt(patches.shape[1]), antialias=False)
        values = self.ln_kv(self.kv_proj(patches))
        seen: Tensor = self.ln_post(self.attn(self.ln_q(self.query) + self.pos_embed, values + places, values))
        return seen @ self.proj

    def initialise(self) -> None:
        """The bare tensors of a random start; what transformers marks as loaded stays."""
        initialization.trunc_normal_(self.query, std=STD)
        initialization.normal_(self.proj, std=len(self.proj) ** -0.5)
        initialization.copy_(self.pos_embed, sines(self.pos_embed.shape[1], isqrt(len(self.pos_embed))).to(self.pos_embed))
