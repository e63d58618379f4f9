"""The thinker of Qwen2.5-Omni (Xu et al., arXiv 2503.20215): Qwen2.5-VL with an audio tower, and text as output. transformers' own classes.

A published checkpoint also contains talker and vocoder. They are not read: a saved checkpoint is a thinker, for
Qwen2_5OmniThinkerForConditionalGeneration. The audio tower is kept but never runs, because samples have no audio.
"""

from pathlib import Path

import torch
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Processor
from trainer.models.architecture import create_native, find_sizes, find_text, loading_options, refuse_another
from trainer.models.family import UNBOUND, Family, Limit, named_parts
from trainer.models.head import choose_logits
from trainer.models.processor import find_ids, open_tokenizer
from trainer.models.qwen_vision import IMAGE_KEYS, JOINED, NAMES, assemble, create_images, load_images
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "turn_token": "<|im_start|>",
}
IDS = {
    "audio_token_index": "audio_token",
    "video_token_index": "video_token",
    "vision_start_token_id": "vision_bos_token",
    "vision_end_token_id": "vision_eos_token",
    "audio_start_token_id": "audio_bos_token",
    "audio_end_token_id": "audio_eos_token",
}
FRAME = ("vision_bos_token", "vision_eos_token")
KIND = "Qwen2_5OmniProcessor"
WHOLE = ("qwen2_5_omni",)  # model type of a checkpoint with thinker, talker and vocoder


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    ids = dict(zip(IDS, find_ids(tokenizer, TOKENS, *IDS.values()), strict=True))
    ids["image_token_index"] = image_id(tokenizer, model.image_token)
    towers = {"vision_config": find_sizes(model, "vision", NAMES), "audio_config": find_sizes(model, "audio")}
    parts = {**towers, "text_config": find_text(model, tokenizer)}
    kind = Qwen2_5OmniThinkerForConditionalGeneration
    return choose_logits(create_native(kind, Qwen2_5OmniThinkerConfig, model, IMAGE_KEYS, **parts, **ids))


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """The thinker of a complete checkpoint, or a thinker alone. Raises InputRefused with each difference if it is of another model."""
    config = refuse_another(folder, model, Qwen2_5OmniThinkerConfig, inside=WHOLE)
    options = loading_options(folder, model, dtype, on_meta=on_meta)
    return choose_logits(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, config=config, **options))


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    audio = WhisperFeatureExtractor(feature_size=model.architecture["audio"]["num_mel_bins"])
    return assemble(model, tokenizer, create_images(model, limit), TOKENS, FRAME, KIND, feature_extractor=audio.to_dict())


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files of `Processor.save` or of a published checkpoint."""
    config = refuse_another(folder, model, Qwen2_5OmniThinkerConfig, inside=WHOLE)
    tokenizer = open_tokenizer(folder, model, config.image_token_index, config.text_config.vocab_size)
    audio = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    return assemble(model, tokenizer, load_images(folder, limit), TOKENS, FRAME, KIND, feature_extractor=audio.to_dict())


def unused(model: torch.nn.Module) -> frozenset[str]:
    return named_parts(model, ("audio_tower.",))


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
    images=JOINED,
)
