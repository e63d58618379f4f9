"""LLaVA 1.5 and its relatives: CLIP tower, two-layer projector, Llama (Liu et al., arXiv 2310.03744), transformers' own classes.

The image processor is the PIL one: torchvision's needs a torchvision that matches torch to the build, and on a CPU machine there is none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.contract import InputRefused, ModelSpec
from trainer.models.family import Family, Features, Processor
from trainer.models.template import chat_template
from trainer.models.tiny import tiny_tokenizer

ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash2": "flash_attention_2",
    "flash3": "flash_attention_3",
    "npu_fusion": "flash_attention_2",  # transformers maps this name to torch_npu's fusion kernel on an NPU
}
# What decides the shape of a weight or the number of image tokens, of the vision tower and of the decoder.
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "patch_size",
    "image_size",
)  # fmt: skip
VISION_CLASS_TOKENS = 1  # CLIP puts one before the patches


def create(model: ModelSpec) -> LlavaForConditionalGeneration:
    """Raises InputRefused when the tokenizer does not fit the vocabulary."""
    architecture = model.architecture
    tokenizer = tiny_tokenizer(model.image_token, model.template)
    text = {key: value for key, value in architecture["text"].items() if key != "options" and value is not None}
    if len(tokenizer) > text["vocab_size"]:
        size = text["vocab_size"]
        raise InputRefused(f"model.architecture.text.vocab_size: {size} is too small for the tokenizer's {len(tokenizer)} tokens.")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {key: value for key, value in architecture["vision"].items() if key != "options"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, **without_image_keys(architecture["vision"]["options"])),
        text_config=LlamaConfig(**text, **special, **architecture["text"]["options"]),
        image_token_index=tokenizer.convert_tokens_to_ids(model.image_token),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        **without_image_keys(architecture["options"]),
    )
    config._attn_implementation = ATTENTION[model.attention]
    return LlavaForConditionalGeneration(config)


def load(folder: Path, model: ModelSpec, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Raises InputRefused, naming each difference, where the checkpoint in `folder` is of another model: its weights would be taken, and
    batch, memory and image tokens were planned for this one."""
    refuse_another(folder, model)
    attention = ATTENTION[model.attention]
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention, local_files_only=True)


def refuse_another(folder: Path, model: ModelSpec) -> None:
    kind = LlavaConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
    if kind != LlavaConfig.model_type:
        raise InputRefused(
            f"{folder} is a {kind}, {model.name} is a {LlavaConfig.model_type}: choose the checkpoint's own with model=NAME."
        )
    found = LlavaConfig.from_pretrained(folder, local_files_only=True)
    parts = {"vision": found.vision_config, "text": found.text_config}
    keys = [(part, key, model.architecture[part][key]) for part in parts for key in SHAPE if key in model.architecture[part]]
    given = {f"{part}.{key}": (wanted, getattr(parts[part], key, None)) for part, key, wanted in keys if wanted is not None}
    lines = [f"  model.architecture.{key}: {wanted}, the checkpoint has {has}" for key, (wanted, has) in given.items() if wanted != has]
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(f"{folder} holds another model than {model.name}: choose its own with model=NAME.\n{listed}")


def create_processor(model: ModelSpec) -> Processor:
    vision, options = model.architecture["vision"], model.architecture["options"]
    size = vision["image_size"]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **image_keys({**vision["options"], **options}),
    )
    tokenizer = tiny_tokenizer(model.image_token, model.template)
    strategy = options.get("vision_feature_select_strategy", "default")
    return assemble(model, tokenizer, image_processor, patch_size=vision["patch_size"], strategy=strategy)


def load_processor(folder: Path, model: ModelSpec) -> Processor:
    """From the files that `Processor.save` writes, or those of a published checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "right"
    image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    config = LlavaConfig.from_pretrained(folder, local_files_only=True)
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

    def image_features(images: Sequence[Image]) -> Features:
        pixels = image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, (tokens,) * len(images)

    return Processor(tokenizer=tokenizer, image_features=image_features, save=lambda folder: processor.save_pretrained(folder))


def unused(model: torch.nn.Module) -> frozenset[str]:
    """LLaVA takes the features of an inner CLIP layer (-2): later layers and the norm after the last one lead nowhere."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [config.vision_feature_layer]
    deepest = max(index if index >= 0 else layers + 1 + index for index in wanted)  # hidden state 0 is the embedding
    dead = ("vision_tower.post_layernorm.", *(f"vision_tower.encoder.layers.{layer}." for layer in range(deepest, layers)))
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in dead))


IMAGE_KEYS = ("image_mean", "image_std", "resample", "do_center_crop")


def image_keys(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that belong to the image processor, not to the model."""
    return {key: value for key, value in options.items() if key in IMAGE_KEYS}


def without_image_keys(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in IMAGE_KEYS}


LLAVA = Family(
    name="llava",
    create=create,
    load=load,
    create_processor=create_processor,
    load_processor=load_processor,
    unused=unused,
)
