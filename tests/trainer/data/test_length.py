"""The lengths of the data check equal those in training."""

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.data.conftest import CHATML, TOKENS, VICUNA
from trainer.contract import InputRefused, Source
from trainer.data.chat.segment import cut
from trainer.data.encode import encode
from trainer.data.length import SLACK, Lengths, LengthTally
from trainer.data.rows.sample import Message, Sample
from trainer.data.summary import percentile
from trainer.models.tiny_tokenizer import tiny_tokenizer

SIZES = {Path("a.png"): (64, 48), Path("b.png"): (8, 8)}


def talk(*texts: str, images: tuple[str, ...] = (), row: int = 1) -> Sample:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[index % 2], content=text) for index, text in enumerate(texts))  # type: ignore[arg-type]
    return Sample(id=str(row), images=tuple(map(Path, images)), messages=messages, file="rows.json", row=row)


def random_talks(count: int) -> list[Sample]:
    """Texts that may merge with their neighbours into one token: line feeds, spaces, parts of words, multi-byte characters."""
    rng, parts = Random(3), ["\n", " ", "th", "is", "ASSISTANT", ":", "picture", "ü", "猫", "\n\n", ".", "12"]
    talks = []
    for row in range(1, count + 1):
        texts = ["".join(rng.choices(parts, k=rng.randint(1, 12))) + "x" for _ in range(2 * rng.randint(1, 3))]
        names = tuple(rng.choice(("a.png", "b.png")) for _ in range(rng.randint(0, 2)))
        talks.append(talk("<image>" * len(names) + texts[0], *texts[1:], images=names, row=row))
    return talks


def measure(samples: list[Sample], sizes: dict[Path, tuple[int, int]], spec: Any, processor: Any = None) -> Lengths:
    tally = LengthTally(spec, processor)
    tally.add(samples, sizes.__getitem__)
    return tally.lengths()


def measure_with(
    processor: Any, samples: list[Sample], sizes: dict[Path, tuple[int, int]], template: Any, image_token: str, *, max_length: int
) -> Lengths:
    model = SimpleNamespace(name="whale", template=template, image_token=image_token, family="llava")
    data = SimpleNamespace(max_length=max_length, too_long="refuse", bad_rows="refuse", boxes="as_written")
    spec = SimpleNamespace(model=model, data=data, stage=SimpleNamespace(checkpoint="weights"))
    return measure(samples, sizes, spec, processor)


