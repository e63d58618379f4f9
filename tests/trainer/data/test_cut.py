"""A sample of too many tokens is cut at its end: what is kept is the beginning of the whole sample, and what cannot be cut is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.data.conftest import TOKENS, VICUNA, with_data
from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.batch.pack import collate_packed
from trainer.data.cut import IGNORED, count_cut_images, find_spans
from trainer.data.encode import encode
from trainer.data.length import LengthTally
from trainer.data.rows.sample import Message, Sample

# images' places, labels (x = trained, . = not), limit -> images behind it, or a part of the reason
CUTS: list[tuple[list[tuple[int, int]], str, int, int | str]] = [
    ([], "..xx", 3, 0),
    ([], "..xx", 2, "no trained token"),
    ([(0, 2)], "..xx", 3, 0),
    ([(0, 2)], "..xx", 2, "no trained token"),
    ([(0, 2), (4, 6)], "..xx....x", 4, 1),
    ([(0, 2), (4, 6)], "..xx....x", 5, "belongs to an image"),
    ([(0, 2), (4, 6)], "..xx....x", 6, 0),
    ([(1, 2), (3, 5), (5, 7)], "x.x.....x", 3, 2),
]


@pytest.mark.parametrize(("images", "labels", "limit", "expected"), CUTS)
def test_where_a_sample_may_be_cut(images: list[tuple[int, int]], labels: str, limit: int, expected: int | str) -> None:
    numbers = [1 if letter == "x" else IGNORED for letter in labels]
    if isinstance(expected, int):
        assert count_cut_images(images, numbers, limit) == expected
        return
    with pytest.raises(ValueError, match=expected):
        count_cut_images(images, numbers, limit)


def test_where_the_tokens_of_images_are() -> None:
    assert find_spans([[5, 9, 9], [7]], 9, [[1, 1, 1], [2, 2]], start=1) == [(2, 5), (5, 7)]


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Two questions, each with an image, and an answer to each."""
    texts = ("<image>\nWhich is it?", "number one", "<image>\nAnd this?", "number two, as I said before")
    for number in (1, 2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    roles = ("user", "assistant") * 2
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, texts, strict=True))  # type: ignore[arg-type]
    return Sample(id="1", images=(tmp_path / "1.png", tmp_path / "2.png"), messages=messages, file="rows.json", row=1)


def encoded(sample: Sample, processor: Any, max_length: int, *, cuts: bool = True) -> Any:
    spans = [processor.span((8, 8), index) for index in range(len(sample.images))]
    return encode(sample, processor.tokenizer, VICUNA, "<image>", spans, max_length, cuts=cuts)


def test_what_is_kept_is_the_beginning(sample: Sample, processor: Any, spec: TrainSpec) -> None:
    """At every limit: the check and the ranks agree, and a cut sample is the beginning of the whole one."""
    whole = encoded(sample, processor, 10**6)
    image = processor.span((8, 8), 0)[0]
    seen = set()
    for limit in range(1, len(whole.input_ids) + 2):
        tally = LengthTally(with_data(spec, max_length=limit, too_long="cut"), processor)
        tally.add([sample], lambda path: (8, 8))
        try:
            found = encoded(sample, processor, limit)
        except InputRefused as error:
            assert [str(problem) for problem in tally.problems] == [str(error)] and "cannot be cut" in str(error)
            seen.add("refused")
            continue
        assert tally.problems == [] and list(tally.tokens) == [len(found.input_ids)]
        assert found.input_ids == whole.input_ids[:limit] and found.labels == whole.labels[:limit]
        assert found.input_ids.count(image) == TOKENS * (2 - found.cut_images) == tally.image_tokens[0]
        assert bool(tally.cut) == (limit < len(whole.input_ids))
        seen.add(found.cut_images)
    assert seen == {"refused", 0, 1}


def test_the_images_behind_a_cut_are_left_out(sample: Sample, processor: Any, spec: TrainSpec) -> None:
    whole = encoded(sample, processor, 10**6)
    second = [place for place, token in enumerate(whole.input_ids) if token == processor.span((8, 8), 0)[0]][TOKENS]
    cutting = with_data(spec, max_length=second, too_long="cut")
    for make in (lambda s: collate([sample], processor, s), lambda s: collate_packed([[sample]], processor, s)):
        assert make(spec)["pixel_values"].shape[0] == 2
        batch = make(cutting)
        assert batch["pixel_values"].shape[0] == 1 and batch["input_ids"].shape[1] == second
    with pytest.raises(InputRefused, match=r"set data\.max_length"):
        collate([sample], processor, with_data(spec, max_length=second))


def test_only_training_samples_are_cut(sample: Sample, processor: Any, spec: TrainSpec) -> None:
    """Of a held-out one, the last answer is compared as a whole."""
    limit = len(encoded(sample, processor, 10**6).input_ids) - 1
    for mode, left_out, cut, problems in (("refuse", 0, 0, 1), ("skip", 1, 0, 0), ("cut", 1, 0, 0)):
        tally = LengthTally(with_data(spec, max_length=limit, too_long=mode), processor)
        tally.add([sample], lambda path: (8, 8), training=False)
        assert (len(tally.too_long), len(tally.cut), len(tally.problems)) == (left_out, cut, problems)


def test_a_text_without_images(processor: Any) -> None:
    messages = (Message(role="user", content="Count."), Message(role="assistant", content="one two three four five six"))
    sample = Sample(id="1", images=(), messages=messages, file="rows.json", row=1)
    whole = encoded(sample, processor, 10**6)
    assert encoded(sample, processor, len(whole.input_ids) - 3) == replace(whole, input_ids=whole.input_ids[:-3], labels=whole.labels[:-3])
