"""Qwen2.5-VL (Bai et al., arXiv 2502.13923): images at their own aspect ratio, window attention in the tower, three-dimensional rotary
positions. transformers' own classes."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Processor
from trainer.models.architecture import create_native, find_sizes, find_text, load_native, refuse_another
from trainer.models.family import UNBOUND, Family, Limit
from trainer.models.processor import find_ids, open_tokenizer
from trainer.models.qwen_vision import IMAGE_KEYS, JOINED, NAMES, add_token_types, assemble, create_images, load_images
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "turn_token": "<|im_start|>",
}


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    before, after, video = find_ids(tokenizer, TOKENS, "vision_start_token", "vision_end_token", "video_token")
    image = image_id(tokenizer, model.image_token)
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": before, "vision_end_token_id": after}
    parts = {"vision_config": find_sizes(model, "vision", NAMES), "text_config": find_text(model, tokenizer)}
    return create_native(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, model, IMAGE_KEYS, **parts, **ids)


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    return complete(model, tiny_tokenizer(model.image_token, model.template, TOKENS), create_images(model, limit))


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files of `Processor.save` or of a published checkpoint."""
    config = refuse_another(folder, model, Qwen2_5_VLConfig)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    return complete(model, tokenizer, load_images(folder, limit))


def complete(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: Qwen2VLImageProcessorPil) -> Processor:
    processor = assemble(model, tokenizer, images, TOKENS, ("vision_start_token", "vision_end_token"), "Qwen2_5_VLProcessor")
    return add_token_types(processor, image_id(tokenizer, model.image_token))


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    create=create,
    load=partial(load_native, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    create_processor=create_processor,
    load_processor=load_processor,
    images=JOINED,
)
