"""InternVL 3 and 3.5 (Zhu et al., arXiv 2504.10479): images cut into square tiles, InternViT, pixel shuffle, two-layer projector, a Qwen
decoder. transformers' own classes, which read the -hf repositories."""

from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_another, split_options
from trainer.models.family import UNBOUND, Family, Inputs, Limit, Processor
from trainer.models.processor import find_ids, open_tokenizer, write_processor
from trainer.models.span import Tiles
from trainer.models.tiny import tiny_tokenizer

TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "turn_token": "<|im_start|>",
}
IMAGE_KEYS = ("min_patches", "max_patches", "image_mean", "image_std", "resample")  # options that are the image processor's


def create(model: ModelSpec) -> InternVLForConditionalGeneration:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    text = find_text(model, tokenizer)
    options = split_options(model, IMAGE_KEYS)[1]
    config = InternVLConfig(
        vision_config=find_sizes(model, "vision"),
        text_config={"model_type": "qwen2", **text},
        tie_word_embeddings=text["tie_word_embeddings"],
        **{**options, "image_token_id": image_id(tokenizer, model.image_token)},
    )
    config._attn_implementation = ATTENTION[model.attention]
    return InternVLForConditionalGeneration(config)


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> InternVLForConditionalGeneration:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model."""
    refuse_another(folder, model, InternVLConfig)
    return InternVLForConditionalGeneration.from_pretrained(folder, **loading_options(folder, model, dtype, on_meta=on_meta))


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    side = model.architecture["vision"]["image_size"]
    images = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **split_options(model, IMAGE_KEYS)[0])
    tokens = model.architecture["options"]["image_seq_length"]
    return assemble(model, tiny_tokenizer(model.image_token, model.template, TOKENS), images, tokens, limit)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = refuse_another(folder, model, InternVLConfig)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    images = GotOcr2ImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return assemble(model, tokenizer, images, config.image_seq_length, limit)


def assemble(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: GotOcr2ImageProcessorPil, tokens: int, limit: Limit
) -> Processor:
    """`tokens`: of each tile."""
    images.crop_to_patches = True  # InternVLProcessor says so at every call, whatever the file has
    images.max_patches = limit.max_tiles or images.max_patches
    images.min_patches = min(images.min_patches, images.max_patches)
    before, after = find_ids(tokenizer, TOKENS, "start_image_token", "end_image_token")
    more = {"image_seq_length": tokens}

    def image_features(picture: Image) -> Inputs:
        return {"pixel_values": images(images=picture, return_tensors="pt")["pixel_values"]}

    return Processor(
        tokenizer=tokenizer,
        image_features=image_features,
        span=Tiles(
            before=(before,),
            image=image_id(tokenizer, model.image_token),
            after=(after,),
            tokens=tokens,
            tile=images.size["height"],
            least=images.min_patches,
            most=images.max_patches,
        ),
        save=partial(
            write_processor,
            model=model,
            tokenizer=tokenizer,
            image_processor=images,
            kind="InternVLProcessor",
            mark=model.image_token,
            more=more,
        ),
    )


def unused(model: torch.nn.Module) -> frozenset[str]:
    """The layers behind the one whose features are taken, -1 in every published checkpoint: none."""
    layer, layers = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
    deepest = layers if layer == -1 else layer % (layers + 1)  # hidden state 0 is the embedding
    dead = tuple(f"vision_tower.encoder.layer.{number}." for number in range(deepest, layers))
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in dead))


INTERNVL = Family(
    name="internvl",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
