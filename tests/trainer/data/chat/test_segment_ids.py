"""The ids of segments are those of the slow way, which tokenizes the text up to each boundary; the time grows with the length of the text."""

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.trainer.data.conftest import CHATML, VICUNA
from tests.trainer.data.test_encode import byte_level, sentence_piece
from trainer.data.chat.segment import Segment
from trainer.data.chat.segment_ids import find_anchors, token_ids, tokenise

LINES = ["USER: Which digit is  this?\n\n ASSISTANT: It is 12345 of them.</s>", "a  b \n c\n\n\nthe end. éè 漢字 "] * 4
# Of Qwen2.5 and Llama 3: what a space belongs to depends on what follows it.
LOOK_AHEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GROUPED_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)|\D+"


def prefixes(tokenizer: PreTrainedTokenizerFast, segments: Sequence[Segment]) -> list[list[int]]:
    """The reference: the text up to the end of each segment, tokenized from its beginning."""
    text, ids, pieces = "", list[int](), list[list[int]]()
    for segment in segments:
        text += segment.text
        whole = token_ids(tokenizer, text)
        piece = whole[len(ids) :] if whole[: len(ids)] == ids else token_ids(tokenizer, segment.text)
        pieces.append(piece)
        ids = ids + piece
    return pieces


def wrap(tokenizer: Tokenizer, *more: str | AddedToken) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>", "<image>", *more])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def trained(model: models.Model, trainer: trainers.Trainer, before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(LINES * 6, trainer)
    return tokenizer


def byte_bpe(pattern: str) -> Tokenizer:
    before = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False), before)


@cache
def look_ahead() -> PreTrainedTokenizerFast:
    return wrap(byte_bpe(LOOK_AHEAD))


@cache
def grouped_digits() -> PreTrainedTokenizerFast:
    return wrap(byte_bpe(GROUPED_DIGITS))


@cache
def takes_spaces() -> PreTrainedTokenizerFast:
    """Special tokens that swallow the spaces beside them."""
    tokenizer = byte_bpe(LOOK_AHEAD)
    tokenizer.add_special_tokens(
        [AddedToken("</s>", rstrip=True, special=True), AddedToken("<image>", lstrip=True, rstrip=True, special=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def unigram() -> PreTrainedTokenizerFast:
    """As T5's and Gemma's: the best path over a whole part, spaces as U+2581, one put in front of each part, runs of them made one."""
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme="always"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return wrap(tokenizer)


@cache
def word_piece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer = trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())
    tokenizer.normalizer = normalizers.BertNormalizer()
    return wrap(tokenizer)


@cache
def no_special_tokens() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_bpe(LOOK_AHEAD))


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": lambda: byte_level(VICUNA),
    "chatml": lambda: byte_level(CHATML),
    "sentencepiece": sentence_piece,
    "look_ahead": look_ahead,
    "grouped_digits": grouped_digits,
    "takes_spaces": takes_spaces,
    "unigram": unigram,
    "word_piece": word_piece,
    "no_special_tokens": no_special_tokens,
}
# Boundaries inside of words, between spaces, line feeds and digits, beside and within special tokens.
PART = st.sampled_from(
    (
        *("<|im_start|>", "<|im_end|>", "</s>", "<image>", "<|im_", "end|>", "</", "s>", " ", "  ", "   ", "\n", "\n\n", "1", "23", "4567"),
        *("a", "the", " the", "ing", "It is", ".", " .", "é", "e\u0301", "\u0301", "漢", "assistant\n", "USER: ", "", "<s>", "▁", "\u200b"),
    )
)
SEGMENTS = st.lists(st.lists(PART, max_size=5).map("".join), max_size=9)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=250, deadline=None)
@given(texts=SEGMENTS)
def test_ids_are_those_of_the_slow_way(name: str, texts: list[str]) -> None:
    tokenizer = MAKERS[name]()
    segments = [Segment(text=text, in_loss=bool(index % 2)) for index, text in enumerate(texts)]
    assert tokenise(tokenizer, segments) == prefixes(tokenizer, segments)


def long_conversation(turns: int) -> list[Segment]:
    rng, segments = random.Random(1), [Segment(text="<|im_start|>user\n", in_loss=False)]
    for _ in range(turns):
        question, answer = (" ".join(rng.choices(["which", "digit", "is", "it", "12", "\n", "the"], k=40)) for _ in range(2))
        segments.append(Segment(text=f"{question}<|im_end|>\n<|im_start|>assistant\n", in_loss=False))
        segments.append(Segment(text=f"{answer}<|im_end|>", in_loss=True))
        segments.append(Segment(text="\n<|im_start|>user\n", in_loss=False))
    return segments


def test_the_text_is_tokenized_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, segments, read = look_ahead(), long_conversation(64), list[int]()
    tail = tokenise.__globals__["tokenise_tail"]

    def count(tokenizer: object, text: str, anchors: object) -> object:
        read.append(len(text))
        return tail(tokenizer, text, anchors)

    monkeypatch.setitem(tokenise.__globals__, "tokenise_tail", count)
    found = tokenise(tokenizer, segments)
    assert sum(read) < 1.5 * sum(len(segment.text) for segment in segments)
    assert found == prefixes(tokenizer, segments)


class WithoutBackend:
    """A tokenizer of another kind: it does not say where its tokens are."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner

    def __call__(self, text: str, **options: object) -> object:
        return self.inner(text, **options)


def test_a_tokenizer_that_does_not_say_where_its_tokens_are() -> None:
    tokenizer, segments = WithoutBackend(look_ahead()), long_conversation(4)
    assert find_anchors(tokenizer) == {}  # type: ignore[arg-type]
    assert tokenise(tokenizer, segments) == prefixes(look_ahead(), segments)  # type: ignore[arg-type]


def test_special_tokens_that_take_spaces_divide_nothing() -> None:
    assert set(find_anchors(look_ahead()).values()) == {"<|im_start|>", "<|im_end|>", "</s>", "<image>"}
    assert find_anchors(takes_spaces()) == {}


def test_padding_of_an_earlier_call_is_not_kept() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    segments = long_conversation(2)
    assert tokenise(tokenizer, segments) == prefixes(tokenizer, segments)
