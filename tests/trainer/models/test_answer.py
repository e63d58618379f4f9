"""Batches of different questions, for every family: each answer equals that of the question alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from tests.trainer.models.conftest import Made
from trainer.contract import InputRefused, Sampling
from trainer.data.batch.collate import collate_left
from trainer.data.media.image import open_image
from trainer.data.rows.sample import Message
from trainer.generation.answerer import Answer, Answerer, Prepared, Question

CPU = torch.device("cpu")


def ask(text: str, *images: Image.Image, system: str = "", **more: object) -> Question:
    first = (Message(role="system", content=system),) if system else ()
    return Question(messages=(*first, Message(role="user", content=text)), images=images, **more)  # type: ignore[arg-type]


def answerer_of(made: Made) -> Answerer:
    torch.set_num_threads(1)
    return Answerer(made.model, made.processor, made.spec, CPU)


@pytest.fixture
def questions(pictures: tuple[Path, ...]) -> tuple[Question, ...]:
    """Different lengths, images, sampling parameters and limits."""
    images = [open_image(path) for path in pictures]
    return (
        ask("<image>\nWhich digit is this?", images[0], sampling=Sampling(max_new_tokens=9)),
        ask("Hello?", sampling=Sampling(max_new_tokens=14, temperature=1.0, top_k=50, top_p=0.9), seed=3),
        ask("<image> and <image>: two images of other sizes", images[1], images[2], sampling=Sampling(max_new_tokens=20)),
        ask("<image> and <image>?", images[2], images[0], sampling=Sampling(max_new_tokens=5, beams=3)),
        ask("<image>Which?", images[3], sampling=Sampling(max_new_tokens=12, temperature=0.6), seed=8),
    )


def test_an_answer_is_the_same_alone_and_in_any_batch(tiny: Made, questions: tuple[Question, ...]) -> None:
    answerer = answerer_of(tiny)
    batch = [answerer.prepare(question) for question in questions]
    texts: dict[int, str] = dict.fromkeys(range(len(batch)), "")
    ended: dict[int, Answer] = {}

    def add_text(row: int, text: str) -> None:
        assert row not in ended, "no text after the end"
        texts[row] += text

    together = answerer.answer(batch, on_text=add_text, on_end=ended.__setitem__)
    alone = [answerer.answer([one])[0] for one in batch]
    backwards = answerer.answer(batch[::-1])[::-1]
    assert together == alone == backwards
    assert texts == {row: answer.text for row, answer in enumerate(together)} and ended == dict(enumerate(together))
    assert [answer.new_tokens <= one.most for answer, one in zip(together, batch, strict=True)] == [True] * 5
    assert [answer.prompt_tokens for answer in together] == [one.length for one in batch]


def test_greedy_and_beam_answers_equal_those_of_transformers(make_tiny: Callable[[str], Made], questions: tuple[Question, ...]) -> None:
    """Compared with a plain generate() for each question. With LLaVA and one image per row, because transformers repeats it correctly."""
    made = make_tiny("tiny_llava")
    answerer = answerer_of(made)
    beams = replace(questions[0], sampling=Sampling(max_new_tokens=7, beams=4))
    batch = [answerer.prepare(question) for question in (questions[0], questions[2], beams)]
    answers = answerer.answer(batch)
    for one, answer in zip(batch, answers, strict=True):
        tensors = collate_left([one.input_ids], one.features, (), made.processor)
        config = GenerationConfig(
            do_sample=False,
            num_beams=one.sampling.beams,
            max_new_tokens=one.most,
            eos_token_id=answerer.ends,
            pad_token_id=made.processor.tokenizer.pad_token_id,
        )
        with torch.no_grad():
            ids = made.model.generate(**tensors, generation_config=config)[0, one.length :]  # type: ignore[operator]
        assert answer.text == made.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_depend_on_the_seed(make_tiny: Callable[[str], Made]) -> None:
    answerer = answerer_of(make_tiny("tiny_llava"))
    seeded = [ask("Hello?", sampling=Sampling(max_new_tokens=12, temperature=1.0), seed=seed) for seed in range(4)]
    texts = [answer.text for answer in answerer.answer([answerer.prepare(question) for question in seeded])]
    assert len(set(texts)) == 4


def test_a_cancelled_row_ends_and_others_continue(make_tiny: Callable[[str], Made], questions: tuple[Question, ...]) -> None:
    answerer = answerer_of(make_tiny("tiny_llava"))
    batch = [answerer.prepare(questions[index]) for index in (0, 2)]
    calls: list[int] = []

    def halted(row: int) -> bool:
        calls.append(row)
        return row == 0 and calls.count(0) == 3

    texts: dict[int, str] = {0: "", 1: ""}
    first, second = answerer.answer(batch, halted=halted, on_text=lambda row, text: texts.__setitem__(row, texts[row] + text))
    assert (first.ended, first.new_tokens, calls.count(0)) == ("halted", 3, 3)
    assert second == answerer.answer(batch[1:])[0]
    assert texts == {0: first.text, 1: second.text}


def test_a_stop_text_ends_an_answer(make_tiny: Callable[[str], Made], questions: tuple[Question, ...]) -> None:
    answerer = answerer_of(make_tiny("tiny_llava"))
    whole = answerer.answer([answerer.prepare(questions[2])])[0]
    mark = whole.text[4:6]
    cut = answerer.answer([answerer.prepare(replace(questions[2], stop=(mark,)))])[0]
    assert cut.text == whole.text[: whole.text.index(mark)].strip()
    assert cut.ended == "stop" and cut.new_tokens < whole.new_tokens


def test_no_answer_is_longer_than_the_context(make_tiny: Callable[[str], Made]) -> None:
    """Limited by the rest of the context. Refused: a prompt that fills the context, and one longer than data.max_length."""
    made = make_tiny("tiny_llava")
    answerer = answerer_of(made)
    context = made.model.config.get_text_config().max_position_embeddings  # type: ignore[union-attr,operator]
    assert answerer.context == context == 1024
    around = answerer.prepare(ask("~")).length - 1
    tight = answerer.prepare(ask("~" * (context - around - 3), sampling=Sampling(max_new_tokens=50)))
    assert (tight.length, tight.most) == (context - 3, 3)
    with pytest.raises(InputRefused, match=r"row 7: 1024 tokens.*no space for an answer in the model's context of 1024"):
        answerer.prepare(ask("~" * (context - around), name="row 7"))
    short = Answerer(made.model, made.processor, replace(made.spec, data=replace(made.spec.data, max_length=30)), CPU)
    with pytest.raises(InputRefused, match=r"the question: 40 tokens.*more than data.max_length=30\n.*data.max_length=40"):
        short.prepare(ask("~" * (40 - around)))


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (ask("<image>?"), "1 <image> marks in its text for 0 images"),
        (ask("?", Image.new("RGB", (8, 8))), "0 <image> marks in its text for 1 images"),
        (Question(messages=()), "its messages are none"),
        (Question(messages=(Message(role="assistant", content="a"),)), "its messages are assistant\n"),
        (Question(messages=(Message(role="user", content="a"),) * 2), "user, user"),
        (ask("<image>?", Image.new("RGB", (1000, 2))), "more than 200 times"),
        (ask("?", sampling=Sampling(temperature=-1)), "temperature is -1"),
        (ask("?", sampling=Sampling(temperature=float("nan"))), "temperature is nan"),
        (ask("?", sampling=Sampling(top_p=0)), "top_p is 0"),
        (ask("?", sampling=Sampling(top_k=-1)), "top_k is -1"),
        (ask("?", sampling=Sampling(max_new_tokens=0)), "max_new_tokens is 0"),
        (ask("?", sampling=Sampling(beams=2, temperature=0.5)), "beams=2 cannot be combined with sampling.temperature=0.5"),
    ],
)
def test_invalid_questions_are_refused(make_tiny: Callable[[str], Made], question: Question, text: str) -> None:
    with pytest.raises(InputRefused) as refused:
        answerer_of(make_tiny("tiny_llava")).prepare(question)
    assert text in str(refused.value)


def test_prepared_questions_are_on_the_cpu(make_tiny: Callable[[str], Made], questions: tuple[Question, ...]) -> None:
    one: Prepared = answerer_of(make_tiny("tiny_llava")).prepare(questions[2])
    assert len(one.features) == 2 and one.length == len(one.input_ids) > 2 * 16
    assert {tensor.device for features in one.features for tensor in features.tensors.values()} == {CPU}
