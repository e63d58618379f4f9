"""Rows as the source documents write them: what is accepted as it stands, and the path in the message that is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.adjustment import END_MARK, END_MARKS, IMAGE_FIRST, without_end_mark
from trainer.data.rows.sample import read_samples


def messages(question: str, answer: str = "A cat.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def llava(question: str, answer: str = "A cat.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read(folder: Path, *rows: Any) -> Any:
    for name in ("a.png", "b c.JPG", "sub/d.webp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_samples(folder / "rows.json", folder)


# row -> contents of the messages, what was adjusted
ACCEPTED: dict[str, tuple[dict[str, Any], tuple[str, str], tuple[str, ...]]] = {
    "B5: messages and image": ({"messages": messages("<image>\nWhat?"), "image": ["a.png"]}, ("<image>\nWhat?", "A cat."), ()),
    "E3: no mark": ({"image": "a.png", "conversations": llava("What?")}, ("<image>\nWhat?", "A cat."), (IMAGE_FIRST,)),
    "messages, no mark": ({"messages": messages("What?"), "image": ["a.png"]}, ("<image>\nWhat?", "A cat."), (IMAGE_FIRST,)),
    "MiniCPM, no mark": ({"image": "a.png", "conversations": messages("What?")}, ("<image>\nWhat?", "A cat."), (IMAGE_FIRST,)),
    "query, no mark": ({"query": "What?", "response": "A cat.", "images": ["a.png"]}, ("<image>\nWhat?", "A cat."), (IMAGE_FIRST,)),
    "B5: its own end mark": ({"messages": messages("What?", "A cat.</s>")}, ("What?", "A cat."), (END_MARK,)),
    "both": (
        {"image": "a.png", "conversations": llava("What?", "A cat. <|im_end|>\n")},
        ("<image>\nWhat?", "A cat."),
        (IMAGE_FIRST, END_MARK),
    ),
    "a tag of HTML": ({"messages": messages("What?", "<s>A cat.</s>")}, ("What?", "<s>A cat.</s>"), ()),
    "a mark in the middle": ({"messages": messages("What?", "A </s> cat.")}, ("What?", "A </s> cat."), ()),
    "a name of a file that does not exist": ({"messages": messages("z.png is what?")}, ("z.png is what?", "A cat."), ()),
    "a name in a row with its image": (
        {"messages": messages("<image> a.png is what?"), "image": "a.png"},
        ("<image> a.png is what?", "A cat."),
        (),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_row_is_read_as_it_was_meant(tmp_path: Path, name: str) -> None:
    row, contents, adjustments = ACCEPTED[name]
    (sample,), problems = read(tmp_path, row)
    assert problems == ()
    assert tuple(message.content for message in sample.messages) == contents
    assert sample.adjustments == adjustments


@pytest.mark.parametrize("mark", END_MARKS)
def test_end_marks_are_removed_once_or_twice_with_the_spaces_before_them(mark: str) -> None:
    assert without_end_mark(f"A cat. {mark}") == without_end_mark(f"A cat.{mark}\n{mark} ") == "A cat."
    assert without_end_mark("A cat. \n") == "A cat. \n", "an answer without one keeps its spaces"
    assert without_end_mark(mark) == ""


def test_an_answer_of_an_end_mark_alone_is_empty(tmp_path: Path) -> None:
    samples, (problem,) = read(tmp_path, {"messages": messages("What?", "</s>")})
    assert samples == () and problem.problem == "empty answer"


def test_the_marks_of_accepted_answers_are_removed_too(tmp_path: Path) -> None:
    (sample,), _ = read(tmp_path, {"messages": messages("What?"), "answers": ["cat</s>", "cat"]})
    assert sample.accepted == ("cat",)


# row -> key, path, the rewritten row
PATHS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "alone": (
        {"messages": messages("a.png")},
        "messages[0].content",
        "a.png",
        {"messages": messages("<image>\n"), "image": "a.png"},
    ),
    "at the beginning": (
        {"id": 4, "conversations": llava("a.png\nWhat?")},
        "conversations[0].value",
        "a.png",
        {"id": 4, "conversations": llava("<image>\nWhat?"), "image": "a.png"},
    ),
    "after a mark, with a space in its name": (
        {"messages": messages("<image>b c.JPG What?"), "image": []},
        "messages[0].content",
        "b c.JPG",
        {"messages": messages("<image>\nWhat?"), "image": "b c.JPG"},
    ),
    "enclosed, although it does not exist": (
        {"messages": messages("See <image>x/y.png</image> What?")},
        "messages[0].content",
        "x/y.png",
        {"messages": messages("See <image>\nWhat?"), "image": "x/y.png"},
    ),
    "enclosed and listed": (
        {"messages": messages("<image>a.png</image>\nWhat?"), "images": ["a.png"]},
        "messages[0].content",
        "a.png",
        {"messages": messages("<image>\nWhat?"), "image": "a.png"},
    ),
    "of two questions": (
        {"messages": [*messages("a.png What?"), *messages("sub/d.webp And that?")]},
        "messages[0].content",
        "a.png",
        {"messages": [*messages("<image>\nWhat?"), *messages("<image>\nAnd that?")], "image": ["a.png", "sub/d.webp"]},
    ),
    "within the question": (
        {"messages": messages("What is in a.png?")},
        "messages[0].content",
        "a.png",
        {"messages": messages("What is in <image>?"), "image": "a.png"},
    ),
    "in Markdown": (
        {"messages": messages("![it](sub/d.webp) What?")},
        "messages[0].content",
        "sub/d.webp",
        {"messages": messages("<image> What?"), "image": "sub/d.webp"},
    ),
    "in a tag of HTML": (
        {"messages": messages('See <img src="a.png" alt="x"> What?')},
        "messages[0].content",
        "a.png",
        {"messages": messages("See <image> What?"), "image": "a.png"},
    ),
    "ms-swift's query": (
        {"query": "a.png What?", "response": "x"},
        "query",
        "a.png",
        {"query": "<image>\nWhat?", "response": "x", "image": "a.png"},
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_in_the_message_is_a_problem_that_shows_the_row_rewritten(tmp_path: Path, name: str) -> None:
    row, field, path, rewritten = PATHS[name]
    samples, (problem,) = read(tmp_path, row)
    assert samples == () and problem.field == field and problem.problem == f"the image path {path!r} is in the message"
    shown = json.loads(problem.fix.removeprefix("move it to image: "))
    assert shown == rewritten
    if (tmp_path / path).exists():
        (sample,), problems = read(tmp_path, shown)
        assert problems == () and sample.images[0] == tmp_path / path and sample.adjustments == ()


def test_a_long_row_is_shown_shortened(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, {"messages": messages(f"a.png {'word ' * 100}", "x" * 500)})
    assert len(problem.fix) < 300 and "…" in problem.fix and '"image": "a.png"' in problem.fix


def test_a_very_long_name_is_no_path(tmp_path: Path) -> None:
    (sample,), problems = read(tmp_path, {"messages": messages(f"{'x' * 5000}.png What?")})
    assert problems == () and sample.images == ()
