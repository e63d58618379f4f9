"""Messages in another order, several images without marks, and earlier answers: what each option makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.rows.sample import Sample, read_samples
from trainer.data.rows.turn_order import JOINED, LEARNED_LAST, MARKED_FIRST, MARKED_LAST, TRIMMED

TRIM, JOIN = RowRules(turns="trim"), RowRules(turns="join")
NAMES = {"s": "system", "u": "user", "a": "assistant"}
# name -> (roles and texts, images, rules, roles and texts as they are read, images, adjustments)
READ: dict[str, tuple[list[str], int, RowRules, list[str], int, tuple[str, ...]]] = {
    "an answer first, as in LLaVA's mix": (["a:x", "u:q", "a:b"], 0, TRIM, ["u:q", "a:b"], 0, (TRIMMED,)),
    "two answers first": (["a:x", "a:y", "u:q", "a:b"], 0, TRIM, ["u:q", "a:b"], 0, (TRIMMED,)),
    "after a system message": (["s:be", "a:x", "u:q", "a:b"], 0, TRIM, ["s:be", "u:q", "a:b"], 0, (TRIMMED,)),
    "a question last": (["u:q", "a:b", "u:thanks"], 0, TRIM, ["u:q", "a:b"], 0, (TRIMMED,)),
    "a last question with its image": (["u:<image>q", "a:b", "u:<image>r"], 2, TRIM, ["u:<image>q", "a:b"], 1, (TRIMMED,)),
    "nothing to trim": (["u:q", "a:b"], 0, TRIM, ["u:q", "a:b"], 0, ()),
    "two questions": (["u:q", "u:r", "a:b"], 0, JOIN, ["u:q\nr", "a:b"], 0, (JOINED,)),
    "three answers": (["u:q", "a:b", "a:c", "a:d"], 0, JOIN, ["u:q", "a:b\nc\nd"], 0, (JOINED,)),
    "join trims too": (["a:x", "u:q", "a:b", "a:c", "u:thanks"], 0, JOIN, ["u:q", "a:b\nc"], 0, (TRIMMED, JOINED)),
    "images of two questions": (["u:<image>q", "u:<image>r", "a:b"], 2, JOIN, ["u:<image>q\n<image>r", "a:b"], 2, (JOINED,)),
    "two system messages": (["s:be", "s:kind", "u:q", "a:b"], 0, JOIN, ["s:be\nkind", "u:q", "a:b"], 0, (JOINED,)),
    "several images first": (
        ["u:q", "a:b"], 2, RowRules(unmarked="first"), ["u:<image>\n<image>\nq", "a:b"], 2, (MARKED_FIRST,),
    ),
    "several images last": (
        ["u:q", "a:b"], 2, RowRules(unmarked="last"), ["u:q\n<image>\n<image>", "a:b"], 2, (MARKED_LAST,),
    ),
    "marked images stay": (["u:<image>q<image>", "a:b"], 2, RowRules(unmarked="first"), ["u:<image>q<image>", "a:b"], 2, ()),
    "the last answer": (["u:q", "a:b", "u:r", "a:c"], 0, RowRules(learn="last"), ["u:q", "x:b", "u:r", "a:c"], 0, (LEARNED_LAST,)),
    "the only answer": (["u:q", "a:b"], 0, RowRules(learn="last"), ["u:q", "a:b"], 0, ()),
}  # fmt: skip
# name -> (roles and texts, images, rules, a part of the problem)
REFUSED: dict[str, tuple[list[str], int, RowRules, str]] = {
    "an answer first": (["a:x", "u:q", "a:b"], 0, DEFAULT, "starts with an answer"),
    "a question last": (["u:q", "a:b", "u:r"], 0, DEFAULT, "conversation ends with a question"),
    "two questions, trimmed only": (["u:q", "u:r", "a:b"], 0, TRIM, "two user messages in a row"),
    "only answers": (["a:x", "a:y"], 0, JOIN, "starts with an answer"),
    "only questions": (["u:x"], 0, TRIM, "conversation without an answer"),
    "a system message in the middle": (["u:q", "s:be", "a:b"], 0, JOIN, "a system message that is not the first message"),
    "several images": (["u:q", "a:b"], 2, TRIM, "too few <image> marks: 0 in the questions for 2 images"),
    "one mark for two images": (["u:<image>q", "a:b"], 2, RowRules(unmarked="first"), "too few <image> marks: 1"),
}


def read(folder: Path, texts: list[str], images: int, rules: RowRules, **message: Any) -> tuple[tuple[Sample, ...], list[str]]:
    turns = [{"role": NAMES[text[0]], "content": text[2:], **(message if text[0] == "a" else {})} for text in texts]
    for number in range(images):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps([{"messages": turns, "images": [f"{number}.png" for number in range(images)]}]))
    samples, problems = read_samples(folder / "rows.json", folder, rules=rules)
    return samples, [problem.problem for problem in problems]


def write(sample: Sample) -> list[str]:
    """`x` for an answer that is not trained on."""
    return [f"{'x' if not message.in_loss else message.role[0]}:{message.content}" for message in sample.messages]


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    texts, images, rules, expected, left, adjustments = READ[name]
    (sample,), problems = read(tmp_path, texts, images, rules)
    assert problems == [] and write(sample) == expected
    assert [path.name for path in sample.images] == [f"{number}.png" for number in range(left)]
    assert sample.adjustments == adjustments


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_a_problem(name: str, tmp_path: Path) -> None:
    texts, images, rules, problem = REFUSED[name]
    samples, problems = read(tmp_path, texts, images, rules)
    assert samples == () and problem in problems[0]


def test_answers_that_differ_in_what_is_trained_are_not_joined(tmp_path: Path) -> None:
    turns = [("user", "q", {}), ("assistant", "b", {"loss": False}), ("assistant", "c", {})]
    rows = [{"messages": [{"role": role, "content": text, **more} for role, text, more in turns]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples, problems = read_samples(tmp_path / "rows.json", tmp_path, rules=JOIN)
    assert samples == () and problems[0].problem == "two assistant messages in a row"


def test_end_marks_are_removed_before_answers_are_joined(tmp_path: Path) -> None:
    (sample,), _ = read(tmp_path, ["u:q", "a:b</s>", "a:c</s>"], 0, JOIN)
    assert write(sample) == ["u:q", "a:b\nc"]


def test_an_answer_that_the_row_excludes_is_not_learned_for_being_the_last(tmp_path: Path) -> None:
    samples, problems = read(tmp_path, ["u:q", "a:b", "u:r", "a:c"], 0, RowRules(learn="last"), loss=False)
    assert samples == () and "all answers have loss: false" in problems[0]
