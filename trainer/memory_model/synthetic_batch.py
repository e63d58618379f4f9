"""A micro-batch without real data: as long as the plan allows, with the largest image that takes at most half of it."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.collate import Features, join, make_features
from trainer.data.encode import IGNORED, token_ids
from trainer.models.family import Processor

SIDES = (4096, 3584, 3072, 2688, 2240, 1792, 1568, 1344, 1120, 896, 784, 672, 560, 448, 336, 280, 224, 168, 112, 84, 56, 28)  # pixels
MIN_TEXT_TOKENS = 2  # one to train on, and one before it


@dataclass(frozen=True, kw_only=True)
class SyntheticBatch:
    """`batch`: like that of `collate`, (samples, length). `image_size`: of the one image of each sample, () if none fits."""

    batch: dict[str, Tensor]
    image_size: tuple[int, ...]
    image_tokens: int
    trained_tokens: int


def make_synthetic_batch(processor: Processor, spec: TrainSpec) -> SyntheticBatch:
    """Every sample is one square image and a text that is in the loss from end to end."""
    samples, length = spec.batch.micro_batch, spec.data.max_length
    side = choose_side(processor, length)
    span = processor.span((side, side), 0) if side else ()
    letter = token_ids(processor.tokenizer, "a")[0]
    row = [*span, *[letter] * (length - len(span))]
    input_ids = torch.tensor([row] * samples, dtype=torch.int64)
    labels = torch.tensor([[IGNORED] * len(span) + row[len(span) :]] * samples, dtype=torch.int64)
    images: list[Features] = [make_features(Image.new("RGB", (side, side)), processor)] * samples if side else []
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        **processor.text_inputs(input_ids),
        **join(images, processor),
    }
    trained = int((labels[:, 1:] != IGNORED).sum())
    return SyntheticBatch(batch=batch, image_size=(side, side) if side else (), image_tokens=len(span) * samples, trained_tokens=trained)


def choose_side(processor: Processor, length: int) -> int:
    """In pixels: the largest whose tokens are at most half of `length`, else the largest that fits at all, else 0."""
    tokens = {side: len(processor.span((side, side), 0)) for side in SIDES}
    for most in (length // 2, length - MIN_TEXT_TOKENS):
        fitting = [count for count in tokens.values() if count <= most]
        if fitting:
            return min(side for side, count in tokens.items() if count == max(fitting))
    return 0
