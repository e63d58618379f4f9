"""Samples to the tensors of a micro-batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.cache import Cache
from trainer.data.batch.draw import image_key, noise_spans
from trainer.data.encode import IGNORED, Encoded, encode, encode_prompt
from trainer.data.media.augment import augment
from trainer.data.media.image import open_image
from trainer.data.rows.sample import Sample

if TYPE_CHECKING:
    from trainer.data.processor import Processor

BLANK_SIZE = (64, 64)  # of the dummy image, as in LLaMA-Factory's collator; the processor scales it
BYTES_PER_TOKEN = 80  # of an encoded text in memory: an int object and an entry in each of two lists


@dataclass(frozen=True, kw_only=True)
class Features:
    """One image as inputs of the model. `size`: (width, height) in pixels of the upright image that they were computed from."""

    tensors: dict[str, Tensor]
    size: tuple[int, int]


def collate(samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, cache: Cache | None = None) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels, [B, T] int64 (labels are -100 outside the loss), and the tensors of the images.

    Raises InputRefused with file and row for a sample that cannot be encoded or an image that cannot be opened.
    """
    cache = Cache(0) if cache is None else cache
    loaded = [load_images(sample, processor, spec, cache) for sample in samples]
    texts = [encode_cached(sample, processor, spec, found, cache) for sample, found in zip(samples, loaded, strict=True)]
    images = [found[: len(found) - text.cut_images] for found, text in zip(loaded, texts, strict=True)]
    dummy = dummy_images(processor, cache) if needs_dummy(images, spec) else ()
    padding = pad_rows([text.input_ids for text in texts], dummy, processor)
    rows = [(text, dummy_ids + pads) for text, (dummy_ids, pads) in zip(texts, padding, strict=True)]
    input_ids = int64_tensor([text.input_ids + end for text, end in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": int64_tensor([[1] * len(text.input_ids) + [0] * len(end) for text, end in rows]),
        "labels": int64_tensor([text.labels + [IGNORED] * len(end) for text, end in rows]),
        **noise_spans(samples, [(row, 0, len(text.input_ids)) for row, text in enumerate(texts)], spec),
        **processor.text_inputs(input_ids),
        **join([*(image for found in images for image in found), *dummy], processor),
    }


def collate_prompts(
    samples: Sequence[Sample], processor: "Processor", spec: TrainSpec, cache: Cache | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Left-padded input_ids and attention_mask, [B, T] int64, and the tensors of the images, for generation; and the B reference answers.

    Raises InputRefused as `collate` does.
    """
    cache = Cache(0) if cache is None else cache
    images = [load_images(sample, processor, spec, cache) for sample in samples]
    prompts = [encode_prompt(sample, *encode_arguments(processor, spec, found)) for sample, found in zip(samples, images, strict=True)]
    dummy = dummy_images(processor, cache) if needs_dummy(images, spec) else ()
    tensors = collate_left([prompt.input_ids for prompt in prompts], [image for found in images for image in found], dummy, processor)
    return tensors, tuple(prompt.reference for prompt in prompts)


def collate_left(
    prompts: Sequence[list[int]], images: Sequence[Features], dummy: Sequence[Features], processor: "Processor"
) -> dict[str, Tensor]:
    """Left-padded input_ids and attention_mask, [B, T] int64, and the tensors of `images`, which are in the order of the prompts."""
    padding = [pads + dummy_ids for dummy_ids, pads in pad_rows(prompts, dummy, processor)]
    input_ids = int64_tensor([front + ids for front, ids in zip(padding, prompts, strict=True)])
    return {
        "input_ids": input_ids,
        "attention_mask": int64_tensor([[0] * len(front) + [1] * len(ids) for front, ids in zip(padding, prompts, strict=True)]),
        **processor.text_inputs(input_ids),
        **join([*dummy, *images], processor),
    }


# -------------------------------------------------------------------------------------------------------------- image, text


def load_images(sample: Sample, processor: "Processor", spec: TrainSpec, cache: Cache) -> tuple[Features, ...]:
    """Augmented ones are different in every step, and are not kept in the cache."""
    if sample.draw and spec.data.augmentation.any:
        return tuple(draw_image(path, sample, index, processor, spec) for index, path in enumerate(sample.images))
    return tuple(load_image(path, sample, processor, cache) for path in sample.images)


def draw_image(path: Path, sample: Sample, index: int, processor: "Processor", spec: TrainSpec) -> Features:
    with naming_row(sample):
        return make_features(augment(open_image(path), spec.data.augmentation, image_key(sample, index, spec)), processor)


def load_image(path: Path, sample: Sample, processor: "Processor", cache: Cache) -> Features:
    with naming_row(sample):
        return cache.get(path, lambda: make_features(open_image(path), processor), feature_bytes)


@contextmanager
def naming_row(sample: Sample) -> Iterator[None]:
    """Puts file and row in front of the message of an InputRefused about an image."""
    try:
        yield
    except InputRefused as error:
        raise InputRefused(f"{sample.file} row {sample.row}, key 'image': {error}") from error


def make_features(image: Image.Image, processor: "Processor") -> Features:
    return Features(tensors=processor.image_features(image), size=image.size)


def feature_bytes(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.tensors.values())


def encode_cached(sample: Sample, processor: "Processor", spec: TrainSpec, images: Sequence[Features], cache: Cache) -> Encoded:
    def make() -> Encoded:
        return encode(sample, *encode_arguments(processor, spec, images), cuts=spec.data.too_long == "cut")

    key = (
        sample.file,
        sample.row,
        sample.part,
        *(image.size for image in images),
    )  # the size in a header may differ from that of the decoded image
    return cache.get(key, make, lambda encoded: BYTES_PER_TOKEN * len(encoded.input_ids))


def encode_arguments(processor: "Processor", spec: TrainSpec, images: Sequence[Features]) -> tuple[Any, ...]:
    """The arguments of `encode` and `encode_prompt` after the sample."""
    spans = tuple(processor.span(image.size, index) for index, image in enumerate(images))
    return processor.tokenizer, spec.model.template, spec.model.image_token, spans, spec.data.max_length


def join(images: Sequence[Features], processor: "Processor") -> dict[str, Tensor]:
    """The tensors of all images, concatenated, by name; {} without images."""
    names = images[0].tensors if images else ()
    return {name: torch.cat([image.tensors[name] for image in images], dim=processor.axes.get(name, 0)) for name in names}


# ------------------------------------------------------------------------------------------------------- dummy and padding


def needs_dummy(images: Sequence[Sequence[Features]], spec: TrainSpec) -> bool:
    """Whether a micro-batch without images must contain a dummy image, so that every rank runs the vision tower.

    Without it a rank would have no gradients for vision and projector while others have some, and the collective operations would hang.
    Under ZeRO-3 they hang even when these groups are frozen, because all ranks gather the weights together.
    """
    trains_vision = bool({"vision", "projector"} & set(spec.stage.trainable))
    return not any(images) and (spec.partitioned or (trains_vision and spec.stage.kind == "train"))


def dummy_images(processor: "Processor", cache: Cache) -> tuple[Features, ...]:
    blank = Image.new("RGB", BLANK_SIZE)
    return (cache.get("blank", lambda: make_features(blank, processor), feature_bytes),)


def pad_rows(rows: Sequence[list[int]], dummy: Sequence[Features], processor: "Processor") -> list[tuple[list[int], list[int]]]:
    """(ids of the dummy image, padding) that make each row as long as the longest. Only the shortest row gets the dummy image. It is outside
    the text and masked, so that it affects neither the loss nor other tokens, but each image feature has its image token."""
    pad = processor.tokenizer.pad_token_id
    if pad is None:
        raise InputRefused("the tokenizer has no pad token\n    set pad_token in its tokenizer_config.json")
    ends: list[list[int]] = [[] for _ in rows]
    if dummy:
        shortest = min(range(len(rows)), key=lambda index: len(rows[index]))
        ends[shortest] = list(processor.span(dummy[0].size, 0))
    width = max(len(row) + len(end) for row, end in zip(rows, ends, strict=True))
    return [(end, [pad] * (width - len(row) - len(end))) for row, end in zip(rows, ends, strict=True)]


def int64_tensor(rows: list[list[int]]) -> Tensor:
    """[B, T] int64 from rows of equal length. Through numpy: 64 rows of 32 take 0.08 ms, but 0.43 ms with torch.tensor."""
    return torch.from_numpy(np.array(rows, dtype=np.int64))
