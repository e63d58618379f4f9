"""LLaVA 1.5 and its relatives: CLIP tower, two-layer projector, Llama (Liu et al., arXiv 2310.03744), transformers' own classes.

The image processor is the PIL one: torchvision's needs a torchvision that matches torch to the build, and on a CPU machine there is none.
"""

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.contract import ModelSpec
from trainer.data.encode import image_id
from trainer.models.architecture import ATTENTION, find_sizes, find_text, loading_options, refuse_another, split_options
from trainer.models.family import UNBOUND, Family, Inputs, Limit, Processor
from trainer.models.processor import open_tokenizer
from trainer.models.span import Fixed
from trainer.models.template import chat_template
from trainer.models.tiny import tiny_tokenizer

IMAGE_KEYS = ("image_mean", "image_std", "resample", "do_center_crop")  # options that are the image processor's
VISION_CLASS_TOKENS = 1  # CLIP puts one before the patches


def create(model: ModelSpec) -> LlavaForConditionalGeneration:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
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


def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> LlavaForConditionalGeneration:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model."""
    refuse_another(folder, model, LlavaConfig)
    return LlavaForConditionalGeneration.from_pretrained(folder, **loading_options(folder, model, dtype, on_meta=on_meta))


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
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    config = refuse_another(folder, model, LlavaConfig)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    strategy = config.vision_feature_select_strategy
    return assemble(model, tokenizer, image_processor, patch_size=config.vision_config.patch_size, strategy=strategy)


def assemble(model: ModelSpec, tokenizer: Any, image_processor: CLIPImageProcessorPil, *, patch_size: int, strategy: str) -> Processor:
    """Our collator writes out the image tokens itself; transformers' LlavaProcessor is built for its files alone."""
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
    """LLaVA takes the features of an inner CLIP layer (-2): later layers and the norm after the last one lead nowhere."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [config.vision_feature_layer]
    deepest = max(index if index >= 0 else layers + 1 + index for index in wanted)  # hidden state 0 is the embedding
    dead = ("vision_tower.post_layernorm.", *(f"vision_tower.encoder.layers.{layer}." for layer in range(deepest, layers)))
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in dead))


LLAVA = Family(
    name="llava",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
