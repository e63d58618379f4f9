"""Conversations to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, NoReturn

from trainer.contract import DataProblem, InputRefused, Template
from trainer.data.chat.segment import cut
from trainer.data.chat.segment_ids import token_ids, tokenise
from trainer.data.cut import IGNORED, Span, count_cut_images, find_spans
from trainer.data.rows.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKEN_IN_LOSS = ("the tokenizer makes no token of the answers, so nothing would be learned", "write a visible answer")  # problem, fix


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Two lists of equal length. `labels` are not shifted (the model does that); masked positions are IGNORED. `cut_images`: how many of the last
    images of the sample were cut off with its end."""

    input_ids: list[int]
    labels: list[int]
    cut_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The ids of everything before the last answer, and that answer."""

    input_ids: list[int]
    reference: str


def encode(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    image_token: str,
    spans: Sequence[Sequence[int]],
    max_length: int,
    *,
    cuts: bool = False,
) -> Encoded:
    """Ids of the whole conversation; answers and their end marks are labels. `spans`: the ids that replace each image token. `cuts`: a longer
    sample is cut to `max_length` tokens, where that is possible (trainer.data.cut).

    Raises InputRefused for more than `max_length` tokens, and for a text without any token in the loss.
    """
    segments = cut(sample, template, image_token)
    unexpanded = tokenise(tokenizer, segments)
    pieces = expand(sample, unexpanded, image_id(tokenizer, image_token), spans)
    start = opening(tokenizer)
    ids = [*start, *chain.from_iterable(pieces)]
    labels = [IGNORED] * len(start)
    for segment, piece in zip(segments, pieces, strict=True):
        labels += piece if segment.in_loss else repeat(IGNORED, len(piece))
    if cuts and len(ids) > max_length:
        images = find_spans(unexpanded, image_id(tokenizer, image_token), spans, len(start))
        return cut_encoded(sample, Encoded(input_ids=ids, labels=labels), images, max_length)
    check_length(sample, len(ids), sum(map(len, spans)), max_length)
    if all(label == IGNORED for label in labels):
        refuse(sample, NO_TOKEN_IN_LOSS)
    return Encoded(input_ids=ids, labels=labels)


def cut_encoded(sample: Sample, whole: Encoded, images: Sequence[Span], max_length: int) -> Encoded:
    """The first `max_length` tokens. `images`: where their tokens are. Raises InputRefused for a sample that cannot be cut there."""
    try:
        cut_images = count_cut_images(images, whole.labels, max_length)
    except ValueError as error:
        problem, fix = too_long(len(whole.input_ids), sum(end - first for first, end in images), max_length)
        refuse(sample, (f"{problem}, and cannot be cut: {error}", fix))
    return Encoded(input_ids=whole.input_ids[:max_length], labels=whole.labels[:max_length], cut_images=cut_images)


def encode_prompt(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    image_token: str,
    spans: Sequence[Sequence[int]],
    max_length: int,
) -> Prompt:
    """The ids that the model gets to answer the last question: exactly those before that answer in training.

    Raises InputRefused as `encode` does.
    """
    messages = (*sample.messages[:-1], replace(sample.messages[-1], in_loss=True))  # so that the answer is a segment of its own
    segments = cut(replace(sample, messages=messages), template, image_token)
    last = max(index for index, segment in enumerate(segments) if segment.in_loss)
    pieces = expand(sample, tokenise(tokenizer, segments[:last]), image_id(tokenizer, image_token), spans)
    ids = [*opening(tokenizer), *chain.from_iterable(pieces)]
    check_length(sample, len(ids), sum(map(len, spans)), max_length)
    return Prompt(input_ids=ids, reference=sample.messages[-1].content)


@lru_cache(maxsize=8)  # called for every sample; a tokenizer does not change during a run
def opening(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """(BOS,) if the tokenizer starts a text with it. Some tokenizers define a BOS that the model was never trained with."""
    first = tuple(tokenizer("")["input_ids"][:1])
    return first if first == (tokenizer.bos_token_id,) else ()


@lru_cache(maxsize=8)
def image_id(tokenizer: "PreTrainedTokenizerBase", image_token: str) -> int:
    """The id of `image_token`. Raises InputRefused when it is not exactly one token of the tokenizer."""
    ids = token_ids(tokenizer, image_token)
    unknown = (
        len(ids) == 1 and ids[0] == tokenizer.unk_token_id and image_token != tokenizer.unk_token
    )  # MiniCPM-V 2.6 uses <unk> for images
    if len(ids) != 1 or unknown:
        raise InputRefused(
            f"the tokenizer has no token {image_token!r} (it makes {len(ids)} tokens of it)\n    use the tokenizer that belongs to the model, "
            "or set model.image_token to the token that it uses for images"
        )
    return ids[0]


def expand(sample: Sample, pieces: list[list[int]], image: int, spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each image token replaced by the ids of its image."""
    tokens = sum(piece.count(image) for piece in pieces)
    if tokens != len(spans):
        refuse(
            sample,
            (f"the text has {tokens} image tokens, but the row has {len(spans)} images", "write <image> exactly once for each image"),
        )
    remaining = iter(spans)
    return [list(chain.from_iterable(next(remaining) if token == image else (token,) for token in piece)) for piece in pieces]


def check_length(sample: Sample, length: int, image_tokens: int, max_length: int) -> None:
    if length > max_length:
        refuse(sample, too_long(length, image_tokens, max_length))


def too_long(length: int, image_tokens: int, max_length: int) -> tuple[str, str]:
    """(problem, fix)."""
    return (
        f"{length} tokens ({image_tokens} of them for images) are more than data.max_length={max_length}",
        f"set data.max_length={length} if the model and the memory allow it, or data.too_long=skip or cut, or split or remove the row",
    )


def refuse(sample: Sample, problem: tuple[str, str]) -> NoReturn:
    raise InputRefused(str(DataProblem(file=sample.file, row=sample.row, field="", problem=problem[0], fix=problem[1])))
