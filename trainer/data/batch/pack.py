"""The tensors of a packed micro-batch: all samples in one row, one after the other, each with its own positions, without padding.

No token attends to another sample. Either the attention gets the ends of the samples (`sample_ends`, trainer.models.attention), or it finds
them from positions that restart at 0, as flash attention does for a single row without a mask (transformers 5.23,
modeling_flash_attention_utils; with several rows their samples would attend to each other). The image towers are not affected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features, dummy_images, encode_cached, int64_tensor, join, load_images, needs_dummy
from trainer.data.batch.draw import noise_spans
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample

if TYPE_CHECKING:
    from trainer.data.processor import Processor


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Tokens that attend only to each other. `useful`: they belong to a sample, not to a dummy image or padding."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Features, ...] = ()
    useful: bool = False
    sample: Sample | None = None


def collate_packed(
    rows: Sequence[Sequence[Sample]], processor: "Processor", spec: TrainSpec, cache: Cache | None = None
) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask and position_ids of all rows in one row, [1, T] int64 (positions [4, 1, T] if the family has
    three-dimensional ones), sample_ends for sdpa attention, and the tensors of the images in the order of the rows.

    attention_mask is 1 on tokens of samples. It is only for counting; the model must not get it. Without any sample the row is one token
    outside the loss. Requires a processor with position_ids. Raises InputRefused as `collate` does.
    """
    cache = Cache(0) if cache is None else cache
    blocks = [sample_block(sample, processor, spec, cache) for row in rows for sample in row]
    return concatenate(blocks, processor, spec, cache)


def collate_unpadded(samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, cache: Cache | None = None) -> dict[str, Tensor]:
    """A micro-batch without padding: one row as by `collate_packed`. Samples of equal length become [B, T] as by `collate`, so that attention
    is one call instead of one for each sample."""
    cache = Cache(0) if cache is None else cache
    blocks = [sample_block(sample, processor, spec, cache) for sample in samples]
    images = [block.images for block in blocks]
    if len({len(block.input_ids) for block in blocks}) > 1 or needs_dummy(images, spec):
        return concatenate(blocks, processor, spec, cache)
    input_ids = int64_tensor([block.input_ids for block in blocks])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": int64_tensor([block.labels for block in blocks]),
        **noise_spans(samples, [(row, 0, len(block.input_ids)) for row, block in enumerate(blocks)], spec),
        **processor.text_inputs(input_ids),
        **join([image for found in images for image in found], processor),
    }


def concatenate(blocks: list[TokenBlock], processor: "Processor", spec: TrainSpec, cache: Cache) -> dict[str, Tensor]:
    """All blocks in one row, followed by a dummy image if one is needed."""
    if needs_dummy([block.images for block in blocks], spec):
        blocks = [*blocks, dummy_block(processor, spec, cache)]
    blocks = blocks or [padding_block(processor)]
    input_ids = int64_tensor([[token for block in blocks for token in block.input_ids]])
    ends = {"sample_ends": sample_ends([len(block.input_ids) for block in blocks])} if spec.model.attention == "sdpa" else {}
    return {
        "input_ids": input_ids,
        "labels": int64_tensor([[label for block in blocks for label in block.labels]]),
        "attention_mask": int64_tensor([[int(block.useful) for block in blocks for _ in block.input_ids]]),
        "position_ids": torch.cat([positions(block, processor) for block in blocks], dim=-1).unsqueeze(-2),
        **ends,
        **block_spans(blocks, spec),
        **processor.text_inputs(input_ids),
        **join([image for block in blocks for image in block.images], processor),
    }


def block_spans(blocks: list[TokenBlock], spec: TrainSpec) -> dict[str, Tensor]:
    """As `noise_spans`, of blocks in one row. A dummy image gets no noise."""
    starts = accumulate((len(block.input_ids) for block in blocks), initial=0)
    found = [(block.sample, (0, start, len(block.input_ids))) for block, start in zip(blocks, starts, strict=False) if block.sample]
    return noise_spans([sample for sample, _ in found], [place for _, place in found], spec)


def sample_ends(lengths: list[int]) -> Tensor:
    """Where the samples end, [1, 1, 1, samples] int32, on the CPU. transformers passes a four-dimensional mask on unchanged
    (masking_utils._preprocess_mask_arguments), and each layer reads it without waiting for the device."""
    return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).view(1, 1, 1, -1)


def positions(block: TokenBlock, processor: "Processor") -> Tensor:
    return processor.position_ids(torch.tensor(block.input_ids, dtype=torch.int64), [image.tensors for image in block.images])


def sample_block(sample: Sample, processor: "Processor", spec: TrainSpec, cache: Cache) -> TokenBlock:
    """The first label is masked: the token before it belongs to another sample and must not learn to predict it."""
    images = load_images(sample, processor, spec, cache)
    text = encode_cached(sample, processor, spec, images, cache)
    kept = images[: len(images) - text.cut_images]
    return TokenBlock(input_ids=text.input_ids, labels=[IGNORED, *text.labels[1:]], images=kept, useful=True, sample=sample)


def dummy_block(processor: "Processor", spec: TrainSpec, cache: Cache) -> TokenBlock:
    (image,) = dummy_images(processor, cache)
    ids = list(processor.span(image.size, 0))
    return TokenBlock(input_ids=ids, labels=[IGNORED] * len(ids), images=(image,))


def padding_block(processor: "Processor") -> TokenBlock:
    return TokenBlock(input_ids=[processor.tokenizer.pad_token_id or 0], labels=[IGNORED])
