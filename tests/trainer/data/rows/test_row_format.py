"""Every supported row format becomes the same Sample, and problems are reported with the keys of the row."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from trainer.contract import DataReport, encode
from trainer.data.rows.parsed_row import MARK
from trainer.data.rows.row_format import ROW_FORMATS, USUAL, nearest_format
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.rows.sample import Message, Sample, read_samples

ROLES = ("user", "assistant")


def talk(*texts: Any, keys: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ROLES) -> list[dict[str, Any]]:
    return [{keys[0]: roles[index % 2], keys[1]: text} for index, text in enumerate(texts)]


def llava(*texts: Any) -> list[dict[str, Any]]:
    return talk(*texts, keys=("from", "value"), roles=("human", "gpt"))


def picture(**path: Any) -> dict[str, Any]:
    return {"type": "image", **path}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def address(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def read(folder: Path, *rows: Any, rules: RowRules = DEFAULT) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_samples(folder / "rows.json", folder, rules=rules)


# name -> (row, images, contents of the messages)
ASK, TELL = "<image>\nWhat?", "A cat."
READ: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "LLaVA": ({"id": "1", "image": "a.png", "conversations": llava(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "Qwen2.5-VL, several": (
        {"image": ["a.png", "b.png"], "conversations": llava("<image><image>?", TELL)},
        ("a.png", "b.png"),
        ("<image><image>?", TELL),
    ),
    "InternVL": (
        {"id": 0, "image": "a.png", "width": 8, "height": 8, "conversations": llava(ASK, TELL, "Sure?", "Yes.")},
        ("a.png",),
        (ASK, TELL, "Sure?", "Yes."),
    ),
    "MiniCPM": ({"id": "0", "image": "a.png", "conversations": talk(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "MiniCPM, no mark": ({"id": "0", "image": "a.png", "conversations": talk("What?", TELL)}, ("a.png",), (ASK, TELL)),
    "MiniCPM, a mark in the second question": (
        {"image": "a.png", "conversations": talk("Hi", "Hi!", ASK, TELL)},
        ("a.png",),
        ("Hi", "Hi!", ASK, TELL),
    ),
    "MiniCPM, named": (
        {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": talk("<image_01>\n<image_00>?", TELL)},
        ("b.png", "a.png"),
        ("<image>\n<image>?", TELL),
    ),
    "MiniCPM, one named twice": (
        {"image": {"<image_00>": "a.png"}, "conversations": talk("<image_00>?", TELL, "<image_00>!", TELL)},
        ("a.png", "a.png"),
        ("<image>?", TELL, "<image>!", TELL),
    ),
    "Qwen-VL": (
        {"id": "i0", "conversations": talk("Picture 1: <img>a.png</img>\nWhat?", TELL, keys=("from", "value"))},
        ("a.png",),
        ("Picture 1: <image>\nWhat?", TELL),
    ),
    "Qwen-VL, two and boxes": (
        {"conversations": talk("<img>a.png</img><img> b.png </img>", "<ref>it</ref><box>(1,2),(3,4)</box>", keys=("from", "value"))},
        ("a.png", "b.png"),
        ("<image><image>", "<ref>it</ref><box>(1,2),(3,4)</box>"),
    ),
    "a text about HTML with an image": (
        {"image": "a.png", "conversations": llava("<image> Is <img>x</img> HTML?", TELL)},
        ("a.png",),
        ("<image> Is <img>x</img> HTML?", TELL),
    ),
    "LLaMA-Factory": ({"images": ["a.png"], "messages": talk(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "ms-swift, images with bytes": ({"images": [{"path": "a.png", "bytes": None}], "messages": talk(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "image and no images": ({"image": "a.png", "images": [], "messages": talk(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "sharegpt": ({"system": "Be brief.", "images": ["a.png"], "conversations": llava(ASK, TELL)}, ("a.png",), ("Be brief.", ASK, TELL)),
    "OpenAI": ({"messages": talk([address({"url": "a.png"}), text("What?")], TELL)}, ("a.png",), ("<image>What?", TELL)),
    "OpenAI, a file URL": ({"messages": talk([text("See "), address("file:///{folder}/a.png")], TELL)}, ("a.png",), None),
    "transformers": (
        {"messages": talk([picture(image="a.png"), picture(path="b.png"), text("Which?")], [text("The "), text("first.")])},
        ("a.png", "b.png"),
        ("<image><image>Which?", "The first."),
    ),
    "transformers, images listed in the row": (
        {"images": ["a.png"], "messages": talk([picture(), text("What?")], [text(TELL)])},
        ("a.png",),
        ("<image>What?", TELL),
    ),
    "ms-swift's conversation": (
        {
            "system": "Be brief.",
            "conversation": [{"human": ASK, "assistant": TELL}, {"human": "Sure?", "assistant": "Yes."}],
            "image": "a.png",
        },
        ("a.png",),
        ("Be brief.", ASK, TELL, "Sure?", "Yes."),
    ),
    "ms-swift's query": (
        {"query": "Sure?", "response": "Yes.", "history": [[ASK, TELL]], "images": ["a.png"]},
        ("a.png",),
        (ASK, TELL, "Sure?", "Yes."),
    ),
    "ms-swift's query alone": ({"query": ASK, "response": TELL, "images": "a.png", "history": None}, ("a.png",), (ASK, TELL)),
    "messages under conversation": ({"image": "a.png", "conversation": llava(ASK, TELL)}, ("a.png",), (ASK, TELL)),
    "MiniCPM, with a system message": (
        {"image": "a.png", "system": "Be brief.", "conversations": talk(ASK, TELL)},
        ("a.png",),
        ("Be brief.", ASK, TELL),
    ),
    "alpaca": ({"instruction": "<image>", "input": "What?", "output": TELL, "images": ["a.png"]}, ("a.png",), (ASK, TELL)),
    "alpaca without input": ({"instruction": ASK, "input": "", "output": TELL, "system": "", "images": ["a.png"]}, ("a.png",), (ASK, TELL)),
}


@pytest.mark.parametrize("name", READ)
def test_a_shape_becomes_the_record(tmp_path: Path, name: str) -> None:
    row, images, contents = READ[name]
    row = json.loads(json.dumps(row).replace("{folder}", str(tmp_path).lstrip("/")))
    (sample,), problems = read(tmp_path, row)
    assert problems == ()
    assert sample.images == tuple(tmp_path / image for image in images)
    assert sum(message.content.count(MARK) for message in sample.messages) == len(images)
    if contents is not None:
        assert tuple(message.content for message in sample.messages) == contents
        assert tuple(message.role for message in sample.messages)[-2:] == ROLES
        assert sample.messages[0].role == ("system" if len(contents) % 2 else "user")


def test_the_example_of_every_format_is_read_as_that_format(tmp_path: Path) -> None:
    for row_format in ROW_FORMATS:
        row = json.loads(row_format.example)
        (sample,), problems = read(tmp_path, row, rules=RowRules(question="What?"))
        assert problems == (), row_format.name
        assert len(sample.images) == 1
        assert next(found for found in ROW_FORMATS if found.key in row and found.fits(row)) is row_format
        assert nearest_format(row).key == row_format.key


def test_each_conversation_of_a_list_is_a_sample(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "conversations": llava(ASK, TELL)}, {"conversations": llava("Hi", "Hi!")}]
    samples, problems = read(tmp_path, rows, rows[1])
    assert problems == ()
    assert [(sample.row, sample.part, len(sample.images)) for sample in samples] == [(1, 0, 1), (1, 1, 0), (2, 0, 0)]


def test_an_answer_with_loss_false_is_not_in_the_loss(tmp_path: Path) -> None:
    messages = talk("Hi", "Hi!", "What?", TELL)
    messages[1]["loss"], messages[3]["loss"] = False, True
    (sample,), _ = read(tmp_path, {"messages": messages})
    assert [message.in_loss for message in sample.messages] == [True, False, True, True]
    assert sample.messages[1] == Message(role="assistant", content="Hi!", in_loss=False)


# row -> [(field, text of the problem)]
NAMED = {"<image_00>": "a.png"}
PROBLEMS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "message": ({"message": talk("Hi", TELL)}, [("", "did you mean 'messages' in place of 'message'?")]),
    "question without an answer": ({"question": "Hi", "image": "a.png"}, [("", "keys 'question', 'image'; it lacks 'answer'")]),
    "several questions": ({"questions": "Hi", "answer": TELL}, [("", "did you mean 'question' in place of 'questions'?")]),
    "a text alone": ({"text": "Once upon a time"}, [("", "unknown row format: keys 'text'")]),
    "question and prompt": ({"question": "a", "answer": "b", "prompt": "c", "response": "d"}, [("", "has both question and prompt")]),
    "img, with a mark": ({"img": "a.png", "conversations": llava("<image>?", TELL)}, [("img", "unknown key 'img': did you mean 'image'?")]),
    "picture, without a mark": (
        {"picture": "a.png", "conversations": llava("What?", TELL)},
        [("picture", "unknown key 'picture': did you mean 'image'?")],
    ),
    "imgs": ({"imgs": ["a.png"], "messages": talk("<image>?", TELL)}, [("imgs", "unknown key 'imgs': did you mean 'images'?")]),
    "a name without an image": (
        {"image": NAMED, "conversations": talk("<image_00> <image_07>?", TELL)},
        [("conversations[0].content", "<image_07> is not among the images of the row: '<image_00>'"), ("conversations[0]", "too many")],
    ),
    "an image without a mark": (
        {"image": NAMED | {"<image_01>": "b.png"}, "conversations": talk("<image_00>?", TELL)},
        [("image.<image_01>", "no question contains this image")],
    ),
    "no name of an image": (
        {"image": {"first": "a.png"}, "conversations": talk("What?", TELL)},
        [("image.first", "is not a valid name of an image")],
    ),
    "a name in an answer": (
        {"image": NAMED, "conversations": talk("<image_00>", "<image_00>")},
        [("conversations[1].content", "<image_00> in an answer")],
    ),
    "a named image that is not there": (
        {"image": {"<image_00>": "c.png"}, "conversations": talk("<image_00>", TELL)},
        [("image.<image_00>", "no image file at")],
    ),
    "two images without marks are not put first": (
        {"image": ["a.png", "b.png"], "conversations": talk("What?", TELL)},
        [("conversations[0]", "too few <image> marks: 0")],
    ),
    "a tag in an answer": (
        {"conversations": talk("<img>a.png</img>", "<img>a.png</img>", keys=("from", "value"))},
        [("conversations[1].value", "<img> in an answer")],
    ),
    "a tag and a mark": (
        {"conversations": talk("<img>a.png</img> <image>", TELL, keys=("from", "value"))},
        [("conversations[0].value", "both <image> and <img>"), ("conversations[0]", "too many")],
    ),
    "a tag without a file": (
        {"conversations": talk("<img>c.png</img>", TELL, keys=("from", "value"))},
        [("conversations[0].value", "no image file at")],
    ),
    "a web address": (
        {"messages": talk([address({"url": "https://example.org/a.png"}), text("?")], TELL)},
        [("messages[0].content[0].image_url", "is not a file; images are not downloaded")],
    ),
    "an image in the text": (
        {"messages": talk([address({"url": "data:image/png;base64,iVBOR"})], TELL)},
        [("messages[0].content[0].image_url", "is not valid base64")],
    ),
    "a block of video": (
        {"messages": talk([{"type": "video", "video": "a.mp4"}, text("?")], TELL)},
        [("messages[0].content[0]", "has the type 'video'; only text and images are supported")],
    ),
    "a block of nothing": ({"messages": talk([{"type": 3}], TELL)}, [("messages[0].content[0]", "has the keys 'type'")]),
    "a block with two images": (
        {"messages": talk([picture(image="a.png", path="b.png")], TELL)},
        [("messages[0].content[0]", "has more than one image path: image and path")],
    ),
    "a block that is a number": ({"messages": talk([7], TELL)}, [("messages[0].content[0]", "is a number, not an object")]),
    "a block of text without text": ({"messages": talk([{"type": "text"}], TELL)}, [("messages[0].content[0].text", "is null")]),
    "blocks and a list": (
        {"images": ["a.png"], "messages": talk([picture(image="b.png"), text("?")], TELL)},
        [("messages[0].content[0].image", "images are given here and in 'images'")],
    ),
    "a block without its path": (
        {"messages": talk([picture(image="b.png"), picture(), text("?")], TELL)},
        [("messages[0].content[1]", "this image block has no path"), ("messages[0]", "too many")],
    ),
    "an image in an answer's blocks": (
        {"messages": talk("?", [picture(image="a.png"), text("This.")])},
        [("messages[1].content", "<image> mark in an answer"), ("messages[0]", "too few")],
    ),
    "a query without a response": ({"query": "What?", "images": []}, [("response", "is missing")]),
    "a query that is a list": ({"query": ["What?"], "response": TELL}, [("query", "is a list, not a string")]),
    "an empty response": ({"query": "What?", "response": " "}, [("response", "empty answer")]),
    "history of single words": ({"query": "What?", "response": TELL, "history": ["a"]}, [("history", "is not a list of pairs")]),
    "a null in history": ({"query": "What?", "response": TELL, "history": [["a", None]]}, [("history[0][1]", "is missing")]),
    "an input that is a number": ({"instruction": "Add", "input": 7, "output": "8"}, [("instruction", "is a number, not a string")]),
    "a conversation of strings": ({"conversation": ["a", "b"]}, [("conversation", "is not a list of questions and answers")]),
    "a conversation half": ({"conversation": [{"human": "a"}]}, [("conversation[0].assistant", "is missing")]),
    "query and instruction": ({"query": "a", "instruction": "b"}, [("", "has both query and instruction")]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(tmp_path: Path, name: str) -> None:
    bad, expected = PROBLEMS[name]
    good = {"messages": talk("Hi", "Hi!")}
    samples, problems = read(tmp_path, good, bad, good)
    assert [sample.row for sample in samples] == [1, 3], "only the invalid row is left out"
    assert sorted(problem.field for problem in problems) == sorted(field for field, _ in expected)
    for field, text in expected:
        problem = next(problem for problem in problems if problem.field == field)
        assert text in problem.problem
        assert problem.row == 2
        assert problem.fix


NEAREST = {
    ("image", "question"): '"question"',
    ("img", "caption"): '"caption"',
    ("prompt", "image"): '"prompt"',
    ("image", "conversation_list"): '"conversation',
    ("id", "image", "dialog"): '"image": "a.png", "conversations"',
    ("message",): '"messages"',
    ("instructions", "outputs"): '"instruction"',
    (): USUAL,
    ("a", "b"): USUAL,
}


@pytest.mark.parametrize("keys", NEAREST)
def test_the_most_similar_format_is_shown(tmp_path: Path, keys: tuple[str, ...]) -> None:
    _, (problem,) = read(tmp_path, dict.fromkeys(keys, "x"))
    assert f"keys {', '.join(map(repr, keys)) or 'none'}" in problem.problem
    assert NEAREST[keys] in problem.fix


def test_a_row_without_its_texts_is_told_the_key_that_it_lacks(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, {"id": 1, "image": "a.png"})
    assert problem.problem == "unknown row format: keys 'id', 'image'; it lacks 'conversations', which holds the texts"


# ---------------------------------------------------------------------------------------------------------------- random JSON

KEYS = (
    "conversations", "messages", "conversation", "query", "response", "instruction", "input", "output", "history", "image", "images",
    "from", "value", "role", "content", "type", "text", "human", "gpt", "user", "assistant", "system", "loss", "path", "bytes", "url",
    "image_url", "id", "video", "tools", "objects", "tool", "tool_call", "tool_calls", "function_call", "function", "name", "arguments",
    "reasoning_content", "thinking", "weight", "label", "question", "answer", "answers", "caption", "texts", "prompt", "completion",
    "file_name", "detail", "channel",
)  # fmt: skip
WORDS = st.sampled_from(
    (
        *(
            *KEYS,
            MARK,
            "<image_00>",
            "<img>a.png</img>",
            "a.png",
            "\ud83d",
            "\0",
            "",
            "<bbox>",
            "<video>",
            '{"name": "x"}',
            "<think></think>",
        ),
        *("<|vision_start|>a.png<|vision_end|>", "![a](a.png)", "a.png,b.png", "[INST]"),
    )
)
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | WORDS | st.text(max_size=5)
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6), max_leaves=25)
OF_A_MESSAGE = ["from", "value", "role", "content", "loss", "human", "assistant", "tool_calls", "reasoning", "weight", "name"]
MESSAGES = st.lists(st.dictionaries(st.sampled_from(OF_A_MESSAGE), ANY), max_size=4)
SPOKEN = st.fixed_dictionaries(
    {"role": WORDS | st.sampled_from(["user", "assistant", "tool"]), "content": ANY}, optional={"tool_calls": ANY}
)
ROWS = (
    ANY
    | st.fixed_dictionaries({}, optional={"conversations": MESSAGES, "messages": MESSAGES, "conversation": MESSAGES, "image": ANY})
    | st.fixed_dictionaries({"messages": st.lists(SPOKEN, min_size=1, max_size=5)}, optional={"images": ANY, "tools": ANY})
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
def test_no_row_makes_the_reader_raise(tmp_path: Path, rows: list[Any]) -> None:
    samples, problems = read(tmp_path, *rows)
    reported = {problem.row for problem in problems}
    whole = {sample.row for sample in samples}
    assert reported | whole == set(range(1, len(rows) + 1)), "every row is a sample or has a problem"
    for number, row in enumerate(rows, start=1):
        assert not (number in reported and number in whole) or isinstance(row, list)
    for sample in samples:
        assert_whole(sample)
    report = DataReport(schema=1, sha256="", train_rows=0, evaluation_rows=0, images=0, problems=problems)
    assert encode(report).encode(), "the problems of any row can be written to a file"


def assert_whole(sample: Sample) -> None:
    roles = "".join(message.role[0] for message in sample.messages if message.role != "system")
    assert re.fullmatch("(ua(t+a)*)+", roles), roles
    kept = (*sample.tools, *sample.ignored, *sample.adjustments, *sample.warnings)
    assert all(text.encode() for text in kept), "they can be written to a file"
    assert sum(message.content.count(MARK) for message in sample.messages if message.role == "user") == len(sample.images)
    assert not any(MARK in message.content for message in sample.messages if message.role != "user")
    assert all(image.is_file() for image in sample.images)
