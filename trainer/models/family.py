"""What the trainer needs to know of a family of models, as data and functions; a new family is one file and one table entry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.contract import ModelSpec

Features = tuple[dict[str, Tensor], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Text and images to tensors.

    `image_features(images)`: the family's image inputs, stacked over images (pixel_values (images, 3, height, width) float32 and
    whatever else the forward pass takes), and how many image tokens each image becomes. `save(folder)`: every file that
    transformers' own processor of the family needs to open `folder`.
    """

    tokenizer: Any
    image_features: Callable[[Sequence[Image]], Features]
    save: Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`create`: random weights, float32, drawn from torch's current seed. `load`: weights from a local folder in a dtype.
    `unused`: names of parameters that the forward pass computes but never uses, so that no gradient reaches them."""

    name: str
    create: Callable[[ModelSpec], torch.nn.Module]
    load: Callable[[Path, ModelSpec, torch.dtype], torch.nn.Module]
    create_processor: Callable[[ModelSpec], Processor]
    load_processor: Callable[[Path, ModelSpec], Processor]
    unused: Callable[[torch.nn.Module], frozenset[str]]
