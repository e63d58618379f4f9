"""Facts of rows, counted by hand; and the rows that an augmentation would contradict."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainer.data.conftest import with_data
from trainer.contract import Augmentation, CommonAnswer, LearningFacts, Source, TrainSpec
from trainer.data.check import examine_data
from trainer.data.learning_facts import FactTally
from trainer.data.rows.sample import Message, Sample
from trainer.data.sample_check import find_moved_boxes


def row(number: int, question: str, answer: str, image: str = "") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}" if image else question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns, **({"image": image} if image else {})}


def test_facts_of_a_data_check(spec: TrainSpec, tmp_path: Path) -> None:
    """Two files with the same picture count as one picture."""
    for name, colour in (("a", 1), ("copy-of-a", 1), ("b", 2), ("c", 3)):
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / f"{name}.png")
    train = [
        row(1, "Is it?", "yes", "a.png"),
        row(2, "Is it?", " yes ", "b.png"),
        row(3, "Is it?", "yes", "copy-of-a.png"),  # copies row 1
        row(4, "Which side?", "On the Left,\nalways.", "c.png"),
    ]
    held_out = [row(1, "Is it?", "yes", "a.png"), row(2, "Another?", "no", "b.png"), row(3, "No picture?", "no")]
    for name, rows in (("train.json", train), ("evaluation.json", held_out)):
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    nowhere = replace(spec, model=replace(spec.model, source=Source(kind="hub", id="example/none")))  # no tokenizer is needed
    report, problems, _ = examine_data(with_data(nowhere, evaluation="evaluation.json", images=str(tmp_path)))
    facts = report.learning
    assert not problems and "not available" in report.summary.unmeasured
    assert (facts.answers, facts.distinct) == (4, 2)
    assert facts.common == (CommonAnswer(text="yes", count=3), CommonAnswer(text="On the Left, always.", count=1))
    assert (facts.characters_p50, facts.characters_p95, facts.characters_max) == (3, 20, 20)
    assert (facts.repeated_rows, facts.shared_rows, facts.shared_images, facts.sided_rows) == (1, 1, 2, 1)


def test_a_data_check_refuses_boxes_of_training_rows_only(spec: TrainSpec, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("train.json", "evaluation.json"):
        rows = [row(1, "Is it?", "yes", "a.png"), row(2, "Where is it?", "[1, 2, 3, 4]", "a.png")]
        rows += [row(number, "Is it?", "no", "a.png") for number in (3, 4)]
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    nowhere = replace(spec, model=replace(spec.model, source=Source(kind="hub", id="example/none")))
    spec = with_data(nowhere, evaluation="evaluation.json", images=str(tmp_path))
    assert not examine_data(spec)[1]
    _, problems, _ = examine_data(with_data(spec, augmentation=Augmentation(flip=0.5)))
    assert [(Path(problem.file).name, problem.row) for problem in problems] == [("train.json", 2)]


def talk(*texts: str, images: tuple[str, ...] = ("a.png",), in_loss: bool = True) -> Sample:
    messages = tuple(
        Message(role="assistant" if place % 2 else "user", content=text, in_loss=in_loss or place > 1) for place, text in enumerate(texts)
    )
    return Sample(id="1", images=tuple(map(Path, images)), messages=messages, file="rows.json", row=1)


def collect_facts(train: Sequence[Sample], held_out: Sequence[Sample] = ()) -> LearningFacts:
    tally = FactTally()
    for sample in train:
        tally.add_training(sample, {})
    for sample in held_out:
        tally.add_held_out(sample, {})
    return tally.facts()


def test_answers_outside_the_loss_are_not_counted() -> None:
    facts = collect_facts([talk("a", "not trained", "b", "trained", in_loss=False)])
    assert facts.common == (CommonAnswer(text="trained", count=1),)


def test_long_answers_are_cut_and_no_row_is_no_fact() -> None:
    facts = collect_facts([talk("a", "x" * 1000)])
    assert facts.common[0].text == "x" * 59 + "…" and facts.characters_max == 1000
    assert collect_facts(()).answers == 0


def test_200_000_rows_are_counted_in_seconds() -> None:
    """A bound a hundred times what it takes, so that no machine fails it but a pass over pairs would."""
    rows = [replace(talk("<image> Which?", f"answer {number % 1000}"), row=number) for number in range(200_000)]
    began = time.process_time()
    facts = collect_facts(rows, rows[:100])
    assert facts.answers == 200_000 and facts.repeated_rows == 199_000 and facts.shared_rows == 100
    assert time.process_time() - began < 200


def test_the_common_answers_are_those_of_all_rows() -> None:
    """Also those that come after many that occur once; of equally common ones the first."""
    answers = [*(f"once {number}" for number in range(40)), *["late"] * 3, "twice", "once 7", "twice", "once 7"]
    facts = collect_facts([talk("a", answer) for answer in answers])
    counted = Counter(answers).most_common(5)
    assert [(common.text, common.count) for common in facts.common] == counted
    assert (facts.answers, facts.distinct) == (len(answers), len(set(answers)))


BOXES = [
    "<box>(10,20),(30,40)</box>",
    "<ref-object> is at <bbox>",
    "<|box_start|>(1,2),(3,4)<|box_end|>",
    '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
    "It is at [0.1, 0.25, 0.5, 1.0].",
]


@pytest.mark.parametrize("answer", BOXES)
def test_places_in_an_image_are_refused_where_they_would_move(answer: str) -> None:
    sample = talk("<image> Where?", answer)
    (problem,) = find_moved_boxes([sample], Augmentation(crop=0.8, flip=0.5))
    assert (problem.file, problem.row) == ("rows.json", 1)
    assert "set data.augmentation.crop=0 data.augmentation.flip=0" in problem.fix
    (problem,) = find_moved_boxes([sample], Augmentation(flip=0.5))
    assert problem.fix == "set data.augmentation.flip=0, or remove the row"
    assert not list(find_moved_boxes([sample], Augmentation(colour=0.4, jpeg=75))), "colours move nothing"
    assert not list(find_moved_boxes([talk("Where?", answer, images=())], Augmentation(flip=0.5)))


@pytest.mark.parametrize("answer", ["1, 2, 3, 4", "[1, 2, 3]", "a boxer, a <b>bold</b> one", "5 > 4", "[a, b, c, d]"])
def test_other_texts_are_no_places(answer: str) -> None:
    assert not list(find_moved_boxes([talk("<image> What?", answer)], Augmentation(crop=0.8, flip=0.5)))
