"""The numbers of conf/model as transformers' configs, and a checkpoint's config held against them."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig, PreTrainedConfig, PreTrainedTokenizerBase

from trainer.contract import InputRefused, ModelSpec

ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash2": "flash_attention_2",
    "flash3": "flash_attention_3",
    "npu_fusion": "flash_attention_2",  # transformers maps this name to torch_npu's fusion kernel on an NPU
}
# What decides the shape of a weight or the number of image tokens, of a tower and of the decoder.
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "patch_size",
    "image_size", "out_hidden_size", "spatial_merge_size", "temporal_patch_size", "window_size", "d_model", "encoder_layers",
    "encoder_ffn_dim", "encoder_attention_heads", "num_mel_bins", "output_dim", "model_type", "head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
PUBLISHED_WITH_CODE = ("minicpmv", "minicpmo", "omnilmm")  # model types of families that there are, whose repositories hold code too


def find_sizes(model: ModelSpec, part: str, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The keyword arguments of a transformers config for `part` (vision, text, audio). `names`: ours -> its own, where they differ."""
    given = model.architecture[part]
    sizes = {(names or {}).get(key, key): value for key, value in given.items() if key != "options" and value is not None}
    return {**sizes, **given.get("options", {})}


def find_text(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The same for the decoder of a random start, with the ids of its tokenizer. Raises InputRefused when it has too many."""
    text = find_sizes(model, "text")
    if len(tokenizer) > text["vocab_size"]:
        size = text["vocab_size"]
        raise InputRefused(f"model.architecture.text.vocab_size: {size} is too small for the tokenizer's {len(tokenizer)} tokens.")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**text, **ids}


def split_options(model: ModelSpec, image: tuple[str, ...], part: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the whole model, or of a part: those named in `image`, which are the image processor's, and the others."""
    options = model.architecture[part].get("options", {}) if part else model.architecture["options"]
    return {key: options[key] for key in image if key in options}, {key: value for key, value in options.items() if key not in image}


def loading_options(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool) -> dict[str, Any]:
    """The keyword arguments of from_pretrained for a local folder. `on_meta`: see Family; transformers 5 makes every model on the meta
    device first, and with this map leaves it there. Weights in 8 bits (stage quantize) become numbers of `dtype` as they are read: there
    is no kernel that computes with them in transformers."""
    options = {"dtype": dtype, "attn_implementation": ATTENTION[model.attention], "local_files_only": True}
    how = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("quantization_config") or {}
    if how.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = open_compressed(folder)
    return options | ({"device_map": {"": "meta"}} if on_meta else {})


def open_compressed(folder: Path) -> CompressedTensorsConfig:
    """Raises InputRefused without the package."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputRefused(
            f"{folder} is quantized with compressed-tensors, and that package is not installed here. Add compressed-tensors to the "
            "environment, or take the weights that it was made of."
        )
    from loguru import logger

    # compressed-tensors 0.20 says for each layer that it does not know the shape of a tensor on the meta device, which it then does not need
    logger.disable("compressed_tensors.compressors.pack_quantized")
    # transformers 5.23 says that the config is the file's, which is meant: `dequantize` alone is ours
    warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
    return CompressedTensorsConfig(dequantize=True)


def refuse_another(folder: Path, model: ModelSpec, config: type[PreTrainedConfig], *, inside: tuple[str, ...] = ()) -> PreTrainedConfig:
    """The config in `folder`, of type `config`. `inside`: model types that hold one of that type.

    Raises InputRefused, naming each difference, where the checkpoint is of another model: its weights would be taken, and batch, memory
    and image tokens were planned for this one."""
    refuse_kind(folder, model, config, *inside)
    found = config.from_pretrained(folder, local_files_only=True)
    refuse_differences(folder, model, found)
    return found


def refuse_kind(folder: Path, model: ModelSpec, config: type[PreTrainedConfig], *inside: str) -> None:
    """Raises InputRefused where the checkpoint is no `config`, nor of a type that holds one."""
    from trainer.models import FAMILIES  # which import this module

    content = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    kind = content.get("model_type")
    if kind in (config.model_type, *inside):
        return
    own = "auto_map" in content and kind not in PUBLISHED_WITH_CODE
    families = f", with code of its own, which is never run; the families that there are: {', '.join(sorted(FAMILIES))}" if own else ""
    raise InputRefused(
        f"{folder} is a {kind}{families}, {model.name} is a {config.model_type}: choose the checkpoint's own with model=NAME."
    )


def refuse_differences(folder: Path, model: ModelSpec, found: Any) -> None:
    """`found`: the config of the checkpoint, with a config of each part under the name of the part."""
    lines = [line for part in ("vision", "text", "audio") for line in differences(model, found, part)]
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(f"{folder} holds another model than {model.name}: choose its own with model=NAME.\n{listed}")


def differences(model: ModelSpec, config: Any, part: str) -> list[str]:
    given = model.architecture.get(part) or {}
    wanted = {**given, **given.get("options", {})}
    has = getattr(config, f"{part}_config", None)
    pairs = {key: (wanted[key], side(getattr(has, key, None))) for key in SHAPE if wanted.get(key) is not None}
    return [f"  model.architecture.{part}.{key}: {ours}, the checkpoint has {its}" for key, (ours, its) in pairs.items() if ours != its]


def side(value: Any) -> Any:
    """Some configs write a square as two equal sides."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value
