"""Conversations to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING

from trainer.contract import DataProblem, InputRefused, Template
from trainer.data.rows.sample import Sample
from trainer.data.segment import Segment, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Equally long. `labels` are not shifted: the model does that. Masked places hold IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Everything up to the last answer, and that answer."""

    input_ids: list[int]
    reference: str


def encode(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    image_token: str,
    spans: Sequence[Sequence[int]],
    max_length: int,
) -> Encoded:
    """Ids of the whole conversation; answers and their end marks are labels. `spans`: the ids that stand for each image.

    Raises InputRefused for more than `max_length` tokens (nothing is ever cut off), and for a text without a trained token.
    """
    segments = cut(sample, template, image_token)
    pieces = expand(sample, tokenise(tokenizer, segments), image_id(tokenizer, image_token), spans)
    start = opening(tokenizer)
    ids = [*start, *chain.from_iterable(pieces)]
    labels = [IGNORED] * len(start)
    for segment, piece in zip(segments, pieces, strict=True):
        labels += piece if segment.in_loss else repeat(IGNORED, len(piece))
    check_length(sample, len(ids), sum(map(len, spans)), max_length)
    if all(label == IGNORED for label in labels):
        refuse(sample, "the tokenizer makes no token of its answers, so that nothing would be learned", "write a visible answer")
    return Encoded(input_ids=ids, labels=labels)


def encode_prompt(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    image_token: str,
    spans: Sequence[Sequence[int]],
    max_length: int,
) -> Prompt:
    """What the model is given to answer the last question: exactly the ids that came before that answer in training.

    Raises InputRefused as `encode` does.
    """
    asked = replace(sample, messages=(*sample.messages[:-1], replace(sample.messages[-1], in_loss=True)))  # even if it is not learned
    segments = cut(asked, template, image_token)
    last = max(place for place, segment in enumerate(segments) if segment.in_loss)
    pieces = expand(sample, tokenise(tokenizer, segments[:last]), image_id(tokenizer, image_token), spans)
    ids = [*opening(tokenizer), *chain.from_iterable(pieces)]
    check_length(sample, len(ids), sum(map(len, spans)), max_length)
    return Prompt(input_ids=ids, reference=sample.messages[-1].content)


def tokenise(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment]) -> list[list[int]]:
    """The ids of each segment.

    They are those of the whole text, as a server makes them that is sent the conversation: tokenised alone, a segment would get a word
    start of its own from a SentencePiece tokenizer. Only where a token reaches across the edge is the text cut there, because the
    ids of a prompt must be the beginning of the ids that were trained on.
    """
    text = ""
    ids: list[int] = []
    pieces: list[list[int]] = []
    for segment in segments:
        text += segment.text
        whole = token_ids(tokenizer, text)
        piece = whole[len(ids) :] if whole[: len(ids)] == ids else token_ids(tokenizer, segment.text)
        pieces.append(piece)
        ids = ids + piece
    return pieces


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@lru_cache(maxsize=8)  # asked for every sample; a tokenizer does not change once a run has begun
def opening(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """(BOS,) if the tokenizer starts a text with it. Having one is not enough: some models name a BOS that they never saw."""
    first = tuple(tokenizer("")["input_ids"][:1])
    return first if first == (tokenizer.bos_token_id,) else ()


@lru_cache(maxsize=8)
def image_id(tokenizer: "PreTrainedTokenizerBase", image_token: str) -> int:
    """Raises InputRefused when the tokenizer does not know `image_token` as one token."""
    ids = token_ids(tokenizer, image_token)
    unknown = len(ids) == 1 and ids[0] == tokenizer.unk_token_id and image_token != tokenizer.unk_token  # MiniCPM-V 2.6 puts images there
    if len(ids) != 1 or unknown:
        raise InputRefused(
            f"the tokenizer has no token {image_token!r} (it reads {len(ids)} tokens)\n    take the tokenizer that belongs to the model, "
            "or set model.image_token to the name that it uses"
        )
    return ids[0]


def expand(sample: Sample, pieces: list[list[int]], image: int, spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each image token replaced by the ids that stand for its image."""
    places = sum(piece.count(image) for piece in pieces)
    if places != len(spans):
        refuse(sample, f"{places} image tokens in the text for {len(spans)} images", "write <image> once for each image, and nowhere else")
    remaining = iter(spans)
    return [list(chain.from_iterable(next(remaining) if token == image else (token,) for token in piece)) for piece in pieces]


def check_length(sample: Sample, length: int, image_tokens: int, max_length: int) -> None:
    if length > max_length:
        refuse(
            sample,
            f"{length} tokens ({image_tokens} of them images) are longer than data.max_length={max_length}",
            f"nothing is cut off: set data.max_length={length} if model and memory take it, or split or leave out the row",
        )


def refuse(sample: Sample, problem: str, fix: str) -> None:
    raise InputRefused(str(DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix)))
