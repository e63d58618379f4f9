from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.trainer.data.conftest import CHATML, VICUNA
from trainer.contract import InputRefused, Template
from trainer.data.chat.segment import cut
from trainer.data.chat.segment_ids import tokenise
from trainer.data.encode import IGNORED, encode, encode_prompt
from trainer.data.rows.sample import Message, Sample
from trainer.models.tiny_tokenizer import tiny_tokenizer


@cache
def byte_level(template: Template) -> PreTrainedTokenizerFast:
    """ChatML's opening mark is ordinary text here: it need not be a special token."""
    return tiny_tokenizer("<image>", template)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Like Llama's: U+2581 at word starts, byte fallback, and a BOS that the tokenizer adds."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = ["USER: Which digit is this? ASSISTANT: It is this one."] * 2
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


CASES = [(VICUNA, byte_level(VICUNA)), (CHATML, byte_level(CHATML)), (VICUNA, sentence_piece())]
IDS = ["vicuna", "chatml", "sentencepiece"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip() and "<" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Sample, tuple[int, ...]]:
    """A conversation of one to three turns with up to two images a question, and the number of tokens of each image."""
    messages: list[Message] = []
    counts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        images = draw(st.lists(st.integers(1, 5), max_size=2))
        counts += images
        messages.append(Message(role="user", content="<image>\n" * len(images) + draw(TEXT)))
        messages.append(Message(role="assistant", content=draw(TEXT)))
    paths = tuple(Path(f"{index}.png") for index in range(len(counts)))
    return Sample(id="1", images=paths, messages=tuple(messages), file="rows.json", row=3), tuple(counts)


