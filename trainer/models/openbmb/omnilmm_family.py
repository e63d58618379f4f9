"""Shared code of OmniLMM-12B and OmniLMM-3B: both have a fixed number of query tokens per image and the published parameter names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from trainer.contract import ModelSpec
from trainer.data.processor import Processor
from trainer.models.architecture import ATTENTION, find_sizes, find_text
from trainer.models.family import UNBOUND, Family, Limit
from trainer.models.openbmb.published import (
    assemble,
    find_frame,
    get_frame,
    has_tokenizer,
    load_published,
    open_published,
    put_images,
    read_config,
    set_frame,
)
from trainer.models.processor import find_ids
from trainer.models.span import Fixed

HEAD_WIDTH = 128  # of the resampler


@dataclass(frozen=True, kw_only=True)
class OmniLMMEdition:
    """What distinguishes the two. `image_token`: stands for each query. `queries`: the key of their number in the config.
    `find_tower(config)`: the numbers of the vision tower. `check(folder, model)`: called before the config is read."""

    name: str
    network: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    tokens: Mapping[str, str]
    image_token: str
    queries: str
    find_tower: Callable[[Any], dict[str, Any]]
    make_tokenizer: Callable[[ModelSpec], PreTrainedTokenizerBase]
    check: Callable[[Path, ModelSpec], None]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_family(edition: OmniLMMEdition) -> Family:
    return Family(
        name=edition.name,
        create=partial(create, edition),
        load=partial(load, edition),
        create_processor=partial(create_processor, edition),
        load_processor=partial(load_processor, edition),
    )


def create(edition: OmniLMMEdition, model: ModelSpec) -> torch.nn.Module:
    """Raises InputRefused if the tokenizer has more tokens than the vocabulary."""
    tokenizer = edition.make_tokenizer(model)
    before, after = find_ids(tokenizer, edition.tokens, "image_start_token", "image_end_token")
    tower, side = split_tower(model)
    queries = {edition.queries: model.architecture["options"]["num_query"], "image_size": side}
    image = tokenizer.convert_tokens_to_ids(edition.image_token)
    ids = {"image_start_token_id": before, "image_token_id": image, "image_end_token_id": after}
    config = edition.config(**{**find_text(model, tokenizer), **queries, **ids}, tower=tower)
    config._attn_implementation = ATTENTION[model.attention]
    return edition.network(config)


def load(edition: OmniLMMEdition, folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
    """Raises InputRefused with each difference if the checkpoint in `folder` is of another model or revision."""
    config = open_config(edition, folder, model)
    if None in get_frame(config) or has_tokenizer(folder):  # our own checkpoints have the ids, also without a tokenizer
        set_frame(config, find_frame(folder, model, config, edition.tokens, edition.image_token))
    return load_published(edition.network, config, folder, model, dtype, on_meta=on_meta)


def open_config(edition: OmniLMMEdition, folder: Path, model: ModelSpec) -> Any:
    def split_config(config: Any) -> SimpleNamespace:
        tower = SimpleNamespace(**{**edition.find_tower(config), "image_size": config.image_size})
        return SimpleNamespace(text_config=config, vision_config=tower)

    edition.check(folder, model)
    return read_config(folder, model, edition.config, split_config)


def create_processor(edition: OmniLMMEdition, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    queries = model.architecture["options"]["num_query"]
    return complete(edition, model, edition.make_tokenizer(model), queries, split_tower(model)[1])


def load_processor(edition: OmniLMMEdition, folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
    """From the files of `Processor.save` or of a published checkpoint."""
    config = open_config(edition, folder, model)
    find_frame(folder, model, config, edition.tokens, edition.image_token)
    tokenizer = open_published(folder, model, config.vocab_size, edition.tokens)
    return complete(edition, model, tokenizer, getattr(config, edition.queries), config.image_size)


def complete(edition: OmniLMMEdition, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, queries: int, side: int) -> Processor:
    before, after = find_ids(tokenizer, edition.tokens, "image_start_token", "image_end_token")
    image = tokenizer.convert_tokens_to_ids(edition.image_token)
    span = Fixed(before=(before,), image=image, after=(after,), tokens=queries)
    return assemble(model, tokenizer, span, side, mean=edition.mean, std=edition.std)


def split_tower(model: ModelSpec) -> tuple[dict[str, Any], int]:
    """The numbers of the tower in conf/model, and the side of an image in pixels."""
    sizes = find_sizes(model, "vision")
    return {key: value for key, value in sizes.items() if key != "image_size"}, sizes["image_size"]


def embed_images(model: Any, embeddings: Tensor, input_ids: Tensor | None, pixel_values: Tensor | None, past_key_values: Any) -> Tensor:
    """`embeddings` of `input_ids` with the features of the images. An image is read with the prompt, not again with each new token."""
    starts = past_key_values is None or past_key_values.get_seq_length() == 0
    if pixel_values is None or input_ids is None or not starts:
        return embeddings
    features = model.get_image_features(pixel_values.to(embeddings.dtype))
    return put_images(embeddings, input_ids, features.pooler_output, get_frame(model.config))


def make_output(model: Any, logits: Tensor, labels: Tensor | None, past_key_values: Any, **kwargs: Any) -> CausalLMOutputWithPast:
    loss = None if labels is None else model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs)
    return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
