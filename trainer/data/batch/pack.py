"""Packed rows to the tensors of a micro-batch: all samples one after the other, each with positions of its own and none with padding.

No token sees one of another sample: the attention is told where samples end (trainer.models.attention), or finds it from positions that
begin anew, as flash attention does in a single row without a mask (transformers' modeling_flash_attention_utils, 5.23, which would let the
samples of several rows see each other). The image towers see what they always see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features, dummy_images, encode_cached, integers, join, load_images, needs_dummy
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.models.attention import sample_ends

if TYPE_CHECKING:
    from trainer.models.family import Processor


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Tokens that see each other and no others. `useful`: those of a sample, not of a dummy image or filling."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Features, ...] = ()
    useful: bool = False


def collate_packed(
    rows: Sequence[Sequence[Sample]], processor: "Processor", spec: TrainSpec, cache: Cache | None = None
) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask and position_ids of all rows as one, [1, T] int64 ([4, 1, T] positions where the family has them in
    three dimensions), sample_ends for attention that takes them, and the tensors of the images in the order of the rows.

    attention_mask is 1 on the samples' tokens, and is there to be counted: the model must not get it. Without a sample there is a single
    token that nothing is learned from. For a processor with position_ids. Raises InputRefused as `collate` does.
    """
    cache = Cache(0) if cache is None else cache
    blocks = [sample_block(sample, processor, spec, cache) for row in rows for sample in row]
    return chain(blocks, processor, spec, cache)


def collate_unpadded(
    samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, cache: Cache | None = None
) -> dict[str, Tensor]:
    """A micro-batch without padding: one row as of `collate_packed`; or, of samples that are equally long, what `collate` makes of them,
    [B, T], where attention is one call in place of one for each sample."""
    cache = Cache(0) if cache is None else cache
    blocks = [sample_block(sample, processor, spec, cache) for sample in samples]
    images = [block.images for block in blocks]
    if len({len(block.input_ids) for block in blocks}) > 1 or needs_dummy(images, spec):
        return chain(blocks, processor, spec, cache)
    input_ids = integers([block.input_ids for block in blocks])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": integers([block.labels for block in blocks]),
        **processor.text_inputs(input_ids),
        **join([image for found in images for image in found], processor),
    }


def chain(blocks: list[TokenBlock], processor: "Processor", spec: TrainSpec, cache: Cache) -> dict[str, Tensor]:
    """One after the other, and a dummy image at the end where the step wants one."""
    if needs_dummy([block.images for block in blocks], spec):
        blocks = [*blocks, dummy_block(processor, spec, cache)]
    blocks = blocks or [filling_block(processor)]
    input_ids = integers([[token for block in blocks for token in block.input_ids]])
    ends = {"sample_ends": sample_ends([len(block.input_ids) for block in blocks])} if spec.model.attention == "sdpa" else {}
    return {
        "input_ids": input_ids,
        "labels": integers([[label for block in blocks for label in block.labels]]),
        "attention_mask": integers([[int(block.useful) for block in blocks for _ in block.input_ids]]),
        "position_ids": torch.cat([positions(block, processor) for block in blocks], dim=-1).unsqueeze(-2),
        **ends,
        **processor.text_inputs(input_ids),
        **join([image for block in blocks for image in block.images], processor),
    }


def positions(block: TokenBlock, processor: "Processor") -> Tensor:
    return processor.position_ids(torch.tensor(block.input_ids, dtype=torch.int64), [image.tensors for image in block.images])


def sample_block(sample: Sample, processor: "Processor", spec: TrainSpec, cache: Cache) -> TokenBlock:
    """The first label goes: what stands before it is another sample's, and must not learn to say it."""
    images = load_images(sample, processor, cache)
    text = encode_cached(sample, processor, spec, images, cache)
    return TokenBlock(input_ids=text.input_ids, labels=[IGNORED, *text.labels[1:]], images=images, useful=True)


def dummy_block(processor: "Processor", spec: TrainSpec, cache: Cache) -> TokenBlock:
    (image,) = dummy_images(processor, cache)
    ids = list(processor.span(image.size, 0))
    return TokenBlock(input_ids=ids, labels=[IGNORED] * len(ids), images=(image,))


def filling_block(processor: "Processor") -> TokenBlock:
    return TokenBlock(input_ids=[processor.tokenizer.pad_token_id or 0], labels=[IGNORED])
