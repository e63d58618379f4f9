"""What the trainer needs to know of a family of models, as data and functions; a new family is one file and one table entry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.contract import ModelSpec
from trainer.models.span import Span

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most that an image may cost, 0 = what the processor itself says: `max_pixels` of a whole image (Qwen), `max_tiles` of its tiles
    or slices (InternVL, MiniCPM). A saved processor keeps the limit, so that a server sees what was trained on."""

    max_pixels: int = 0
    max_tiles: int = 0


UNBOUND = Limit()


def no_inputs(input_ids: Tensor) -> Inputs:
    return {}


def count_up(input_ids: Tensor, images: Sequence[Inputs]) -> Tensor:
    """Positions of a text on its own, for families that number tokens and nothing else."""
    return torch.arange(len(input_ids))


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Text and images to tensors.

    `image_features(image)`: what the forward pass takes for one RGB image: pixel_values float32, and the family's own. `axes`: the
    dimension along which each of them joins those of other images, 0 where it is not named.
    `span(size, place)`: the token ids that stand for an image of `size`, (width, height) in pixels, the `place`th of its sample from 0:
    as many image tokens as the model makes of it, and the family's frame around them. From the size alone, without torch.
    `text_inputs(input_ids)`: further inputs of the forward pass, made from input_ids [B, T] int64.
    `position_ids(input_ids, images)`: the positions of one sample, [T] int64, or [4, T] for rotary positions in three dimensions (a plain
    count first, which transformers tells packed samples apart by). `images`: its `image_features`. For a packed row join those of its
    samples along the last dimension, and stack rows along dim=-2: [B, T] or [4, B, T]. None where samples of one row would see
    each other whatever their positions are, so that the family cannot be packed.
    `save(folder)`: every file that transformers' own processor of the family needs to open `folder`.
    """

    tokenizer: Any
    image_features: Callable[[Image], Inputs]
    span: Span
    save: Callable[[Path], None]
    axes: Mapping[str, int] = field(default_factory=dict)
    text_inputs: Callable[[Tensor], Inputs] = no_inputs
    position_ids: Callable[[Tensor, Sequence[Inputs]], Tensor] | None = count_up


@dataclass(frozen=True, kw_only=True)
class Family:
    """`create`: random weights, float32, drawn from torch's current seed. `load`: weights from a local folder in a dtype; `on_meta` without
    their values, on the meta device, at the cost of the folder's config alone.
    `create_processor`, `load_processor`: with the limit of an image, `UNBOUND` for none of ours.
    `unused`: names of parameters that the forward pass computes but never uses, so that no gradient reaches them."""

    name: str
    create: Callable[[ModelSpec], torch.nn.Module]
    load: Callable[..., torch.nn.Module]  # (folder, model, dtype, *, hollow=False)
    create_processor: Callable[..., Processor]  # (model, limit=UNBOUND)
    load_processor: Callable[..., Processor]  # (folder, model, limit=UNBOUND)
    unused: Callable[[torch.nn.Module], frozenset[str]]
