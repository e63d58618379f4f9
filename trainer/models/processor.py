"""What the processors of all families have in common: opened from a folder, and written to one as transformers' own would be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.contract import InputRefused, ModelSpec
from trainer.data.encode import image_id
from trainer.models.template import chat_template

PROCESSOR_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
TEMPLATE_FILE = "chat_template.jinja"


def open_tokenizer(
    folder: Path, model: ModelSpec, image: int | None, vocabulary: int, kind: Any = AutoTokenizer
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the right. `image`: the id that the model in `folder` puts its images at, None where it does
    not say; `vocabulary`: its rows of embeddings; `kind`: the class that opens it, where the folder names one of its own code. Raises
    InputRefused for the tokenizer of another model."""
    tokenizer = kind.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "right"
    try:
        found = image_id(tokenizer, model.image_token)
    except InputRefused as error:
        raise InputRefused(f"{folder}: {error}") from error
    image = found if image is None else image
    if found != image or len(tokenizer) > vocabulary:
        what = f"has {model.image_token!r} as {found}, the model as {image}" if found != image else f"has {len(tokenizer)} tokens"
        raise InputRefused(
            f"{folder}: the tokenizer {what}; the model has {vocabulary} embeddings\n    take the tokenizer that belongs to the model"
        )
    return tokenizer


def find_ids(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str], *names: str) -> tuple[int, ...]:
    """The ids of special tokens: of what the tokenizer has under each name, else of what `tokens` says. Raises InputRefused without one."""
    return tuple(image_id(tokenizer, getattr(tokenizer, name, None) or tokens[name]) for name in names)


def write_processor(
    folder: Path,
    model: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    kind: str,
    *,
    mark: str,
    more: Mapping[str, Any],
) -> None:
    """Every file that the processor class `kind` opens. `mark`: what its text holds for an image; `more`: its own settings.

    By hand, since the classes cannot be made without torchvision, which their video processors need."""
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    add_key(folder / IMAGE_FILE, "processor_class", kind)
    images = {key: value for key, value in image_processor.to_dict().items() if key != "processor_class"}
    settings = {"processor_class": kind, "image_processor": images, **more}
    (folder / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(chat_template(model.template, mark), encoding="utf-8")


def add_key(file: Path, key: str, value: str) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), key: value}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
