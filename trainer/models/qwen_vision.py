"""The shared vision part of Qwen2.5-VL and Qwen2.5-Omni: images as grids of patches, three-dimensional rotary positions.

Wang et al., Qwen2-VL (arXiv 2409.12191), section 2.1: text increments all three positions together; an image is a grid over height and width
at a constant time, and the text after it continues from the largest position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.contract import ImageForm, ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Inputs, Processor
from trainer.models.architecture import split_options
from trainer.models.family import Limit
from trainer.models.processor import find_ids, processor_writer
from trainer.models.span import Grid

# Their chat templates write a text straight after an image.
JOINED = ImageForm(separator="")
IMAGE_KEYS = ("min_pixels", "max_pixels", "image_mean", "image_std", "resample")  # options that are the image processor's
NAMES = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}  # of the vision tower's config


def create_images(model: ModelSpec, limit: Limit) -> Qwen2VLImageProcessorPil:
    vision, (options, _) = model.architecture["vision"], split_options(model, IMAGE_KEYS)
    patch = {"patch_size": vision["patch_size"]}
    own = {"merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
    merges = {name: vision["options"][key] for name, key in own.items() if key in vision["options"]}
    return bound(Qwen2VLImageProcessorPil(**patch, **merges, **options), limit)


def load_images(folder: Path, limit: Limit) -> Qwen2VLImageProcessorPil:
    return bound(Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True), limit)


def bound(images: Qwen2VLImageProcessorPil, limit: Limit) -> Qwen2VLImageProcessorPil:
    least, most = images.size["shortest_edge"], limit.max_pixels or images.size["longest_edge"]
    images.size = {"shortest_edge": min(least, most), "longest_edge": most}
    return images


def assemble(
    model: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    images: Qwen2VLImageProcessorPil,
    tokens: Mapping[str, str],
    frame: tuple[str, str],
    kind: str,
    **settings: Any,
) -> Processor:
    """`frame`: the names in `tokens` of the tokens before and after an image. `kind`, `settings`: for the files."""
    before, after = find_ids(tokenizer, tokens, *frame)
    image = image_id(tokenizer, model.image_token)
    mark = f"{tokens[frame[0]]}{model.image_token}{tokens[frame[1]]}"
    unit = images.patch_size * images.merge_size

    def image_features(picture: Image) -> Inputs:
        made: Any = images(images=picture, return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}

    def position_ids(input_ids: Tensor, pictures: Sequence[Inputs]) -> Tensor:
        grids = [picture["image_grid_thw"][0, 1:] // images.merge_size for picture in pictures]
        return rotary_positions(input_ids, image, [(int(rows), int(columns)) for rows, columns in grids])

    least, most = images.size["shortest_edge"], images.size["longest_edge"]
    grid = Grid(before=(before,), image=image, after=(after,), unit=unit, min_pixels=least, max_pixels=most)
    return Processor(
        tokenizer=tokenizer,
        image_features=image_features,
        span=grid,
        scaled=grid.scaled,
        save=processor_writer(model, tokenizer, images, kind, mark, **settings),
        position_ids=position_ids,
        image_mark=mark,
    )


def add_token_types(processor: Processor, image: int) -> Processor:
    """With mm_token_type_ids, 1 at image tokens: without them Qwen2.5-VL silently uses one-dimensional positions."""
    return replace(processor, text_inputs=lambda input_ids: {"mm_token_type_ids": (input_ids == image).int()})


def rotary_positions(input_ids: Tensor, image: int, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of one sample, [4, T] int64: a plain count, then time, height and width. `grids`: rows and columns of tokens of each
    image. The last three equal those of transformers' get_rope_index."""
    remaining = iter(grids)
    parts: list[Tensor] = []
    start = 0
    for is_image, run in groupby(input_ids.tolist(), lambda token: token == image):
        length = sum(1 for _ in run)
        if is_image:
            rows, columns = next(remaining)
            axes = torch.meshgrid(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + start)
            start += max(rows, columns)
        else:
            parts.append(torch.arange(length).expand(3, -1) + start)
            start += length
    rotary = torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.int64)
    return torch.cat([torch.arange(len(input_ids)).unsqueeze(0), rotary])
