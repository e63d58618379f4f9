"""LLaVA 1.5 and its relatives: CLIP tower, two-layer projector, Llama (Liu et al., arXiv 2310.03744), transformers' own classes.

Uses the PIL image processor: the other one needs the torchvision that matches the build of torch, and there is none for our CPU build.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.data.processor import Inputs, Processor
from trainer.models.architecture import ATTENTION, find_sizes, find_text, load_native, split_options
from trainer.models.family import UNBOUND, Family, Limit, named_parts
from trainer.models.processor import open_files
from trainer.models.span import Fixed
from trainer.models.template import chat_template
from trainer.models.tiny_tokenizer import tiny_tokenizer

IMAGE_KEYS = ("image_mean", "image_std", "resample", "do_center_crop")  # options that are the image processor's
VISION_CLASS_TOKENS = 1  # CLIP has one before the patches


def create(model: ModelSpec) -> LlavaForConditionalGeneration:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = tiny_tokenizer(model.image_token, model.template)
    vision = {key: value for key, value in find_sizes(model, "vision").items() if key not in IMAGE_KEYS}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**find_text(model, tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(model.image_token),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        **split_options(model, IMAGE_KEYS)[1],
    )
    config._attn_implementation = ATTENTION[model.attention]
    return LlavaForConditionalGeneration(config)


def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    vision, options = model.architecture["vision"], model.architecture["options"]
    size = vision["image_size"]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **split_options(model, IMAGE_KEYS, "vision")[0],
        **split_options(model, IMAGE_KEYS)[0],
    )
    tokenizer = tiny_tokenizer(model.image_token, model.template)
    strategy = options.get("vision_feature_select_strategy", "default")
    return assemble(model, tokenizer, image_processor, patch_size=vision["patch_size"], strategy=strategy)


def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    config, tokenizer, image_processor = open_files(folder, model, LlavaConfig, CLIPImageProcessorPil)
    strategy = config.vision_feature_select_strategy
    return assemble(model, tokenizer, image_processor, patch_size=config.vision_config.patch_size, strategy=strategy)


def assemble(model: ModelSpec, tokenizer: Any, image_processor: CLIPImageProcessorPil, *, patch_size: int, strategy: str) -> Processor:
    """transformers' LlavaProcessor is only used to write its files: our collator inserts the image tokens itself."""
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        image_token=model.image_token,
        num_additional_image_tokens=VISION_CLASS_TOKENS,
        chat_template=chat_template(model.template, model.image_token),
    )
    crop = image_processor.crop_size
    patches = (crop["height"] // patch_size) * (crop["width"] // patch_size)
    tokens = patches + (0 if strategy == "default" else VISION_CLASS_TOKENS)

    def image_features(image: Image) -> Inputs:
        return {"pixel_values": image_processor(images=image, return_tensors="pt")["pixel_values"]}

    return Processor(
        tokenizer=tokenizer,
        image_features=image_features,
        span=Fixed(image=image_id(tokenizer, model.image_token), tokens=tokens),
        save=lambda folder: processor.save_pretrained(folder),
    )


def unused(model: torch.nn.Module) -> frozenset[str]:
    """LLaVA uses the features of an inner CLIP layer (-2): later layers and the norm after the last one are not used."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [config.vision_feature_layer]
    deepest = max(index if index >= 0 else layers + 1 + index for index in wanted)  # hidden state 0 is the embedding
    after = (f"vision_tower.encoder.layers.{layer}." for layer in range(deepest, layers))
    return named_parts(model, ("vision_tower.post_layernorm.", *after))


LLAVA = Family(
    name="llava",
    create=create,
    load=partial(load_native, LlavaForConditionalGeneration, LlavaConfig),
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
