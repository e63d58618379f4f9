"""MiniCPM-V 4.6: an overview and slices of an image at their own aspect, SigLIP 2 with a merger inside and one behind it, a Qwen3.5 decoder
most of whose layers have linear attention. transformers' own classes."""

from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id, token_ids
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_another, split_options
from trainer.models.family import UNBOUND, Family, Inputs, Limit, Processor
from trainer.models.head import choose_logits
from trainer.models.processor import find_ids, open_tokenizer, write_processor
from trainer.models.span import Frame, Ids, Slices
from trainer.models.tiny import tiny_tokenizer

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
FRAMES = ("image_start_token", "image_end_token", "slice_start_token", "slice_end_token")
IMAGE_KEYS = ("max_slice_nums", "scale_resolution", "slice_mode", "use_image_id", "image_mean", "image_std", "resample")
MERGED = {"16x": 4, "4x": 2}  # patches along each side of what becomes one token


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    text = find_text(model, tokenizer)
    (video,) = find_ids(tokenizer, TOKENS, "video_token")
    ids = {"image_token_id": image_id(tokenizer, model.image_token), "video_token_id": video}
    config = MiniCPMV4_6Config(
        vision_config=find_sizes(model, "vision"),
        text_config={"model_type": "qwen3_5_text", **text},
        tie_word_embeddings=text["tie_word_embeddings"],
        **{**split_options(model, IMAGE_KEYS)[1], **ids},
    )
    config._attn_implementation = ATTENTION[model.attention]
    return choose_logits(MiniCPMV4_6ForConditionalGeneration(config))


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model."""
    refuse_another(folder, model, MiniCPMV4_6Config)
    return choose_logits(
        MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, **loading_options(folder, model, dtype, on_meta=on_meta))
    )


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    options, rest = split_options(model, IMAGE_KEYS)
    mode = rest.get("downsample_mode", "16x")
    patch = model.architecture["vision"]["patch_size"]
    images = MiniCPMV4_6ImageProcessorPil(patch_size=patch, downsample_mode=mode, **options)
    return assemble(model, tiny_tokenizer(model.image_token, model.template, TOKENS), images, limit)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = refuse_another(folder, model, MiniCPMV4_6Config)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    images = MiniCPMV4_6ImageProcessorPil.from_pretrained(folder, local_files_only=True)
    images.downsample_mode = config.downsample_mode  # the model's own: with another it would find too many places for its features
    return assemble(model, tokenizer, images, limit)


def assemble(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: MiniCPMV4_6ImageProcessorPil, limit: Limit) -> Processor:
    images.max_slice_nums = limit.max_tiles or images.max_slice_nums

    def image_features(picture: Image) -> Inputs:
        made = images(images=picture, return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "target_sizes": made["target_sizes"]}

    return Processor(
        tokenizer=tokenizer,
        image_features=image_features,
        span=find_span(model, tokenizer, images),
        save=partial(
            write_processor,
            model=model,
            tokenizer=tokenizer,
            image_processor=images,
            kind="MiniCPMV4_6Processor",
            mark=model.image_token,
            more={},
        ),
        axes={"pixel_values": -1},  # (1, 3, patch, patches * patch): all patches of all images side by side
        position_ids=None,  # linear attention carries its state from one sample of a row into the next
    )


def find_span(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: MiniCPMV4_6ImageProcessorPil) -> Slices:
    start, end, slice_start, slice_end = find_ids(tokenizer, TOKENS, *FRAMES)
    return Slices(
        image=image_id(tokenizer, model.image_token),
        overview=Frame(before=(start,), after=(end,)),
        slice=Frame(before=(slice_start,), after=(slice_end,)),
        line=tuple(token_ids(tokenizer, "\n")),
        number=partial(spell_number, tokenizer) if images.use_image_id else None,
        unit=images.patch_size * MERGED[images.downsample_mode],
        scale=images.scale_resolution,
        most=images.max_slice_nums if images.slice_mode else 1,
    )


def spell_number(tokenizer: PreTrainedTokenizerBase, place: int) -> Ids:
    before, after = find_ids(tokenizer, TOKENS, "image_id_start_token", "image_id_end_token")
    return (before, *token_ids(tokenizer, str(place)), after)


def unused(model: torch.nn.Module) -> frozenset[str]:
    """Tokens of 4 patches instead of 16 pass by the merger inside the tower."""
    skipped = model.config.downsample_mode == "4x"
    return frozenset(name for name, _ in model.named_parameters() if skipped and ".vit_merger." in name)


MINICPM_V_4_6 = Family(
    name="minicpm_v_4_6",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
