"""The numbers of conf/model as configs of transformers, and the comparison of a checkpoint's config with them."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.contract import InputRefused, ModelSpec
from trainer.contract.weight_files import read_added_tokens
from trainer.models.family import FAMILY_NAMES

ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash2": "flash_attention_2",
    "flash3": "flash_attention_3",
    "npu_fusion": "flash_attention_2",  # transformers maps this name to torch_npu's fusion kernel on an NPU
}
# The keys of tower and decoder that determine the shape of a weight or the number of image tokens.
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "patch_size",
    "image_size", "out_hidden_size", "spatial_merge_size", "temporal_patch_size", "window_size", "d_model", "encoder_layers",
    "encoder_ffn_dim", "encoder_attention_heads", "num_mel_bins", "output_dim", "model_type", "head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
PUBLISHED_WITH_CODE = ("minicpmv", "minicpmo", "omnilmm")  # model types of our families whose published repositories also contain code


def find_sizes(model: ModelSpec, part: str, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The keyword arguments of a transformers config for `part` (vision, text, audio). `names`: our name -> its name, where they differ."""
    given = model.architecture[part]
    sizes = {(names or {}).get(key, key): value for key, value in given.items() if key != "options" and value is not None}
    return {**sizes, **given.get("options", {})}


def find_text(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The same for the decoder of a random start, with the special ids of its tokenizer. Raises InputRefused if it has too many tokens."""
    text = find_sizes(model, "text")
    if len(tokenizer) > text["vocab_size"]:
        size = text["vocab_size"]
        raise InputRefused(f"model.architecture.text.vocab_size: {size} is too small for the tokenizer's {len(tokenizer)} tokens")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**text, **ids}


def split_options(model: ModelSpec, image: tuple[str, ...], part: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the image processor, which `image` names; all other options), of the whole model or of `part`."""
    options = model.architecture[part].get("options", {}) if part else model.architecture["options"]
    return {key: options[key] for key in image if key in options}, {key: value for key, value in options.items() if key not in image}


def loading_options(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool) -> dict[str, Any]:
    """The keyword arguments of from_pretrained for a local folder. `on_meta`: see Family; transformers 5 creates every model on the meta
    device first, and with this device map leaves it there. Quantized int8 weights (stage quantize) are converted to `dtype` when they are
    read, because transformers has no kernel that computes with them."""
    options = {"dtype": dtype, "attn_implementation": ATTENTION[model.attention], "local_files_only": True}
    quantization = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("quantization_config") or {}
    if quantization.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = open_compressed(folder)
    return options | ({"device_map": {"": "meta"}} if on_meta else {})


def open_compressed(folder: Path) -> CompressedTensorsConfig:
    """Raises InputRefused if the package compressed-tensors is not installed."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputRefused(
            f"{folder} is quantized with compressed-tensors, but this package is not installed\n    install compressed-tensors, or use the "
            "weights that were quantized"
        )
    from loguru import logger

    # compressed-tensors 0.20 warns for each layer that the shape of a tensor on the meta device is unknown; it is not needed
    logger.disable("compressed_tensors.compressors.pack_quantized")
    # transformers 5.23 warns that the config of the file is used, which is intended: only `dequantize` is set here
    warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
    return CompressedTensorsConfig(dequantize=True)


def refuse_another(folder: Path, model: ModelSpec, config: type[PreTrainedConfig], *, inside: tuple[str, ...] = ()) -> PreTrainedConfig:
    """The config in `folder`, of type `config`. `inside`: model types that contain one of that type.

    Raises InputRefused with each difference if the checkpoint is of another model: batch, memory and image tokens were planned for this
    one."""
    refuse_kind(folder, model, config, *inside)
    found = config.from_pretrained(folder, local_files_only=True)
    refuse_differences(folder, model, found)
    return found


def refuse_kind(folder: Path, model: ModelSpec, config: type[PreTrainedConfig], *inside: str) -> None:
    """Raises InputRefused if the checkpoint is neither of the type of `config` nor of a type in `inside`."""
    content = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    kind = content.get("model_type")
    if kind in (config.model_type, *inside):
        return
    own = "auto_map" in content and kind not in PUBLISHED_WITH_CODE
    families = f" (with its own code, which is never run; supported families: {', '.join(FAMILY_NAMES)})" if own else ""
    raise InputRefused(
        f"{folder} has the model type {kind}{families}, but {model.name} has {config.model_type}\n    set model=NAME to the checkpoint's model"
    )


def refuse_differences(folder: Path, model: ModelSpec, found: Any) -> None:
    """`found`: the config of the checkpoint, with the config of each part as an attribute PART_config."""
    grown = bool(read_added_tokens(folder))
    lines = [line for part in ("vision", "text", "audio") for line in differences(model, found, part, grown=grown)]
    refuse_lines(folder, model, lines)


def refuse_lines(folder: Path, model: ModelSpec, lines: list[str]) -> None:
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(f"{folder} is not {model.name}: set model=NAME to the checkpoint's model\n{listed}")


def create_native(
    kind: type[PreTrainedModel], config_type: type[PreTrainedConfig], model: ModelSpec, image_keys: tuple[str, ...], **values: Any
) -> Any:
    """A model of transformers with random weights. `values`: of its config, which override model.architecture.options."""
    tied = {"tie_word_embeddings": values["text_config"]["tie_word_embeddings"]}
    config = config_type(**{**tied, **split_options(model, image_keys)[1], **values})
    config._attn_implementation = ATTENTION[model.attention]
    return kind(config)


def load_native(
    kind: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    folder: Path,
    model: ModelSpec,
    dtype: torch.dtype,
    *,
    on_meta: bool = False,
) -> torch.nn.Module:
    """`Family.load` for a class of transformers. Raises InputRefused with each difference if the checkpoint is of another model."""
    refuse_another(folder, model, config)
    loaded: torch.nn.Module = kind.from_pretrained(folder, **loading_options(folder, model, dtype, on_meta=on_meta))
    return loaded


def differences(model: ModelSpec, config: Any, part: str, *, grown: bool = False) -> list[str]:
    """`grown`: a run has added tokens, so that the checkpoint may have more embeddings."""
    given = model.architecture.get(part) or {}
    wanted = {**given, **given.get("options", {})}
    has = getattr(config, f"{part}_config", None)
    pairs = {key: (wanted[key], one_side(getattr(has, key, None))) for key in SHAPE if wanted.get(key) is not None}
    if grown and pairs.get("vocab_size") and pairs["vocab_size"][1] > pairs["vocab_size"][0]:
        del pairs["vocab_size"]
    return [f"  model.architecture.{part}.{key}: {ours}, the checkpoint has {its}" for key, (ours, its) in pairs.items() if ours != its]


def one_side(value: Any) -> Any:
    """Some configs write the side of a square twice."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value
