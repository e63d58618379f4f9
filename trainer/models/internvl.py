"""InternVL 3 and 3.5 (Zhu et al., arXiv 2504.10479): images in square tiles, InternViT, pixel shuffle, two-layer projector, a Qwen decoder.
transformers' own classes, which read the -hf repositories."""

from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Inputs, Processor
from trainer.models.architecture import create_native, find_sizes, find_text, load_native, split_options
from trainer.models.family import UNBOUND, Family, Limit, named_parts
from trainer.models.processor import find_ids, open_files, processor_writer
from trainer.models.span import Tiles
from trainer.models.tiny_tokenizer import tiny_tokenizer

TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "turn_token": "<|im_start|>",
}
IMAGE_KEYS = ("min_patches", "max_patches", "image_mean", "image_std", "resample")  # options that are the image processor's


def create(model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template, TOKENS)
    text = find_text(model, tokenizer)
    parts = {"vision_config": find_sizes(model, "vision"), "text_config": {"model_type": "qwen2", **text}}
    image = image_id(tokenizer, model.image_token)
    return create_native(InternVLForConditionalGeneration, InternVLConfig, model, IMAGE_KEYS, **parts, image_token_id=image)


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    side = model.architecture["vision"]["image_size"]
    images = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **split_options(model, IMAGE_KEYS)[0])
    tokens = model.architecture["options"]["image_seq_length"]
    return assemble(model, tiny_tokenizer(model.image_token, model.template, TOKENS), images, tokens, limit)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    config, tokenizer, images = open_files(folder, model, InternVLConfig, GotOcr2ImageProcessorPil)
    return assemble(model, tokenizer, images, config.image_seq_length, limit)


def assemble(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: GotOcr2ImageProcessorPil, tokens: int, limit: Limit
) -> Processor:
    """`tokens`: per tile."""
    images.crop_to_patches = True  # as InternVLProcessor does in every call, whatever the file has
    images.max_patches = limit.max_tiles or images.max_patches
    images.min_patches = min(images.min_patches, images.max_patches)
    before, after = find_ids(tokenizer, TOKENS, "start_image_token", "end_image_token")

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
        save=processor_writer(model, tokenizer, images, "InternVLProcessor", model.image_token, image_seq_length=tokens),
    )


def unused(model: torch.nn.Module) -> frozenset[str]:
    """The layers after the one whose features are used. It is the last one (-1) in every published checkpoint, so there are none."""
    layer, layers = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
    deepest = layers if layer == -1 else layer % (layers + 1)  # hidden state 0 is the embedding
    return named_parts(model, tuple(f"vision_tower.encoder.layer.{number}." for number in range(deepest, layers)))


INTERNVL = Family(
    name="internvl",
    create=create,
    load=partial(load_native, InternVLForConditionalGeneration, InternVLConfig),
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