def spans_of(tokenizer: PreTrainedTokenizerFast, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """An image of n tokens is the image token n times."""
    return tuple((tokenizer.convert_tokens_to_ids("<image>"),) * count for count in counts)


def test_an_image_token_is_replaced_by_the_span_of_the_image() -> None:
    sample = conversation_of("<image><image>\nWhat?", "A cat.", images=2)
    encoded = encode(sample, byte_level(VICUNA), VICUNA, "<image>", ((301, 7, 302), (303,)), 100)
    start = encoded.input_ids.index(301)
    assert encoded.input_ids[start : start + 4] == [301, 7, 302, 303]
    assert set(encoded.labels[start : start + 4]) == {IGNORED}


def runs(labels: list[int]) -> list[list[int]]:
    """The runs of labels in the loss."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            found.append([])
        else:
            found[-1].append(label)
    return [run for run in found if run]


@pytest.mark.parametrize(("template", "tokenizer"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(conversation=conversations())
def test_labels_are_the_answers_with_their_end_marks(template, tokenizer, conversation) -> None:
    sample, counts = conversation
    encoded = encode(sample, tokenizer, template, "<image>", spans_of(tokenizer, counts), 10_000)
    assert len(encoded.input_ids) == len(encoded.labels)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    in_loss = runs(encoded.labels)
    assert [run[-1] for run in in_loss] == [tokenizer.eos_token_id] * len(answers)
    blank = " " if template.assistant_open.endswith(" ") else ""
    assert [spell(tokenizer, run[:-1], blank) for run in in_loss] == [blank + answer for answer in answers]


def spell(tokenizer: PreTrainedTokenizerFast, ids: list[int], blank: str) -> str:
    """Decodes a run. SentencePiece's decoder removes the space at the beginning of a text."""
    text = tokenizer.decode(ids)
    return blank + text if tokenizer.bos_token else text


@pytest.mark.parametrize(("template", "tokenizer"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(conversation=conversations())
def test_the_tokens_of_an_image_are_adjacent_and_masked(template, tokenizer, conversation) -> None:
    sample, counts = conversation
    encoded = encode(sample, tokenizer, template, "<image>", spans_of(tokenizer, counts), 10_000)
    image = tokenizer.convert_tokens_to_ids("<image>")
    indices = [index for index, token in enumerate(encoded.input_ids) if token == image]
    assert len(indices) == sum(counts)
    assert all(encoded.labels[index] == IGNORED for index in indices)
    edges = [index for index in indices if encoded.input_ids[index - 1] != image]
    assert len(edges) == len(counts), "there is a line feed between two images"
    for edge, count in zip(edges, counts, strict=True):
        assert encoded.input_ids[edge : edge + count] == [image] * count


@pytest.mark.parametrize(("template", "tokenizer"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(conversation=conversations())
def test_a_prompt_is_the_beginning_of_the_training_ids(template, tokenizer, conversation) -> None:
    sample, counts = conversation
    encoded = encode(sample, tokenizer, template, "<image>", spans_of(tokenizer, counts), 10_000)
    prompt = encode_prompt(sample, tokenizer, template, "<image>", spans_of(tokenizer, counts), 10_000)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert encoded.labels[len(prompt.input_ids)] != IGNORED
    assert prompt.reference == sample.messages[-1].content


@pytest.mark.parametrize(("template", "tokenizer"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text("abcdefgh ijklmn0123456789.,?é漢", min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_segments_together_equal_the_tokenized_text(template, tokenizer, words) -> None:
    """For answers that start with a letter or digit. Others may be tokenized separately to keep the prompt unchanged."""
    pairs = [(words[i].strip(), "a" + words[i + 1].strip()) for i in range(0, len(words) - 1, 2)]
    messages = [Message(role=role, content=text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    sample = Sample(id="1", images=(), messages=tuple(messages), file="rows.json", row=3)
    segments = cut(sample, template, "<image>")
    whole = tokenizer("".join(segment.text for segment in segments), add_special_tokens=False)["input_ids"]
    assert [token for piece in tokenise(tokenizer, segments) for token in piece] == whole


def test_no_token_crosses_the_start_of_an_answer() -> None:
    """A tokenizer with the token "\\n\\n": the answer starts with a line feed, and the prompt still ends with its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["\n\n"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    assert len(wrapped("\n\n", add_special_tokens=False)["input_ids"]) == 1
    sample = conversation_of("What?", "\nA cat.")
    segments = cut(sample, CHATML, "<image>")
    prefix, answer, _ = tokenise(wrapped, segments)
    assert wrapped.decode(prefix) == segments[0].text
    assert wrapped.decode(answer) == "\nA cat.<|im_end|>"


def conversation_of(question: str, answer: str, images: int = 0) -> Sample:
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Sample(id="1", images=tuple(Path(f"{i}.png") for i in range(images)), messages=messages, file="rows.json", row=3)


def test_bos_is_used_only_if_the_tokenizer_adds_it() -> None:
    sample = conversation_of("What?", "A cat.")
    with_bos = encode(sample, sentence_piece(), VICUNA, "<image>", (), 100)
    assert with_bos.input_ids[:1] == [sentence_piece().bos_token_id] and with_bos.labels[0] == IGNORED
    assert sentence_piece()("USER: What? ASSISTANT: A cat.</s>")["input_ids"] == with_bos.input_ids
    named_only = tiny_tokenizer("<image>", VICUNA)
    named_only.bos_token = "<pad>"
    assert encode(sample, named_only, VICUNA, "<image>", (), 100) == encode(sample, byte_level(VICUNA), VICUNA, "<image>", (), 100)


def test_too_long_is_refused_with_both_lengths() -> None:
    sample = conversation_of("<image>\nWhat?", "A cat.", images=1)
    length = len(encode(sample, byte_level(VICUNA), VICUNA, "<image>", spans_of(byte_level(VICUNA), (40,)), 10_000).input_ids)
    encode(sample, byte_level(VICUNA), VICUNA, "<image>", spans_of(byte_level(VICUNA), (40,)), length)
    message = rf"rows.json row 3: {length} tokens \(40 of them for images\) are more than data.max_length={length - 1}"
    with pytest.raises(InputRefused, match=message):
        encode(sample, byte_level(VICUNA), VICUNA, "<image>", spans_of(byte_level(VICUNA), (40,)), length - 1)
    with pytest.raises(InputRefused, match=r"rows.json row 3: .* more than data.max_length=20"):
        encode_prompt(sample, byte_level(VICUNA), VICUNA, "<image>", spans_of(byte_level(VICUNA), (40,)), 20)


def test_different_numbers_of_marks_and_images() -> None:
    sample = conversation_of("<image>\nWhat?", "A cat.", images=2)
    with pytest.raises(InputRefused, match=r"rows.json row 3: the text has 1 image tokens, but the row has 2 images"):
        encode(sample, byte_level(VICUNA), VICUNA, "<image>", spans_of(byte_level(VICUNA), (4, 4)), 100)


def test_a_tokenizer_without_the_image_token() -> None:
    with pytest.raises(InputRefused, match="has no token '<picture>'"):
        encode(conversation_of("What?", "A cat."), byte_level(VICUNA), VICUNA, "<picture>", (), 100)


def test_an_answer_without_tokens_is_refused() -> None:
    """This tokenizer drops unknown characters, so that the answer has no token."""
    words = Tokenizer(models.WordLevel({"USER:": 0, "ASSISTANT:": 1, "<image>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.model = models.BPE({"U": 0, "<image>": 1}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens={"image_token": "<image>"})
    silent = Template(user="U{content}", assistant_open="U", end_mark="")
    with pytest.raises(InputRefused, match=r"rows.json row 3: the tokenizer makes no token of the answers"):
        encode(conversation_of("U", "漢"), tokenizer, silent, "<image>", (), 100)
