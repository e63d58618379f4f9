"""Model classes of our own that open a checkpoint as it was published, for families that transformers has none for.

Their parameters have the published names, so that there is nothing to translate: `from_pretrained` reads safetensors, or a .bin through
torch's loader of tensors alone, and `save_pretrained` writes the same names again. No code of a checkpoint is ever run.
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
from trainer.data.encode import image_id
from trainer.models.architecture import differences, loading_options, refuse_kind
from trainer.models.family import Inputs, Processor
from trainer.models.openbmb.sentencepiece import FILE as PIECE_FILE, open_pieces
from trainer.models.processor import IMAGE_FILE, TEMPLATE_FILE, find_ids
from trainer.models.span import Fixed
from trainer.models.template import chat_template
from trainer.models.weight import round_weights

SHOWN_KEYS = 6
BICUBIC = 3  # PIL's number of it
Ids = tuple[int, int, int]


def load_published(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool
) -> torch.nn.Module:
    """Raises InputRefused, listing them, where the checkpoint's tensors are not those of the model, by name or shape."""
    options = loading_options(folder, model, dtype, on_meta=on_meta)
    try:
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all that differs is refused below
        loaded, found = kind.from_pretrained(folder, config=config, **told, **options)
    except UnpicklingError as error:
        raise InputRefused(f"{folder} holds code among its tensors, which is never run: {error}\n    take the published files") from error
    other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    lines = [
        f"  {len(keys)} {what}: {', '.join(sorted(keys)[:SHOWN_KEYS])}{' ...' if len(keys) > SHOWN_KEYS else ''}"
        for what, keys in (("missing", found["missing_keys"]), ("not of this model", found["unexpected_keys"]), ("of another shape", other))
        if keys
    ]
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(
            f"{folder} holds another revision of {model.name}, by its tensors:\n{listed}\n"
            "    take the revision that was published, or choose the checkpoint's own model with model=NAME"
        )
    return round_weights(loaded, dtype)  # transformers leaves buffers as they were made


def read_config(folder: Path, model: ModelSpec, kind: type[PreTrainedConfig], parts: Callable[[Any], Any]) -> Any:
    """The config in `folder`. `parts`: it as an object with `text_config` and `vision_config`.

    Raises InputRefused, naming each difference, where the checkpoint is of another model. What model.architecture.options.unverified names
    is not compared: the published file was never seen, and what it says is taken."""
    refuse_kind(folder, model, kind)
    config = kind.from_pretrained(folder, local_files_only=True)
    options = model.architecture["options"]
    unverified, queries = options.get("unverified", ()), getattr(config, "query_num", getattr(config, "num_query", None))
    lines = [line for part in ("vision", "text") for line in differences(model, parts(config), part)]
    if queries != options["num_query"]:
        lines.append(f"  model.architecture.options.num_query: {options['num_query']}, the checkpoint has {queries}")
    lines = [line for line in lines if not any(line.startswith(f"  model.architecture.{name}:") for name in unverified)]
    if lines:
        listed = "\n".join(lines)
        raise InputRefused(f"{folder} holds another model than {model.name}: choose its own with model=NAME.\n{listed}")
    return config


def open_published(folder: Path, model: ModelSpec, vocabulary: int, tokens: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the right; where its class is code of the checkpoint's own, the Llama tokenizer that this code
    wraps. A sentencepiece model that stands alone is read by `trainer.models.openbmb.sentencepiece`, as sentencepiece and not as transformers would.
    `tokens`: attribute -> token of the image's frame. Those that it lacks are added, as the published code does, behind the others.

    Raises InputRefused for the tokenizer of another model."""
    alone = (folder / PIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file()
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
        raise InputRefused(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens; the model has {vocabulary} embeddings\n"
            "    take the tokenizer that belongs to the model"
        )
    return tokenizer


def open_whole(folder: Path) -> PreTrainedTokenizerBase:
    file = folder / "tokenizer_config.json"
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = LlamaTokenizer if "AutoTokenizer" in own.get("auto_map", {}) else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    return tokenizer


def find_frame(folder: Path, model: ModelSpec, config: Any, tokens: Mapping[str, str], image_token: str) -> Ids:
    """The ids before an image, of each of its places and after it: as our own checkpoints say, else of the tokenizer beside a published one.
    Raises InputRefused where both say them and differ: every image would be read as words."""
    tokenizer = open_published(folder, model, config.vocab_size, tokens)
    before, after = find_ids(tokenizer, tokens, "image_start_token", "image_end_token")
    found = before, tokenizer.convert_tokens_to_ids(image_token), after
    said = find_marks(config)
    names = tokens["image_start_token"], image_token, tokens["image_end_token"]
    for name, its, ours in zip(names, found, said, strict=True):
        if ours not in (None, its):
            raise InputRefused(
                f"{folder}: the tokenizer has {name!r} as {its}, the model as {ours}\n    take the tokenizer that belongs to the model"
            )
    return found


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def find_marks(config: Any) -> Any:
    """The ids of an image's frame, each None where the config does not say."""
    return config.image_start_token_id, config.image_token_id, config.image_end_token_id


def keep_marks(config: Any, frame: Ids) -> None:
    config.image_start_token_id, config.image_token_id, config.image_end_token_id = frame


def assemble(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, span: Fixed, side: int, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Processor:
    """Every image becomes a square of `side` pixels, whatever its aspect, and the tokens of `span`."""
    size = {"height": side, "width": side}
    images = SiglipImageProcessorPil(size=size, resample=BICUBIC, image_mean=list(mean), image_std=list(std))

    def image_features(picture: Image) -> Inputs:
        return {"pixel_values": images(images=picture, return_tensors="pt")["pixel_values"]}

    return Processor(
        tokenizer=tokenizer, image_features=image_features, span=span, save=partial(write, model=model, tokenizer=tokenizer, images=images)
    )


def write(folder: Path, *, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: SiglipImageProcessorPil) -> None:
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / TEMPLATE_FILE).write_text(chat_template(model.template, model.image_token), encoding="utf-8")
    assert (folder / IMAGE_FILE).is_file()


def put_images(embeddings: Tensor, input_ids: Tensor, features: Tensor, frame: Ids) -> Tensor:
    """`features`, (images, queries, width), at the places of images: (B, T, width) -> the same. Raises ValueError where there are more
    places than features, or fewer."""
    inside = find_places(input_ids, features.shape[1], frame)
    places, given = int(inside.sum()), features.shape[0] * features.shape[1]
    if places != given:
        raise ValueError(f"{places} places between image marks for {given} image features")
    return embeddings.masked_scatter(inside[..., None], features.to(embeddings.dtype))


def find_places(input_ids: Tensor, queries: int, frame: Ids) -> Tensor:
    """(B, T) bool, of (B, T) int64: where whole frames hold an image. A mark that stands alone is a word of somebody's text, and moves no
    image of its row, nor of those that are packed with it."""
    before, image, after = frame
    length = input_ids.shape[1]
    further = pad(input_ids, (0, queries + 1), value=-1)
    images = (further == image).cumsum(dim=1)  # up to and with each place
    full = images[:, queries : queries + length] - images[:, :length] == queries
    starts = ((input_ids == before) & full & (further[:, queries + 1 :] == after)).int()
    opened, closed = (pad(starts, (shift, 0))[:, :length].cumsum(dim=1) for shift in (1, queries + 1))
    return opened > closed


def initialise(model: Any, module: torch.nn.Module) -> None:
    """A random start of `module`: by transformers' rules, and by its own `initialise` for bare tensors."""
    PreTrainedModel._init_weights(model, module)
    if hasattr(module, "initialise"):
        module.initialise()
