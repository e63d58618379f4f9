"""Qwen2.5-VL (Bai et al., arXiv 2502.13923): images at their own aspect, window attention in the tower, rotary positions in three
dimensions. transformers' own classes."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_another, split_options
from trainer.models.family import UNBOUND, Family, Limit, Processor
from trainer.models.grid import IMAGE_KEYS, NAMES, assemble, create_images, load_images, mark_images
from trainer.models.processor import find_ids, open_tokenizer, write_processor
from trainer.models.tiny import tiny_tokenizer

TOKENS = {
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "turn_token": "<|im_start|>",
}


def create(model: ModelSpec) -> Qwen2_5_VLForConditionalGeneration:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    before, after, video = find_ids(tokenizer, TOKENS, "vision_start_token", "vision_end_token", "video_token")
    image = image_id(tokenizer, model.image_token)
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": before, "vision_end_token_id": after}
    text = find_text(model, tokenizer)
    config = Qwen2_5_VLConfig(
        vision_config=find_sizes(model, "vision", NAMES),
        text_config=text,
        tie_word_embeddings=text["tie_word_embeddings"],
        **{**split_options(model, IMAGE_KEYS)[1], **ids},
    )
    config._attn_implementation = ATTENTION[model.attention]
    return Qwen2_5_VLForConditionalGeneration(config)


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model."""
    refuse_another(folder, model, Qwen2_5_VLConfig)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, **loading_options(folder, model, dtype, on_meta=on_meta))


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    return complete(model, tiny_tokenizer(model.image_token, model.template, TOKENS), create_images(model, limit))


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = refuse_another(folder, model, Qwen2_5_VLConfig)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    return complete(model, tokenizer, load_images(folder, limit))


def complete(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: Qwen2VLImageProcessorPil) -> Processor:
    before, after = find_ids(tokenizer, TOKENS, "vision_start_token", "vision_end_token")
    image = image_id(tokenizer, model.image_token)
    mark = f"{TOKENS['vision_start_token']}{model.image_token}{TOKENS['vision_end_token']}"
    kind = "Qwen2_5_VLProcessor"
    save = partial(write_processor, model=model, tokenizer=tokenizer, image_processor=images, kind=kind, mark=mark, more={})
    return mark_images(assemble(tokenizer, images, (before, image, after), save), image)


def unused(model: torch.nn.Module) -> frozenset[str]:
    """Every layer of the tower leads to the merger."""
    return frozenset()


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
