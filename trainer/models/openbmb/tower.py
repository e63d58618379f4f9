"""Vision transformers with timm's parameter names, as in the checkpoints of OmniLMM and MiniCPM-V 1.0: SigLIP and EVA-02-CLIP.

Both are plain vision transformers (Dosovitskiy et al., arXiv 2010.11929) with learned positions. SigLIP (Zhai et al., arXiv 2303.15343) has no
class token and is pre-norm. EVA-02-CLIP enormous (Sun et al., arXiv 2303.15389) has a class token, normalizes the output of attention and MLP,
and has no bias for keys. Images are square, with any side; the positions are interpolated to its grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.models.openbmb.position_embedding import interpolate_pos_embed

EPSILON = 1e-6
STD = 0.02  # of a random start


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """`layers`: those that are used, one fewer than in the paper if the last one is dropped. `positions`: along a side of the images that the
    tower was pretrained on. `eva`: EVA-02-CLIP, else SigLIP."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    patch_size: int
    positions: int
    eva: bool


def read_shape(sizes: dict[str, Any], *, eva: bool) -> TowerShape:
    """`sizes`: with the keys of conf/model."""
    return TowerShape(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        patch_size=sizes["patch_size"],
        positions=sizes["positions"],
        eva=eva,
    )


class Tower(torch.nn.Module):
    """Images to features of their patches."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.classes = int(shape.eva)
        self.patch_embed = Patches(shape)
        if shape.eva:
            self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, shape.hidden_size))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, shape.positions**2 + self.classes, shape.hidden_size))
        self.blocks = torch.nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = torch.nn.LayerNorm(shape.hidden_size, eps=EPSILON)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, side, side) -> (images, patches, width), without the class token."""
        patches = self.patch_embed(pixel_values)
        side = pixel_values.shape[-1] // self.patch_embed.proj.kernel_size[0]
        first, rest = self.pos_embed[:, : self.classes], self.pos_embed[0, self.classes :]
        hidden = patches + interpolate_pos_embed(rest, side, antialias=True)
        if self.classes:
            hidden = torch.cat(((self.cls_token + first).expand(len(hidden), -1, -1), hidden), dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        normed: Tensor = self.norm(hidden[:, self.classes :])
        return normed

    def initialise(self) -> None:
        """Random values of the bare tensors; transformers skips those that were loaded."""
        for tensor in (self.pos_embed, *((self.cls_token,) if self.classes else ())):
            initialization.trunc_normal_(tensor, std=STD)


class Patches(torch.nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.proj = torch.nn.Conv2d(3, shape.hidden_size, kernel_size=shape.patch_size, stride=shape.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        made: Tensor = self.proj(pixel_values).flatten(2).transpose(1, 2)
        return made


class Block(GradientCheckpointingLayer):
    """(images, tokens, width) -> the same."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.eva = shape.eva
        self.norm1 = torch.nn.LayerNorm(shape.hidden_size, eps=EPSILON)
        self.attn = Attention(shape)
        self.norm2 = torch.nn.LayerNorm(shape.hidden_size, eps=EPSILON)
        self.mlp = Mlp(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.eva:
            hidden = hidden + self.norm1(self.attn(hidden))
            return hidden + self.norm2(self.mlp(hidden))  # type: ignore[no-any-return]
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))  # type: ignore[no-any-return]


class Attention(torch.nn.Module):
    """Attention between all patches, without a mask: always torch's kernel, whatever attention the decoder has."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = torch.nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=not shape.eva)
        if shape.eva:
            self.q_bias = torch.nn.Parameter(torch.zeros(shape.hidden_size))
            self.v_bias = torch.nn.Parameter(torch.zeros(shape.hidden_size))
        self.proj = torch.nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        if self.qkv.bias is None:
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        mixed: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed

    def initialise(self) -> None:
        for bias in (self.q_bias, self.v_bias) if self.qkv.bias is None else ():
            initialization.zeros_(bias)


class Mlp(torch.nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = torch.nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.fc2(gelu(self.fc1(hidden)))
        return made
