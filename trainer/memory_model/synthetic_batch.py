"""A micro-batch without real data, of the sizes that the plan's estimate assumes (launcher.memory.tokens): rows as long as data.max_length, each
with the largest image that the processor takes, or that fits into the row; for a built-in set rows with its images of 8 x 8 pixels."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.collate import Features, join, make_features
from trainer.data.chat.segment_ids import token_ids
from trainer.data.encode import IGNORED
from trainer.models.family import Processor

BUILTIN_SIDE, BUILTIN_TEXT_TOKENS = 8, 64  # launcher.memory.tokens
OBLONG = (1120, 896)  # pixels: of 28 x 28 units this has 1,280, the largest image of Qwen2.5-VL's class, which no square has
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
    if spec.data.builtin and not spec.data.packing:
        size: tuple[int, int] | None = (BUILTIN_SIDE, BUILTIN_SIDE)
        length = min(length, len(processor.span(size, 0)) + BUILTIN_TEXT_TOKENS)
    else:
        size = choose_size(processor, length)
    span = processor.span(size, 0) if size else ()
    letter = token_ids(processor.tokenizer, "a")[0]
    row = [*span, *[letter] * (length - len(span))]
    input_ids = torch.tensor([row] * samples, dtype=torch.int64)
    labels = torch.tensor([[IGNORED] * len(span) + row[len(span) :]] * samples, dtype=torch.int64)
    images: list[Features] = [make_features(Image.new("RGB", size), processor)] * samples if size else []
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        **processor.text_inputs(input_ids),
        **join(images, processor),
    }
    trained = int((labels[:, 1:] != IGNORED).sum())
    return SyntheticBatch(batch=batch, image_size=size or (), image_tokens=len(span) * samples, trained_tokens=trained)


def choose_size(processor: Processor, length: int) -> tuple[int, int] | None:
    """Width and height in pixels: the smallest image with the most tokens that fit into a row; None if none fits."""
    sizes = ((side, side) for side in SIDES)
    tokens = {size: len(processor.span(size, 0)) for size in (*sizes, OBLONG)}
    fitting = {size: count for size, count in tokens.items() if count <= length - MIN_TEXT_TOKENS}
    return min(
        (size for size, count in fitting.items() if count == max(fitting.values())), key=lambda size: size[0] * size[1], default=None
    )
