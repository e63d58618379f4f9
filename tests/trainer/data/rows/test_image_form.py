"""How images are joined to questions: found in rows, repeated for what is asked without marks, left alone where it is said."""

import json
from pathlib import Path
from typing import Any

import pytest

import trainer.data.rows.sample
from trainer.contract import LINE_FEED, ImageForm
from trainer.data.rows.adjustment import IMAGE_FIRST, IMAGE_LAST
from trainer.data.rows.image_form import MOVED, PLACES, as_trained, describe, find_form, join_images, most_frequent, name_form, place_images
from trainer.data.rows.request import read_requests
from trainer.data.rows.row_rules import RowRules
from trainer.data.rows.sample import Message, Sample, questions_of, read_samples

NOTHING = ImageForm(separator="", questions=2, counted=2)
AFTER = ImageForm(place="after", separator=" ", between="\n", questions=3, counted=4)

# question -> its form
FORMS: dict[str, ImageForm | None] = {
    "<image>\nWhat?": ImageForm(),
    "<image>What?": ImageForm(separator=""),
    "<image> What?\n": ImageForm(separator=" "),
    "\n<image>\n\nWhat?": ImageForm(separator="\n\n"),
    "What?<image>": ImageForm(place="after", separator=""),
    "What?\n<image>\n": ImageForm(place="after", separator="\n"),
    "<image><image>\nWhat?": ImageForm(),
    "<image>\n<image>\nWhat?": ImageForm(between="\n"),
    "What? <image>\n<image>": ImageForm(place="after", separator=" ", between="\n"),
    "Is <image> a cat?": None,
    "<image> or <image>?": None,
    "Picture 1: <image>\nWhat?": None,
    "<image>": None,
    "What?": None,
    "": None,
}


@pytest.mark.parametrize("question", FORMS)
def test_the_form_of_a_question(question: str) -> None:
    found = find_form(question)
    assert found == FORMS[question]
    if found:
        text = question.replace("<image>", "").strip()
        assert join_images(text, question.count("<image>"), found) == question.strip(), "and it can be made again"


def test_the_most_frequent_form_is_taken_and_the_others_are_counted() -> None:
    questions = ["<image>A?", "<image>\nB?", "<image>C?", "D? <image>", "Is <image> E?", "<image>", "no image", "<image>\n<image>F?"]
    assert most_frequent(questions) == ImageForm(separator="", between="\n", questions=3, counted=6)
    assert list(map(name_form, questions)) == [
        "before the question, followed by nothing",
        "before the question, followed by a line feed",
        "before the question, followed by nothing",
        "after the question, preceded by a space",
        "within the question",
        "",
        "",
        "before the question, followed by nothing",
    ]
    assert most_frequent(["<image>\nA?", "<image>B?"]) == ImageForm(questions=1, counted=2), "the first of two equally frequent ones"
    assert most_frequent(["no image", "Is <image> E?", "<image>"]) is None


def test_the_sentence_at_the_start_of_a_stage() -> None:
    assert describe(ImageForm(questions=5, counted=5)) == (
        "images are put before the question, followed by a line feed, as in the training rows"
    )
    assert describe(AFTER) == (
        "images are put after the question, preceded by a space, with a line feed between two of them, as in 3 of 4 training questions"
    )
    assert describe(ImageForm(separator=" : ")) == (
        "images are put before the question, followed by ' : ', since these weights have no record of training rows"
    )


def test_a_question_in_parts_is_put_into_the_form_of_the_training_rows() -> None:
    assert as_trained("<image>\nWhat?", NOTHING) == as_trained("What?<image>", NOTHING) == "<image>What?"
    assert as_trained("<image><image>What?", AFTER) == "What? <image>\n<image>"
    for said in ("Is <image> a cat?", "What?", "<image>"):
        assert as_trained(said, NOTHING) == said
    assert as_trained("What?<image>", ImageForm(separator="")) == "What?<image>", "nothing is known of these weights"


# ------------------------------------------------------------------------------------------------------------- rows to ask

