"""The thinker of Qwen2.5-Omni (Xu et al., arXiv 2503.20215): Qwen2.5-VL with an audio tower, text out. transformers' own classes.

A published checkpoint holds talker and vocoder beside it, which are neither read nor kept: what is saved is a thinker, for
Qwen2_5OmniThinkerForConditionalGeneration. The audio tower is carried along and never runs, since our samples have no sound.
"""

from functools import partial
from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_another, split_options
from trainer.models.family import UNBOUND, Family, Limit, Processor
from trainer.models.grid import IMAGE_KEYS, NAMES, assemble, create_images, load_images
from trainer.models.head import choose_logits
from trainer.models.processor import find_ids, open_tokenizer, write_processor
from trainer.models.tiny import tiny_tokenizer

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
WHOLE = ("qwen2_5_omni",)  # model type of a checkpoint with all parts


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    ids = dict(zip(IDS, find_ids(tokenizer, TOKENS, *IDS.values()), strict=True))
    text = find_text(model, tokenizer)
    config = Qwen2_5OmniThinkerConfig(
        vision_config=find_sizes(model, "vision", NAMES),
        audio_config=find_sizes(model, "audio"),
        text_config=text,
        tie_word_embeddings=text["tie_word_embeddings"],
        **{**split_options(model, IMAGE_KEYS)[1], **ids, "image_token_index": image_id(tokenizer, model.image_token)},
    )
    config._attn_implementation = ATTENTION[model.attention]
    return choose_logits(Qwen2_5OmniThinkerForConditionalGeneration(config))


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """The thinker of a whole checkpoint, or one on its own. Raises InputRefused, naming each difference, where it is of another model."""
    config = refuse_another(folder, model, Qwen2_5OmniThinkerConfig, inside=WHOLE)
    options = loading_options(folder, model, dtype, on_meta=on_meta)
    return choose_logits(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, config=config, **options))


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    sound = WhisperFeatureExtractor(feature_size=model.architecture["audio"]["num_mel_bins"])
    return complete(model, tokenizer, create_images(model, limit), sound)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = refuse_another(folder, model, Qwen2_5OmniThinkerConfig, inside=WHOLE)
    tokenizer = open_tokenizer(folder, model, config.image_token_index, config.text_config.vocab_size)
    sound = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    return complete(model, tokenizer, load_images(folder, limit), sound)


def complete(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: Qwen2VLImageProcessorPil, sound: WhisperFeatureExtractor
) -> Processor:
    """`sound`: for the files alone."""
    before, after = find_ids(tokenizer, TOKENS, "vision_bos_token", "vision_eos_token")
    frame = (before, image_id(tokenizer, model.image_token), after)
    save = partial(
        write_processor,
        model=model,
        tokenizer=tokenizer,
        image_processor=images,
        kind="Qwen2_5OmniProcessor",
        mark=f"{TOKENS['vision_bos_token']}{model.image_token}{TOKENS['vision_eos_token']}",
        more={"feature_extractor": sound.to_dict()},
    )
    return assemble(tokenizer, images, frame, save)


def unused(model: torch.nn.Module) -> frozenset[str]:
    """Nothing sounds."""
    return frozenset(name for name, _ in model.named_parameters() if "audio_tower." in name)


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
