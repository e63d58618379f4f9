"""Lengths counted ahead are those that the step reads."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.trainer.data.conftest import CHATML, TOKENS, VICUNA
from trainer.contract import InputRefused, Source
from trainer.data.encode import encode
from trainer.data.length import SLACK, measure, measure_with
from trainer.data.rows.sample import Message, Sample
from trainer.data.segment import cut
from trainer.data.summary import percentile
from trainer.models.tiny import tiny_tokenizer

SIZES = {Path("a.png"): (64, 48), Path("b.png"): (8, 8)}


def talk(*texts: str, images: tuple[str, ...] = (), row: int = 1) -> Sample:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[place % 2], content=text) for place, text in enumerate(texts))  # type: ignore[arg-type]
    return Sample(id=str(row), images=tuple(map(Path, images)), messages=messages, file="rows.json", row=row)


def random_talks(count: int) -> list[Sample]:
    """Texts whose ends and beginnings join into tokens: line feeds, blanks, letters of a word, characters of several bytes."""
    rng, parts = Random(3), ["\n", " ", "th", "is", "ASSISTANT", ":", "picture", "ü", "猫", "\n\n", ".", "12"]
    talks = []
    for row in range(1, count + 1):
        texts = ["".join(rng.choices(parts, k=rng.randint(1, 12))) + "x" for _ in range(2 * rng.randint(1, 3))]
        names = tuple(rng.choice(("a.png", "b.png")) for _ in range(rng.randint(0, 2)))
        talks.append(talk("<image>" * len(names) + texts[0], *texts[1:], images=names, row=row))
    return talks


def by_size(processor: Any) -> Any:
    """A processor whose images become more tokens the wider they are, as they do in most families."""
    (image,) = set(processor.span((1, 1), 0))
    return replace(processor, span=lambda size, place: (image,) * (TOKENS * size[0] // 8 + place))


def length_in_step(sample: Sample, ruler: Any, template: Any) -> int:
    spans = [ruler.span(SIZES[path], place) for place, path in enumerate(sample.images)]
    return len(encode(sample, ruler.tokenizer, template, "<image>", spans, 10**6).input_ids)


@pytest.mark.parametrize("template", [VICUNA, CHATML], ids=["vicuna", "chatml"])
def test_lengths_are_those_of_the_step(processor: Any, template: Any) -> None:
    ruler = replace(by_size(processor), tokenizer=tiny_tokenizer("<image>", template))
    samples = random_talks(300)
    exact = [length_in_step(sample, ruler, template) for sample in samples]
    roomy = measure_with(ruler, samples, SIZES, template, "<image>", max_length=10**6)
    for sample, counted, true in zip(samples, roomy.tokens, exact, strict=True):
        assert 0 <= true - counted <= SLACK * len(cut(sample, template, "<image>")), "counted in one piece"
    tight = measure_with(ruler, samples, SIZES, template, "<image>", max_length=0)
    assert list(tight.tokens) == exact, "near the limit it is counted as the step does"
    assert [problem.row for problem in tight.problems] == [sample.row for sample in samples]
    assert list(roomy.image_tokens) == [sum(4 * SIZES[path][0] // 8 + place for place, path in enumerate(s.images)) for s in samples]


def test_the_limit_is_exact(processor: Any) -> None:
    for sample in random_talks(40):
        true = length_in_step(sample, processor, VICUNA)
        fits = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=true)
        (problem,) = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=true - 1).problems
        assert fits.problems == ()
        images = TOKENS * len(sample.images)
        assert problem.problem == f"{true} tokens ({images} of them images) are longer than data.max_length={true - 1}"
        assert f"set data.max_length={true}" in problem.fix


def test_what_the_tokenizer_makes_of_the_template(processor: Any) -> None:
    split = replace(VICUNA, end_mark="<|end of this|>")
    (problem,) = measure_with(processor, [talk("a", "b")], SIZES, split, "<image>", max_length=99).problems
    assert (problem.file, problem.row) == ("rows.json", 0)
    assert "reads the end mark '<|end of this|>' of the model's template as " in problem.problem
    none = replace(VICUNA, end_mark="")
    assert measure_with(processor, [talk("a", "b")], SIZES, none, "<image>", max_length=99).problems == ()


def test_an_answer_without_a_token(processor: Any) -> None:
    class Deaf:
        """Hears no bells."""

        bos_token_id = unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return processor.tokenizer(text.replace("\a", ""), add_special_tokens=False)

    ruler = replace(processor, tokenizer=Deaf())
    template = replace(VICUNA, assistant_open="ASSISTANT:", end_mark="")
    samples = [talk("a", "\a"), talk("a", "b", row=2)]
    (problem,) = measure_with(ruler, samples, SIZES, template, "<image>", max_length=99).problems
    assert (problem.row, problem.problem) == (1, "the tokenizer makes no token of its answers, so that nothing would be learned")


def test_a_text_with_the_image_token_beside_images(processor: Any) -> None:
    sample = replace(talk("<image>?", "b"), images=())
    (problem,) = measure_with(processor, [sample], SIZES, VICUNA, "<image>", max_length=3).problems
    assert "does not read one '<image>' for each of 0 images" in problem.problem


# what opening the processor raises -> what is said
UNOPENED: dict[str, tuple[Exception, str, tuple[str, ...]]] = {
    "not there": (OSError("no such model\nand so on"), "the model's processor cannot be opened here (no such model)", ()),
    "no transformers": (ImportError("No module named 'transformers'"), "cannot be opened here (No module named 'transformers')", ()),
    "another model": (InputRefused("it is a whale\n    take another"), "", ("it is a whale",)),
}


@pytest.mark.parametrize("name", UNOPENED)
def test_a_processor_that_cannot_be_opened(spec: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error, unmeasured, problems = UNOPENED[name]

    def refuse(_: Any) -> Any:
        raise error

    monkeypatch.setattr("trainer.data.length.open_ruler", refuse)
    lengths = measure([talk("a", "b")], SIZES, spec)
    assert unmeasured in lengths.unmeasured and bool(unmeasured) == bool(lengths.unmeasured)
    assert tuple(problem.problem for problem in lengths.problems) == problems
    assert list(lengths.tokens) == []


def test_a_tokenizer_without_the_image_token(spec: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.length.open_ruler", lambda _: processor)
    other = replace(spec, model=replace(spec.model, image_token="<picture>"))
    (problem,) = measure([talk("a", "b")], SIZES, other).problems
    assert "the tokenizer has no token '<picture>'" in problem.problem
    assert measure([talk("a", "b")], SIZES, spec).problems == ()


def test_percentiles() -> None:
    assert [percentile(range(1, 101), percent) for percent in (1, 50, 95, 100)] == [1, 50, 95, 100]
    assert (percentile([7], 50), percentile([], 50), percentile([1, 2], 50), percentile([1, 2, 3], 95)) == (7, 0, 1, 3)


def test_the_processor_of_a_run(tiny_spec: Any, tmp_path: Path) -> None:
    """The one that the run will have, from a random start and from its files; of the hub only what is on this machine."""
    from trainer.models import find_family

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
    absent = replace(spec, model=replace(spec.model, source=Source(kind="hub", id="nobody/has-this")))
    assert "the model's processor cannot be opened here" in measure(samples, SIZES, absent).unmeasured