PARTS = [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]
ASKED: tuple[tuple[dict[str, Any], str, str, str], ...] = (  # row, and its question by LINE_FEED, NOTHING and AFTER
    ({"prompt": "What?", "image": "a.png"}, "<image>\nWhat?", "<image>What?", "What? <image>"),
    ({"prompt": "What?", "images": ["a.png", "b.png"]}, "<image><image>\nWhat?", "<image><image>What?", "What? <image>\n<image>"),
    ({"messages": [{"role": "user", "content": "What?"}], "images": ["a.png"]}, "<image>\nWhat?", "<image>What?", "What? <image>"),
    ({"messages": [{"role": "user", "content": PARTS}]}, "What?<image>", "<image>What?", "What? <image>"),
    *(
        ({"prompt": said, "image": "a.png"}, said, said, said)
        for said in ("<image>\nWhat?", "<image>What?", "What?\n<image>", "Is <image> a cat?")
    ),
    ({"prompt": "What?"}, "What?", "What?", "What?"),
)


@pytest.mark.parametrize(("row", "expected"), [(row, expected) for row, *expected in ASKED], ids=[json.dumps(row) for row, *_ in ASKED])
def test_a_row_of_infer_is_asked_as_the_model_was_trained(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for form, text in zip((LINE_FEED, NOTHING, AFTER), expected, strict=True):
        (request,) = read_requests(tmp_path / "rows.jsonl", tmp_path, form)
        assert [message.content for message in request.messages] == [text]


def test_held_out_rows_follow_the_training_rows_which_stay_as_they_are(tmp_path: Path) -> None:
    def conversation(question: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat."}]}

    (tmp_path / "a.png").write_bytes(b"nothing is decoded here")
    unmarked, parts = {**conversation("What?"), "image": "a.png"}, conversation(PARTS)
    rows = [unmarked, parts, {**conversation("<image> What?"), "image": "a.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for form, said in (
        (LINE_FEED, ["<image>\nWhat?", "What?<image>", "<image> What?"]),
        (NOTHING, ["<image>What?", "<image>What?", "<image> What?"]),
        (AFTER, ["What? <image>", "What? <image>", "<image> What?"]),
    ):
        samples, problems = read_samples(tmp_path / "rows.json", tmp_path, form)
        assert problems == () and list(questions_of(samples)) == said
        assert samples[0].adjustments == ((IMAGE_LAST if form is AFTER else IMAGE_FIRST),)


def test_of_a_large_file_evenly_spread_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.data.rows.sample, "MOST_ASKED", 3)
    samples = [
        Sample(id="", images=(), messages=(Message(role="user", content=f"{n}?"), Message(role="assistant", content="a")), file="", row=n)
        for n in range(7)
    ]
    assert list(questions_of(samples)) == ["0?", "3?", "6?"] and list(questions_of(samples[:3])) == ["0?", "1?", "2?"]


# question -> with image_place=front, with image_place=bare
PLACED = {
    "<image>\nWhich?": ("<image>\nWhich?", "<image>Which?"),
    "Which?\n<image>": ("<image>\nWhich?", "Which?<image>"),
    "<image> Which? ": ("<image>\nWhich?", "<image>Which?"),
    "<image>Which?": ("<image>\nWhich?", "<image>Which?"),
    "<image>\n<image>\nWhat differs?": ("<image>\n<image>\nWhat differs?", "<image><image>What differs?"),
    "First <image> then <image>: which?": ("<image>\n<image>\nFirst  then : which?", "First<image>then<image>: which?"),
    "<image>": ("<image>", "<image>"),
    "  No image. ": ("  No image. ", "No image."),
}


@pytest.mark.parametrize("question", PLACED)
def test_places_of_images(question: str) -> None:
    front, bare = PLACED[question]
    assert (place_images(question, "front"), place_images(question, "bare")) == (front, bare)
    assert place_images(question, "row") == question


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("question", PLACED)
def test_no_image_is_lost_and_a_second_time_changes_nothing(question: str, place: str) -> None:
    once = place_images(question, place)
    assert once.count("<image>") == question.count("<image>")
    assert place_images(once, place) == once


@pytest.mark.parametrize("place", MOVED)
def test_rows_are_read_with_their_images_elsewhere_and_counted(tmp_path: Path, place: str) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": " One "}], "image": "a.png"}]
    (tmp_path / "a.png").touch()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (sample,), problems = read_samples(tmp_path / "rows.json", tmp_path, rules=RowRules(image_place=place))
    assert problems == () and sample.adjustments == (MOVED[place],)
    assert [message.content for message in sample.messages] == [place_images("Which?\n<image>", place), " One "]
    (as_written,), _ = read_samples(tmp_path / "rows.json", tmp_path)
    assert as_written.messages[0].content == "Which?\n<image>" and as_written.adjustments == ()
