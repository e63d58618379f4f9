"""Packed rows to the tensors of a micro-batch: several samples one after the other, each with positions of its own.

transformers tells the samples of a row apart by positions that begin anew, and only where it is given no attention mask
(masking_utils.find_packed_sequence_indices, 5.23). So no token sees one of another sample, and the image towers see what they always see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.cache import Cache
from trainer.data.collate import Features, dummy_images, encode_cached, integers, join, load_images, needs_dummy
from trainer.data.encode import IGNORED
from trainer.data.sample import Sample

if TYPE_CHECKING:
    from trainer.models.family import Processor


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens that see each other and no others. `useful`: those of a sample, not of a dummy image or padding."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Features, ...] = ()
    useful: bool = False


def collate_packed(
    rows: Sequence[Sequence[Sample]], processor: "Processor", spec: TrainSpec, cache: Cache | None = None
) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask and position_ids of B rows, [B, T] int64 ([4, B, T] positions where the family has them in three
    dimensions), and the tensors of the images in the order of the rows.

    attention_mask is 1 on the samples' tokens, and is there to be counted: the model must get position_ids without it. A row without a
    sample is padding alone. For a processor with position_ids. Raises InputRefused as `collate` does.
    """
    cache = Cache(0) if cache is None else cache
    packed = [[sample_block(sample, processor, spec, cache) for sample in row] for row in rows]
    if needs_dummy([block.images for row in packed for block in row], spec):
        packed[-1].append(dummy_block(processor, spec, cache))  # rows come by length, so that the last one has most room
    used = [sum(len(block.input_ids) for block in row) for row in packed]
    width = max(1, *used)
    for row, tokens in zip(packed, used, strict=True):
        if tokens < width:
            row.append(padding_block(width - tokens, processor.tokenizer.pad_token_id or 0))
    input_ids = integers([[token for block in row for token in block.input_ids] for row in packed])
    return {
        "input_ids": input_ids,
        "labels": integers([[label for block in row for label in block.labels] for row in packed]),
        "attention_mask": integers([[int(block.useful) for block in row for _ in block.input_ids] for row in packed]),
        "position_ids": torch.stack([torch.cat([positions(block, processor) for block in row], dim=-1) for row in packed], dim=-2),
        **processor.text_inputs(input_ids),
        **join([image for row in packed for block in row for image in block.images], processor),
    }


def positions(block: Block, processor: "Processor") -> Tensor:
    return processor.position_ids(torch.tensor(block.input_ids, dtype=torch.int64), [image.tensors for image in block.images])


def sample_block(sample: Sample, processor: "Processor", spec: TrainSpec, cache: Cache) -> Block:
    """The first label goes: what stands before it is another sample's, and must not learn to say it."""
    images = load_images(sample, processor, cache)
    text = encode_cached(sample, processor, spec, images, cache)
    return Block(input_ids=text.input_ids, labels=[IGNORED, *text.labels[1:]], images=images, useful=True)


def dummy_block(processor: "Processor", spec: TrainSpec, cache: Cache) -> Block:
    (image,) = dummy_images(processor, cache)
    ids = list(processor.span(image.size, 0))
    return Block(input_ids=ids, labels=[IGNORED] * len(ids), images=(image,))


def padding_block(length: int, pad: int) -> Block:
    return Block(input_ids=[pad] * length, labels=[IGNORED] * length)
