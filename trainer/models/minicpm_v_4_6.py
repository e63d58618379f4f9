"""MiniCPM-V 4.6: an overview and slices of an image at their own aspect ratio, SigLIP 2 with one merger inside and one after it, a Qwen3.5
decoder with mostly linear-attention layers. transformers' own classes."""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Inputs, Processor
from trainer.models.architecture import create_native, find_sizes, find_text, load_native, split_options
from trainer.models.family import UNBOUND, Family, Limit, named_parts
from trainer.models.head import choose_logits
from trainer.models.processor import find_ids, find_slices, open_files, processor_writer
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "turn_token": "<|im_start|>",
}
FRAMES = (
    "image_start_token", "image_end_token", "slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token",
)  # fmt: skip
IMAGE_KEYS = ("max_slice_nums", "scale_resolution", "slice_mode", "use_image_id", "image_mean", "image_std", "resample")
MERGED = {"16x": 4, "4x": 2}  # patches along each side of the square that becomes one token


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    text = find_text(model, tokenizer)
    (video,) = find_ids(tokenizer, TOKENS, "video_token")
    ids = {"image_token_id": image_id(tokenizer, model.image_token), "video_token_id": video}
    parts = {"vision_config": find_sizes(model, "vision"), "text_config": {"model_type": "qwen3_5_text", **text}}
    return complete(create_native(MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Config, model, IMAGE_KEYS, **parts, **ids))


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    return complete(load_native(MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Config, folder, model, dtype, on_meta=on_meta))


def complete(network: Any) -> torch.nn.Module:
    network.model.merger.forward = MethodType(merge_patches, network.model.merger)
    return choose_logits(network)


def merge_patches(merger: Any, hidden_states: Tensor, target_sizes: Tensor) -> list[Tensor]:
    """The forward pass of the merger: (1, patches, width) of all images side by side, and (images, 2) rows and columns of each -> for each
    image (tokens, decoder width).

    transformers calls the layers once for each image or slice. Under ZeRO 3 each call gathers their weights from all ranks, so that ranks
    with different numbers of images wait for each other forever, or mix up their messages (ms-swift#9655, DeepSpeed#7170). With partitioned
    weights each layer is called once, for all images together, and the result is one tensor: DeepSpeed gathers the weights again in the
    backward pass for each tensor of an output. Otherwise it is transformers' own pass, bit by bit."""
    if not any(hasattr(parameter, "ds_id") for parameter in merger.parameters()):  # the mark of DeepSpeed's ZeRO 3
        own: list[Tensor] = type(merger).forward(merger, hidden_states, target_sizes)
        return own
    sizes = [tuple(size) for size in target_sizes.tolist()]
    merged = hidden_states[0]
    for layer in merger.mlp:
        merged, sizes = gather_squares(merged, sizes, merger.merge_kernel_size)
        merged = layer(merged)
    return [merged]


def gather_squares(patches: Tensor, sizes: list[tuple[int, int]], kernel: tuple[int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """(patches, width) of grids with these rows and columns -> (squares, patches of a square * width), and the grids of squares."""
    high, wide = kernel
    grids = [(rows // high, columns // wide) for rows, columns in sizes]
    parts = [
        part.view(rows, high, columns, wide, -1).transpose(1, 2).reshape(rows * columns, -1)
        for part, (rows, columns) in zip(patches.split([rows * columns for rows, columns in sizes]), grids, strict=True)
    ]
    return torch.cat(parts), grids


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    options, rest = split_options(model, IMAGE_KEYS)
    mode = rest.get("downsample_mode", "16x")
    patch = model.architecture["vision"]["patch_size"]
    images = MiniCPMV4_6ImageProcessorPil(patch_size=patch, downsample_mode=mode, **options)
    return assemble(model, tiny_tokenizer(model.image_token, model.template, TOKENS), images, limit)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    config, tokenizer, images = open_files(folder, model, MiniCPMV4_6Config, MiniCPMV4_6ImageProcessorPil)
    images.downsample_mode = config.downsample_mode  # must be that of the model: it determines the number of image tokens
    return assemble(model, tokenizer, images, limit)


def assemble(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: MiniCPMV4_6ImageProcessorPil, limit: Limit) -> Processor:
    images.max_slice_nums = limit.max_tiles or images.max_slice_nums

    def image_features(picture: Image) -> Inputs:
        made = images(images=picture, return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "target_sizes": made["target_sizes"]}

    return Processor(
        tokenizer=tokenizer,
        image_features=image_features,
        span=find_slices(
            tokenizer,
            TOKENS,
            FRAMES,
            model.image_token,
            numbered=images.use_image_id,
            unit=images.patch_size * MERGED[images.downsample_mode],
            scale=images.scale_resolution,
            most=images.max_slice_nums if images.slice_mode else 1,
        ),
        save=processor_writer(model, tokenizer, images, "MiniCPMV4_6Processor", model.image_token),
        axes={"pixel_values": -1},  # (1, 3, patch, patches * patch): the patches of all images side by side
        position_ids=None,  # linear attention passes its state from one sample of a row to the next
    )


def unused(model: torch.nn.Module) -> frozenset[str]:
    """With tokens of 4 patches instead of 16 the merger inside the tower is skipped."""
    return named_parts(model, (".vit_merger.",) if model.config.downsample_mode == "4x" else ())


MINICPM_V_4_6 = Family(
    name="minicpm_v_4_6",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
