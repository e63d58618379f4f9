"""What the trainer needs of a model's tokenizer and image processor. Each family (trainer.models) makes one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.chat.conversation import ChatTemplate

Inputs = dict[str, Tensor]


def no_inputs(input_ids: Tensor) -> Inputs:
    return {}


def count_up(input_ids: Tensor, images: Sequence[Inputs]) -> Tensor:
    """One-dimensional positions: 0, 1, 2, ..."""
    return torch.arange(len(input_ids))


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Text and images to tensors.

    `image_features(image)`: the inputs of the forward pass for one RGB image: pixel_values float32, and further ones of the family. `axes`:
    the dimension along which each of them is concatenated with those of other images; 0 by default.
    `span(size, index)`: the token ids that replace an image of `size`, (width, height) in pixels, the `index`th (from 0) of its sample: as
    many image tokens as the model makes of it, and the family's start and end tokens. Computed from the size alone, without torch.
    `text_inputs(input_ids)`: further inputs of the forward pass, made from input_ids [B, T] int64.
    `position_ids(input_ids, images)`: the positions of one sample, [T] int64; [4, T] for three-dimensional rotary positions, where the first
    row is a plain count by which transformers separates packed samples. `images`: its `image_features`. For a packed row, concatenate those
    of its samples along the last dimension, and stack rows along dim=-2: [B, T] or [4, B, T]. None if the samples of a row would attend to
    each other in any case, so that the family does not support packing.
    `scaled(size)`: (width, height) in pixels that an image of `size` is scaled to, for families whose boxes count those pixels.
    `save(folder)`: writes every file that transformers' own processor of the family needs.
    `image_mark`: what stands for an image in the chat template; '' = the image token. `template`: what conversations are written with, None = that of
    the spec; `notes`: lines about it for the user.
    """

    tokenizer: Any
    image_features: Callable[[Image], Inputs]
    span: Callable[[tuple[int, int], int], tuple[int, ...]]
    save: Callable[[Path], None]
    axes: Mapping[str, int] = field(default_factory=dict)
    text_inputs: Callable[[Tensor], Inputs] = no_inputs
    position_ids: Callable[[Tensor, Sequence[Inputs]], Tensor] | None = count_up
    scaled: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    image_mark: str = ""
    template: ChatTemplate | None = None
    notes: tuple[str, ...] = ()


def template_of(processor: Processor, spec: TrainSpec) -> ChatTemplate:
    """What the conversations of a run are written with."""
    return processor.template or spec.model.template