def by_size(processor: Any) -> Any:
    """A processor with more tokens for wider images, as in most families."""
    (image,) = set(processor.span((1, 1), 0))
    return replace(processor, span=lambda size, index: (image,) * (TOKENS * size[0] // 8 + index))


def length_in_step(sample: Sample, processor: Any, template: Any) -> int:
    spans = [processor.span(SIZES[path], index) for index, path in enumerate(sample.images)]
    return len(encode(sample, processor.tokenizer, template, "<image>", spans, 10**6).input_ids)


@pytest.mark.parametrize("template", [VICUNA, CHATML], ids=["vicuna", "chatml"])
def test_lengths_equal_those_in_training(processor: Any, template: Any) -> None:
    sized = replace(by_size(processor), tokenizer=tiny_tokenizer("<image>", template))
    samples = random_talks(300)
    exact = [length_in_step(sample, sized, template) for sample in samples]
    roomy = measure_with(sized, samples, SIZES, template, "<image>", max_length=10**6)
    for sample, counted, true in zip(samples, roomy.tokens, exact, strict=True):
        assert 0 <= true - counted <= SLACK * len(cut(sample, template, "<image>")), "the text is tokenized as a whole"
    tight = measure_with(sized, samples, SIZES, template, "<image>", max_length=0)
    assert list(tight.tokens) == exact, "near the limit the segments are tokenized separately, as in training"
    assert [problem.row for problem in tight.problems] == [sample.row for sample in samples]
    assert list(roomy.image_tokens) == [sum(4 * SIZES[path][0] // 8 + index for index, path in enumerate(s.images)) for s in samples]


def test_the_limit_is_exact(processor: Any) -> None:
    for sample in random_talks(40):
        true = length_in_step(sample, processor, VICUNA)
        fits = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=true)
        (problem,) = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=true - 1).problems
        assert fits.problems == ()
        images = TOKENS * len(sample.images)
        assert problem.problem == f"{true} tokens ({images} of them for images) are more than data.max_length={true - 1}"
        assert f"set data.max_length={true}" in problem.fix


def test_an_end_mark_of_several_tokens_is_a_problem(processor: Any) -> None:
    split = replace(VICUNA, end_mark="<|end of this|>")
    (problem,) = measure_with(processor, [talk("a", "b")], SIZES, split, "<image>", max_length=99).problems
    assert (problem.file, problem.row) == ("model whale (weights)", 0), "no row is the cause"
    assert "the end mark '<|end of this|>' of the model's template is " in problem.problem
    none = replace(VICUNA, end_mark="")
    assert measure_with(processor, [talk("a", "b")], SIZES, none, "<image>", max_length=99).problems == ()


def test_an_answer_without_a_token(processor: Any) -> None:
    class NoBell:
        """Drops the bell character."""

        bos_token_id = unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return processor.tokenizer(text.replace("\a", ""), add_special_tokens=False)

    silent = replace(processor, tokenizer=NoBell())
    template = replace(VICUNA, assistant_open="ASSISTANT:", end_mark="")
    samples = [talk("a", "\a"), talk("a", "b", row=2)]
    (problem,) = measure_with(silent, samples, SIZES, template, "<image>", max_length=99).problems
    assert (problem.row, problem.problem) == (1, "the tokenizer makes no token of the answers, so nothing would be learned")


def test_an_image_token_without_an_image(processor: Any) -> None:
    sample = replace(talk("<image>?", "b"), images=())
    (problem,) = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=3).problems
    assert "does not find exactly one '<image>' for each of the 0 images" in problem.problem


# exception when the processor is opened -> (unmeasured, problems)
UNOPENED: dict[str, tuple[Exception, str, tuple[str, ...]]] = {
    "not there": (OSError("no such model\nand so on"), "the processor of the model is not available on this machine (no such model)", ()),
    "no transformers": (
        ImportError("No module named 'transformers'"),
        "is not available on this machine (No module named 'transformers')",
        (),
    ),
    "another model": (InputRefused("it is a whale\n    take another"), "", ("it is a whale",)),
}


@pytest.mark.parametrize("name", UNOPENED)
def test_a_processor_that_cannot_be_opened(spec: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error, unmeasured, problems = UNOPENED[name]

    def refuse(_: Any) -> Any:
        raise error

    monkeypatch.setattr("trainer.data.length.open_processor", refuse)
    lengths = measure([talk("a", "b")], SIZES, spec)
    assert unmeasured in lengths.unmeasured and bool(unmeasured) == bool(lengths.unmeasured)
    assert tuple(problem.problem for problem in lengths.problems) == problems
    assert list(lengths.tokens) == []


def test_a_tokenizer_without_the_image_token(spec: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_processor", lambda _: processor)
    other = replace(spec, model=replace(spec.model, image_token="<picture>"))
    (problem,) = measure([talk("a", "b")], SIZES, other).problems
    assert "the tokenizer has no token '<picture>'" in problem.problem
    assert measure([talk("a", "b")], SIZES, spec).problems == ()


def test_percentiles() -> None:
    assert [percentile(range(1, 101), percent) for percent in (1, 50, 95, 100)] == [1, 50, 95, 100]
    assert (percentile([7], 50), percentile([], 50), percentile([1, 2], 50), percentile([1, 2, 3], 95)) == (7, 0, 1, 3)


def test_the_processor_of_a_run(tiny_spec: Any, tmp_path: Path) -> None:
    """The processor of the run: for a random start, from files, and from the hub only if it is in the local cache."""
    from trainer.models.registry import find_family

    spec = tiny_spec()
    family = find_family(spec.model.family)
    family.create(spec.model).save_pretrained(tmp_path / "saved")
    family.create_processor(spec.model).save(tmp_path / "saved")
    saved = replace(spec, model=replace(spec.model, source=Source(kind="path", path=str(tmp_path / "saved"))))
    staged = replace(spec, stage=replace(spec.stage, checkpoint=str(tmp_path / "saved")))
    samples = random_talks(5)
    found = [measure(samples, SIZES, given) for given in (spec, saved, staged)]
    assert found[0] == found[1] == found[2]
    assert len(found[0].tokens) == 5 and sum(found[0].image_tokens) > 0
    absent = replace(spec, model=replace(spec.model, source=Source(kind="hub", id="absent/model")))
    assert "the processor of the model is not available on this machine" in measure(samples, SIZES, absent).unmeasured


@pytest.mark.parametrize("template", [VICUNA, CHATML], ids=["vicuna", "chatml"])
def test_trained_tokens_are_those_with_labels(template: Any, processor: Any) -> None:
    """Up to a token for each answer, which may merge with its neighbour."""
    talks = random_talks(50)
    spans = [[processor.span(SIZES[path], index) for index, path in enumerate(sample.images)] for sample in talks]
    encoded = [encode(sample, processor.tokenizer, template, "<image>", each, 10**6) for sample, each in zip(talks, spans, strict=True)]
    labels = sum(label != -100 for one in encoded for label in one.labels)
    answers = sum(message.role == "assistant" for sample in talks for message in sample.messages)
    found = measure_with(processor, talks, SIZES, template, "<image>", max_length=10**6)
    assert abs(found.trained - labels) <= answers and 0.05 < found.trained / sum(found.tokens) < 0.9


def test_a_model_that_was_not_downloaded_is_asked_for_in_plain_words(spec: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = replace(spec, model=replace(spec.model, source=Source(kind="hub", id="some/model")), stage=replace(spec.stage, checkpoint=""))
    said = measure([talk("a", "b")], SIZES, hub).unmeasured
    assert (
        "some/model has not been downloaded; fetch it: omnilaunch model fetch some/model; or name its folder: model.source.path=FOLDER"
        in said
    )
    assert "local_files_only" not in said


def test_of_a_large_set_only_rows_that_may_be_too_long_are_all_counted(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones are estimated, and every row that is too long is found wherever it is."""
    monkeypatch.setattr("trainer.data.length.FULL", 16)
    rng = Random(5)
    talks = [talk("How many?" * rng.randint(1, 9), "word " * rng.randint(1, 9), row=row) for row in range(1, 401)]
    long = {50: "word " * 200, 123: "猫" * 180, 399: "word " * 190}
    talks = [talk("How?", long[sample.row], row=sample.row) if sample.row in long else sample for sample in talks]
    found = measure_with(processor, talks, SIZES, VICUNA, "<image>", max_length=400)
    assert {problem.row for problem in found.problems} == set(long)
    monkeypatch.undo()
    exact = measure_with(processor, talks, SIZES, VICUNA, "<image>", max_length=400)
    assert {problem.row for problem in exact.problems} == set(long) and exact.estimated == 0
    assert 250 < found.estimated < 360 and len(found.tokens) == len(exact.tokens)
    assert sum(found.tokens) == pytest.approx(sum(exact.tokens), rel=0.05) and found.trained == pytest.approx(exact.trained, rel=0.15)
