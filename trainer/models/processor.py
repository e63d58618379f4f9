"""Shared code of the families' processors: open a tokenizer, find special tokens, write the files of a processor of transformers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from trainer.contract import InputRefused, ModelSpec
from trainer.data.chat.segment_ids import token_ids
from trainer.data.encode import image_id
from trainer.models.architecture import refuse_another
from trainer.models.span import Frame, Ids, Slices
from trainer.models.template import chat_template

PROCESSOR_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
USE_ITS_TOKENIZER = "\n    use the tokenizer that belongs to the model"


def open_tokenizer(
    folder: Path, model: ModelSpec, image: int | None, vocabulary: int, kind: Any = AutoTokenizer
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the right. `image`: the image token id in the model's config, None if it has none;
    `vocabulary`: the number of its embeddings; `kind`: the class to use if the folder names one of its own code. Raises InputRefused for
    the tokenizer of another model."""
    tokenizer = kind.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "right"
    try:
        found = image_id(tokenizer, model.image_token)
    except InputRefused as error:
        raise InputRefused(f"{folder}: {error}") from error
    image = found if image is None else image
    if found != image or len(tokenizer) > vocabulary:
        what = f"has {model.image_token!r} as {found}, the model as {image}" if found != image else f"has {len(tokenizer)} tokens"
        raise InputRefused(f"{folder}: the tokenizer {what}; the model has {vocabulary} embeddings{USE_ITS_TOKENIZER}")
    return tokenizer


def find_ids(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str], *names: str) -> tuple[int, ...]:
    """The ids of special tokens: the attribute `name` of the tokenizer, or the default in `tokens`. Raises InputRefused if one is missing."""
    return tuple(image_id(tokenizer, getattr(tokenizer, name, None) or tokens[name]) for name in names)


def find_slices(
    tokenizer: PreTrainedTokenizerBase,
    special: Mapping[str, str],
    names: tuple[str, str, str, str, str, str],
    image_token: str,
    *,
    numbered: bool,
    **sizes: int,
) -> Slices:
    """The spans of MiniCPM-V. `names` (in `special`): start and end of an image, of a slice, and of the number of an image."""
    start, end, slice_start, slice_end = find_ids(tokenizer, special, *names[:4])

    def spell_number(index: int) -> Ids:
        before, after = find_ids(tokenizer, special, *names[4:])
        return (before, *token_ids(tokenizer, str(index)), after)

    return Slices(
        image=image_id(tokenizer, image_token),
        overview=Frame(before=(start,), after=(end,)),
        slice=Frame(before=(slice_start,), after=(slice_end,)),
        line=tuple(token_ids(tokenizer, "\n")),
        number=spell_number if numbered else None,
        **sizes,
    )


def processor_writer(
    model: ModelSpec, tokenizer: PreTrainedTokenizerBase, image_processor: Any, kind: str, mark: str, **settings: Any
) -> Callable[[Path], None]:
    """A function that writes all files that the processor class `kind` reads. `mark`: the text of an image in the chat template.

    The class itself cannot be used: it needs torchvision for its video processor."""

    def write(folder: Path) -> None:
        write_files(folder, model, tokenizer, image_processor, mark)
        add_key(folder / IMAGE_FILE, "processor_class", kind)
        images = {key: value for key, value in image_processor.to_dict().items() if key != "processor_class"}
        content = {"processor_class": kind, "image_processor": images, **settings}
        (folder / PROCESSOR_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return write


def write_files(folder: Path, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, image_processor: Any, mark: str) -> None:
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / TEMPLATE_FILE).write_text(chat_template(model.template, mark), encoding="utf-8")


def open_files(
    folder: Path, model: ModelSpec, config_type: type[PreTrainedConfig], image_processor_type: Any
) -> tuple[Any, PreTrainedTokenizerBase, Any]:
    """(config, tokenizer, image processor), from the files of `Processor.save` or of a published checkpoint."""
    config: Any = refuse_another(folder, model, config_type)
    tokenizer = open_tokenizer(folder, model, config.image_token_id, config.text_config.vocab_size)
    return config, tokenizer, image_processor_type.from_pretrained(folder, local_files_only=True)


def add_key(file: Path, key: str, value: str) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), key: value}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
