"""New tokens of model.add_tokens: in the tokenizer, and as rows of the embeddings and of the head.

They go behind the tokenizer's own tokens. Rows that the checkpoint has but its tokenizer does not use are taken first; where they are too
few, embeddings and head grow to a multiple of MULTIPLE, as matrix products are fastest with. New rows start as the mean of the rows of all
other tokens (Hewitt, 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html): a random row may get a large logit, and is then generated
everywhere.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch.nn import Parameter

from trainer.contract import InputRefused, ModelSpec
from trainer.contract.weight_files import ADDED_TOKENS, TOKENIZER_CONFIG
from trainer.data.processor import Processor
from trainer.models.family import UNBOUND, Family, Limit

MULTIPLE = 64
ADDED_IDS = "added_token_ids"  # attribute of a model: the ids of model.add_tokens
ADDED_FILE = "added_tokens.json"


def with_added_tokens(family: Family) -> Family:
    """The family, whose models and processors have the tokens of `ModelSpec.add_tokens`; without any it does what it did."""

    def create(model: ModelSpec) -> torch.nn.Module:
        network = family.create(model)
        return grow(network, model, lambda: family.create_processor(model)) if model.add_tokens else network

    def load(folder: Path, model: ModelSpec, dtype: torch.dtype, *, on_meta: bool = False) -> torch.nn.Module:
        network = family.load(folder, model, dtype, on_meta=on_meta)
        return grow(network, model, lambda: family.load_processor(folder, model)) if model.add_tokens else network

    def create_processor(model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
        return add_to_processor(family.create_processor(model, limit), model)

    def load_processor(folder: Path, model: ModelSpec, limit: Limit = UNBOUND) -> Processor:
        return add_to_processor(family.load_processor(folder, model, limit), model)

    return replace(family, create=create, load=load, create_processor=create_processor, load_processor=load_processor)


# ------------------------------------------------------------------------------------------------------------- tokenizer


def add_to_processor(processor: Processor, model: ModelSpec) -> Processor:
    """The processor, whose tokenizer has the tokens and writes them. Raises InputRefused for a token that it has already, or cannot
    write."""
    if not model.add_tokens:
        return processor
    add_to_tokenizer(processor.tokenizer, model.add_tokens)

    def save(folder: Path) -> None:
        processor.save(folder)
        write_tokens(processor.tokenizer, folder)

    return replace(processor, save=save)


def add_to_tokenizer(tokenizer: Any, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Appends those that no earlier run has added, and returns these."""
    known = tuple(tokenizer.init_kwargs.get(ADDED_TOKENS) or ())
    fresh = tuple(token for token in tokens if token not in known)
    vocabulary = tokenizer.get_vocab()
    if taken := [f"{token!r} (id {vocabulary[token]})" for token in fresh if token in vocabulary]:
        raise InputRefused(
            f"model.add_tokens: the tokenizer has {', '.join(taken)} already\n    leave them out: they are trained as they are"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in fresh])
    if lost := [repr(token) for token in fresh if not is_one_token(tokenizer, token)]:
        raise InputRefused(
            f"model.add_tokens: the tokenizer does not write {', '.join(lost)} back as it is: it takes some letters for bytes\n    use "
            "letters of ASCII in new tokens"
        )
    tokenizer.init_kwargs[ADDED_TOKENS] = [*known, *fresh]
    return fresh


def is_one_token(tokenizer: Any, token: str) -> bool:
    """Whether its text is one id, and its id is this text. Byte-level decoders read an accented letter in a new token as a byte."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True).strip() == token


def write_tokens(tokenizer: Any, folder: Path) -> None:
    """Put the tokens into tokenizer files that were copied unchanged; files that the tokenizer has written itself have them."""
    file, added = folder / TOKENIZER_CONFIG, list(tokenizer.init_kwargs[ADDED_TOKENS])
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.get(ADDED_TOKENS) == added:
        return
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    decoder = {**content.get("added_tokens_decoder", {}), **{str(place): {"content": token, **flags} for token, place in ids.items()}}
    write_json(file, {**content, "added_tokens_decoder": decoder, ADDED_TOKENS: added})
    if (folder / ADDED_FILE).is_file():
        write_json(folder / ADDED_FILE, {**json.loads((folder / ADDED_FILE).read_text(encoding="utf-8")), **ids})


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- rows


def grow(network: Any, model: ModelSpec, open_processor: Callable[[], Processor]) -> torch.nn.Module:
    """The model with a row for each token, in place, possibly on the meta device. `open_processor`: without the tokens. Rows that an earlier
    run has added keep their values."""
    tokenizer = open_processor().tokenizer
    fresh = add_to_tokenizer(tokenizer, model.add_tokens)
    used = len(tokenizer) - len(fresh)
    places = [tokenizer.convert_tokens_to_ids(token) for token in fresh]
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    old = len(embeddings.weight)
    rows = grown_rows(old, len(tokenizer))
    embeddings.weight = with_rows(embeddings.weight, rows, used, places)
    embeddings.num_embeddings = rows
    if head is not None:
        head.weight = embeddings.weight if tied else with_rows(head.weight, rows, used, places)
        head.out_features = rows
    for holder in (network.config, network.config.get_text_config(), *network.modules()):
        if isinstance(vars(holder).get("vocab_size"), int):
            holder.vocab_size = rows
    setattr(network, ADDED_IDS, tuple(tokenizer.convert_tokens_to_ids(token) for token in model.add_tokens))
    return network  # type: ignore[no-any-return]


def grown_rows(rows: int, tokens: int) -> int:
    """Of embeddings with `rows` that get as many as there are `tokens`, at least."""
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


@torch.no_grad()
def with_rows(weight: Parameter, rows: int, used: int, fresh: list[int]) -> Parameter:
    """(old rows, width) -> (`rows`, width): new rows and those in `fresh` are the mean of the first `used`, computed in float32."""
    old = len(weight)
    if rows == old and not fresh:
        return weight
    mean = weight[: min(used, old)].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    grown = torch.cat([weight, mean.expand(rows - old, -1)]) if rows > old else weight.clone()
    if fresh:
        grown[fresh] = mean
    return Parameter(grown, requires_grad=weight.requires_grad)
