"""Open published checkpoints with our own model classes, for models that transformers has no class for.

The parameters have the published names, so that nothing is translated: `from_pretrained` reads safetensors, or a .bin with torch's
tensors-only loader, and `save_pretrained` writes the same names again. Code in a checkpoint is never run.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from trainer.contract import InputRefused, ModelSpec
from trainer.contract.weight_files import read_added_tokens
from trainer.data.encode import image_id
from trainer.data.processor import Inputs, Processor
from trainer.models.architecture import differences, loading_options, refuse_kind, refuse_lines
from trainer.models.openbmb.sentencepiece import TOKENIZER_FILE, open_pieces
from trainer.models.processor import USE_ITS_TOKENIZER, find_ids, write_files
from trainer.models.span import Fixed
from trainer.models.weight import round_weights

SHOWN_KEYS = 6
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
Ids = tuple[int, int, int]


def load_published(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool
) -> torch.nn.Module:
    """Raises InputRefused with a list if names or shapes of the checkpoint's tensors differ from those of the model."""
    options = loading_options(folder, model, dtype, on_meta=on_meta)
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all differences are refused below
        loaded, found = kind.from_pretrained(folder, config=config, **options)
    except UnpicklingError as error:
        raise InputRefused(
            f"{folder} has a weight file that contains code, which is never run: {error}\n    use the published files"
        ) from error
    other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    lines = [
        f"  {len(keys)} {what}: {', '.join(sorted(keys)[:SHOWN_KEYS])}{' ...' if len(keys) > SHOWN_KEYS else ''}"
        for what, keys in (("missing", found["missing_keys"]), ("unexpected", found["unexpected_keys"]), ("with another shape", other))
        if keys
    ]
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(
            f"the tensors of {folder} are those of another revision of {model.name}:\n{listed}\n"
            "    use the published revision, or set model=NAME to the checkpoint's model"
        )
    return round_weights(loaded, dtype)  # transformers does not convert buffers


def read_config(folder: Path, model: ModelSpec, kind: type[PreTrainedConfig], parts: Callable[[Any], Any]) -> Any:
    """The config in `folder`. `parts(config)`: an object with `text_config` and `vision_config`.

    Raises InputRefused with each difference if the checkpoint is of another model. The keys in model.architecture.options.unverified are
    not compared: the published file was not available, so its values are used."""
    refuse_kind(folder, model, kind)
    config = kind.from_pretrained(folder, local_files_only=True)
    options = model.architecture["options"]
    unverified, queries = options.get("unverified", ()), getattr(config, "query_num", getattr(config, "num_query", None))
    grown = bool(read_added_tokens(folder))
    lines = [line for part in ("vision", "text") for line in differences(model, parts(config), part, grown=grown)]
    if queries != options["num_query"]:
        lines.append(f"  model.architecture.options.num_query: {options['num_query']}, the checkpoint has {queries}")
    lines = [line for line in lines if not any(line.startswith(f"  model.architecture.{name}:") for name in unverified)]
    refuse_lines(folder, model, lines)
    return config


