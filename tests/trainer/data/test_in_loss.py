"""Answers that are not in the loss, and several conversations in one row."""

from typing import Any

from tests.trainer.data.conftest import VICUNA
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import encode_cached
from trainer.data.encode import IGNORED, encode, encode_prompt
from trainer.data.rows.sample import Message, Sample


def talk(*answers: tuple[str, bool], part: int = 0) -> Sample:
    turns = [(Message(role="user", content="Say."), Message(role="assistant", content=text, in_loss=in_loss)) for text, in_loss in answers]
    messages = tuple(message for turn in turns for message in turn)
    return Sample(id="1", images=(), messages=messages, file="rows.json", row=1, part=part)


def learned(sample: Sample, processor: Any) -> str:
    labels = encode(sample, processor.tokenizer, VICUNA, "<image>", (), 999).labels
    return processor.tokenizer.decode([label for label in labels if label != IGNORED])


def test_an_answer_outside_the_loss_is_masked(processor: Any) -> None:
    whole, half = talk(("one", True), ("two", True)), talk(("one", False), ("two", True))
    ids = [encode(sample, processor.tokenizer, VICUNA, "<image>", (), 999).input_ids for sample in (whole, half)]
    assert ids[0] == ids[1]
    assert learned(whole, processor) == " one</s> two</s>"
    assert learned(half, processor) == " two</s>"


def test_a_prompt_ends_before_the_last_answer_even_if_it_is_not_in_the_loss(processor: Any) -> None:
    prompts = [
        encode_prompt(talk(("one", True), ("two", in_loss)), processor.tokenizer, VICUNA, "<image>", (), 999) for in_loss in (True, False)
    ]
    assert prompts[0] == prompts[1]
    assert prompts[1].reference == "two"


def test_conversations_of_one_row_are_cached_separately(spec: Any, processor: Any) -> None:
    cache = Cache(2**20)
    first, second = (encode_cached(talk((text, True), part=part), processor, spec, (), cache) for part, text in enumerate(("one", "two")))
    assert first != second
