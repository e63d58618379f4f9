"""The token ids of each segment of a text, in time that grows with the length of the text."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from trainer.data.chat.segment import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenise(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment]) -> list[list[int]]:
    """The ids of each segment.

    The whole text is tokenized at once, as a server does with a conversation: a SentencePiece tokenizer would add a word start to a segment
    that is tokenized alone. Only where a token crosses the boundary of two segments, they are tokenized separately, because the ids of a
    prompt must be the beginning of the ids in training.

    Whether one crosses is known from the text up to each boundary. A tokenizer divides a text at its special tokens before anything else, so
    that only the text since the last one is tokenized again (`find_anchors`). With a tokenizer that does not say where its tokens are, and a
    template without special tokens, that is the text from its beginning.
    """
    anchors = find_anchors(tokenizer)
    pieces: list[list[int]] = []
    ids: list[int] = []
    tail, base, whole = "", 0, True  # the text since the last special token, the ids before it, whether they are those of the whole text
    for segment in segments:
        if not whole:
            pieces.append(token_ids(tokenizer, segment.text))
            continue
        tail += segment.text
        found, place, start = tokenise_tail(tokenizer, tail, anchors)
        own = ids[base:]
        pieces.append(found[len(own) :] if found[: len(own)] == own else token_ids(tokenizer, segment.text))
        ids += pieces[-1]
        whole = ids[base : base + place] == found[:place]
        tail, base = tail[start:], base + place
    return pieces


def tokenise_tail(tokenizer: "PreTrainedTokenizerBase", text: str, anchors: Mapping[int, str]) -> tuple[list[int], int, int]:
    """The ids of a text; which of them is the last special token, and where it starts in the text: 0, 0 if there is none."""
    if not anchors:
        return token_ids(tokenizer, text), 0, 0
    encoding = plain_backend(tokenizer).encode(text, add_special_tokens=False)
    ids: list[int] = encoding.ids
    for place in range(len(ids) - 1, 0, -1):
        if ids[place] in anchors:
            start, end = encoding.token_to_chars(place)
            if text[start:end] == anchors[ids[place]]:
                return ids, place, start
    return ids, 0, 0


@lru_cache(maxsize=8)  # called for every sample; a tokenizer does not change during a run
def find_anchors(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """The special tokens at which the tokenizers library divides a text before it normalizes and tokenizes the parts, each on its own (0.22,
    AddedVocabulary.extract_and_normalize): id -> text. Not those that take spaces beside them, or are only found between words. {} for a
    tokenizer of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return {}
    tokens = backend.get_added_tokens_decoder()
    return {
        number: token.content
        for number, token in tokens.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }


def plain_backend(tokenizer: "PreTrainedTokenizerBase"):  # type: ignore[no-untyped-def]  # tokenizers.Tokenizer, which has no types
    """Without the padding and truncation of an earlier call."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:
        backend.no_padding(), backend.no_truncation()
    return backend


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