def open_published(folder: Path, model: ModelSpec, vocabulary: int, tokens: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the right. If its class is code in the checkpoint, the Llama tokenizer that this code wraps. A
    tokenizer.model without tokenizer.json is read by `trainer.models.openbmb.sentencepiece`, which follows sentencepiece where transformers
    does not. `tokens`: attribute -> token before, in and after an image. Missing ones are appended, as the published code does.

    Raises InputRefused for the tokenizer of another model."""
    alone = (folder / TOKENIZER_FILE).is_file() and not (folder / "tokenizer.json").is_file()
    tokenizer = open_pieces(folder) if alone else open_whole(folder)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_tokens(
        [token for token in tokens.values() if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)],
        special_tokens=True,
    )
    try:
        image_id(tokenizer, model.image_token)
    except InputRefused as error:
        raise InputRefused(f"{folder}: {error}") from error
    if len(tokenizer) > vocabulary:
        raise InputRefused(f"{folder}: the tokenizer has {len(tokenizer)} tokens; the model has {vocabulary} embeddings{USE_ITS_TOKENIZER}")
    return tokenizer


def open_whole(folder: Path) -> PreTrainedTokenizerBase:
    file = folder / "tokenizer_config.json"
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = LlamaTokenizer if "AutoTokenizer" in own.get("auto_map", {}) else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    return tokenizer


def find_frame(folder: Path, model: ModelSpec, config: Any, tokens: Mapping[str, str], image_token: str) -> Ids:
    """The ids before an image, of each image token, and after it, from the tokenizer. Raises InputRefused if the config has other ids: images
    would be read as text."""
    tokenizer = open_published(folder, model, config.vocab_size, tokens)
    before, after = find_ids(tokenizer, tokens, "image_start_token", "image_end_token")
    found = before, tokenizer.convert_tokens_to_ids(image_token), after
    given = get_frame(config)
    names = tokens["image_start_token"], image_token, tokens["image_end_token"]
    for name, its, ours in zip(names, found, given, strict=True):
        if ours not in (None, its):
            raise InputRefused(f"{folder}: the tokenizer has {name!r} as {its}, the model as {ours}{USE_ITS_TOKENIZER}")
    return found


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def get_frame(config: Any) -> Any:
    """The ids before an image, of each image token, and after it; None for an id that the config does not have."""
    return config.image_start_token_id, config.image_token_id, config.image_end_token_id


def set_frame(config: Any, frame: Ids) -> None:
    config.image_start_token_id, config.image_token_id, config.image_end_token_id = frame


def assemble(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, span: Fixed, side: int, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Processor:
    """Every image is scaled to a square of `side` pixels, whatever its aspect ratio, and becomes the tokens of `span`."""
    size = {"height": side, "width": side}
    images = SiglipImageProcessorPil(size=size, resample=BICUBIC, image_mean=list(mean), image_std=list(std))

    def image_features(picture: Image) -> Inputs:
        return {"pixel_values": images(images=picture, return_tensors="pt")["pixel_values"]}

    save = partial(write_files, model=model, tokenizer=tokenizer, image_processor=images, mark=model.image_token)
    return Processor(tokenizer=tokenizer, image_features=image_features, span=span, save=save)


def put_images(embeddings: Tensor, input_ids: Tensor, features: Tensor, frame: Ids) -> Tensor:
    """Replaces the embeddings (B, T, width) of image tokens by `features` (images, queries, width). Raises ValueError if their numbers
    differ."""
    inside = find_image_tokens(input_ids, features.shape[1], frame)
    tokens, given = int(inside.sum()), features.shape[0] * features.shape[1]
    if tokens != given:
        raise ValueError(f"{tokens} image tokens for {given} image features")
    return embeddings.masked_scatter(inside[..., None], features.to(embeddings.dtype))


def find_image_tokens(input_ids: Tensor, queries: int, frame: Ids) -> Tensor:
    """(B, T) bool for (B, T) int64: the image tokens of complete images. A start, image or end token elsewhere is part of a text and does not
    affect the images of its row, nor of samples packed with it."""
    before, image, after = frame
    length = input_ids.shape[1]
    further = pad(input_ids, (0, queries + 1), value=-1)
    images = (further == image).cumsum(dim=1)  # up to and including each position
    full = images[:, queries : queries + length] - images[:, :length] == queries
    starts = ((input_ids == before) & full & (further[:, queries + 1 :] == after)).int()
    opened, closed = (pad(starts, (shift, 0))[:, :length].cumsum(dim=1) for shift in (1, queries + 1))
    return opened > closed


def initialise(model: Any, module: torch.nn.Module) -> None:
    """Random values for `module`: by transformers' rules, and by its own `initialise` for bare tensors."""
    PreTrainedModel._init_weights(model, module)
    if hasattr(module, "initialise"):
        module.initialise()
