import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.sample import Message, read_samples

ASK = {"from": "human", "value": "<image>\nWhat?"}
PLAIN = {"from": "human", "value": "What?"}
TELL = {"from": "gpt", "value": "A cat."}
SYSTEM = {"from": "system", "value": "Be brief."}


def row(*turns: Any, image: Any = "a.png", key: str = "conversations") -> dict[str, Any]:
    return {"id": 1, key: list(turns)} | ({} if image is None else {"image": image})


def read(folder: Path, *rows: Any) -> Any:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"any file: nothing is decoded here")
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return read_samples(file, folder)


QUESTION, ANSWER = Message(role="user", content="<image>\nWhat?"), Message(role="assistant", content="A cat.")
ROW_FORMATS = {
    "llava": row(ASK, TELL),
    "llava, list of images": row(ASK, TELL, image=["a.png"]),
    "sharegpt": {"images": ["a.png"], "conversations": [ASK, TELL]},
    "sharegpt with the other role names": row({"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "A cat."}),
    "messages": {"images": ["a.png"], "messages": [{"role": "user", "content": ASK["value"]}, {"role": "assistant", "content": "A cat."}]},
    "minicpm": row({"role": "user", "content": ASK["value"]}, {"role": "assistant", "content": "A cat."}),
}


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_all_formats_become_the_same_sample(tmp_path: Path, name: str) -> None:
    (sample,), problems = read(tmp_path, ROW_FORMATS[name])
    assert problems == ()
    assert sample.messages == (QUESTION, ANSWER)
    assert sample.images == (tmp_path / "a.png",)
    assert (sample.file, sample.row) == (str(tmp_path / "rows.json"), 1)


def test_text_only_several_images_system_and_absolute_paths(tmp_path: Path) -> None:
    two = row(SYSTEM, {"from": "human", "value": "<image> or <image>?"}, TELL, PLAIN, TELL, image=["b.png", str(tmp_path / "a.png")])
    samples, problems = read(tmp_path, row(PLAIN, TELL, image=None), two, row(PLAIN, TELL, image=[]))
    assert problems == ()
    assert [len(sample.images) for sample in samples] == [0, 2, 0]
    assert samples[1].images == (tmp_path / "b.png", tmp_path / "a.png")
    assert [message.role for message in samples[1].messages] == ["system", "user", "assistant", "user", "assistant"]


def test_ids_are_from_the_file_or_the_row_number(tmp_path: Path) -> None:
    samples, _ = read(tmp_path, row(ASK, TELL) | {"id": 0}, {key: value for key, value in row(ASK, TELL).items() if key != "id"})
    assert [sample.id for sample in samples] == ["0", "2"]


# row -> [(field, text of the problem)]
PROBLEMS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "not an object": (7, [("", "is a number, not an object")]),
    "an empty list": ([], [("", "is a list, not an object")]),
    "a list of something else": ([1, "x"], [("[0]", "is a number"), ("[1]", "is a string, not an object")]),
    "one of a list": ([row(ASK)], [("[0].conversations", "without an answer")]),
    "unknown shape": ({"image": "a.png", "ask": "What?", "say": "A cat."}, [("", "keys 'image', 'ask', 'say'")]),
    "both shapes": ({"messages": [], "conversations": []}, [("", "has both conversations and messages")]),
    "no messages": (row(), [("conversations", "is empty")]),
    "messages not a list": ({"messages": "What?"}, [("messages", "is a string, not a list")]),
    "message not an object": (row("What?", TELL), [("conversations[0]", "is a string, not an object")]),
    "message without text": (row({"from": "human"}, TELL), [("conversations[0]", "has the keys 'from'")]),
    "text not a string": (
        row({"from": "human", "value": {"type": "image"}}, TELL),
        [("conversations[0].value", "is an object, not a string")],
    ),
    "unknown role": (row({"from": "narrator", "value": "x"}, TELL), [("conversations[0].from", "unknown role 'narrator'")]),
    "role not a string": (row({"role": 1, "value": "x"}, TELL), [("conversations[0].role", "unknown role 1")]),
    "no answer": (row(ASK), [("conversations", "without an answer")]),
    "ends with a question": (row(ASK, TELL, PLAIN), [("conversations[2]", "ends with a question")]),
    "two questions in a row": (row(ASK, PLAIN, TELL), [("conversations[1]", "two user messages in a row")]),
    "two answers in a row": (row(ASK, TELL, TELL), [("conversations[2]", "two assistant messages in a row")]),
    "starts with an answer": (row(TELL, ASK, TELL), [("conversations[0]", "starts with an answer")]),
    "late system message": (row(ASK, SYSTEM, TELL), [("conversations[1]", "a system message that is not the first message")]),
    "only a system message": (row(SYSTEM, image=None), [("conversations", "without an answer")]),
    "empty answer": (row(ASK, {"from": "gpt", "value": " \n"}), [("conversations[1].value", "empty answer")]),
    "empty question": (row({"from": "human", "value": ""}, TELL, image=None), [("conversations[0].value", "empty user message")]),
    "half a character": (row(ASK, {"from": "gpt", "value": "\ud83d"}), [("conversations[1].value", "surrogate")]),
    "a mark too many": (
        row({"from": "human", "value": "<image><image>?"}, TELL),
        [("conversations[0]", "too many <image> marks: 2 in the questions for 1 image")],
    ),
    "a mark too few": (
        row(SYSTEM, ASK, TELL, image=["a.png", "b.png"]),
        [("conversations[1]", "too few <image> marks: 1 in the questions for 2 images")],
    ),
    "no mark": (
        row(PLAIN, TELL, image=["a.png", "b.png"]),
        [("conversations[0]", "too few <image> marks: 0 in the questions for 2 images")],
    ),
    "no image": (row(ASK, TELL, image=None), [("conversations[0]", "too many <image> marks: 1 in the questions for 0 images")]),
    "mark in an answer": (row(ASK, {"from": "gpt", "value": "<image> A cat."}), [("conversations[1].value", "<image> mark in an answer")]),
    "mark in a system message": (
        row({"from": "system", "value": "<image>"}, ASK, TELL),
        [("conversations[0].value", "in a system message")],
    ),
    "image not a path": (row(ASK, TELL, image={"bytes": "iVBOR"}), [("image", "is not valid base64")]),
    "second image not a path": (row(ASK, TELL, ASK, TELL, image=["a.png", 7]), [("image[1]", "is a number, not a path")]),
    "an empty path is no image": (
        row(ASK, TELL, image=""),
        [("conversations[0]", "too many <image> marks: 1 in the questions for 0 images")],
    ),
    "image and images": (row(ASK, TELL) | {"images": ["a.png"]}, [("image", "both image and images")]),
    "absent image": (row(ASK, TELL, image="c.png"), [("image", "no image file at {folder}/c.png")]),
    "absent image, absolute": (row(ASK, TELL, image="/absent/c.png"), [("image", "no image file at /absent/c.png")]),
    "a folder": (row(ASK, TELL, image="."), [("image", "no image file at {folder}")]),
    "a name that no file can have": (row(ASK, TELL, image="x." * 2500), [("image", "no image file at")]),
    "a zero byte in a name": (row(ASK, TELL, image="a\0.png"), [("image", "no image file at")]),
    "a web address": (row(ASK, TELL, image="https://example.org/a.png"), [("image", "is not a file")]),
    "a video": (row(ASK, TELL) | {"video": "a.mp4"}, [("video", "only images are supported")]),
    "sound": (row(ASK, TELL) | {"audios": ["a.wav"]}, [("audios", "only images are supported")]),
    "tools": (row(ASK, TELL) | {"tools": "[...]"}, [("tools", "is not valid JSON")]),
    "a preference": (row(ASK, TELL) | {"rejected_response": "A dog."}, [("rejected_response", "preference data is not supported")]),
    "settings of its own": (row(ASK, TELL) | {"chat_template_kwargs": {"max_pixels": 50176}}, [("chat_template_kwargs", "a single row")]),
    "no answer is learned": (row(ASK, TELL | {"loss": False}), [("conversations", "all answers have loss: false")]),
    "a question to be learned": (row(ASK | {"loss": True}, TELL), [("conversations[0].loss", "only answers can be in the loss")]),
    "loss is a word": (row(ASK, TELL | {"loss": "no"}), [("conversations[1].loss", "is a string, not true or false")]),
    "two system messages": (row(SYSTEM, ASK, TELL) | {"system": "Be long."}, [("system", "another system message in conversations[0]")]),
    "system not a string": (row(ASK, TELL) | {"system": ["Be long."]}, [("system", "is a list, not a string")]),
    "swift's objects": (
        row({"from": "human", "value": "<image> <bbox>"}, TELL) | {"objects": {"bbox": [[1, 2, 3, 4]] * 2}},
        [("objects.bbox", "has 2 entries, and the texts have 1 <bbox> marks")],
    ),
    "two problems at once": (row(ASK, image="c.png"), [("image", "no image file"), ("conversations", "without an answer")]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(tmp_path: Path, name: str) -> None:
    bad, expected = PROBLEMS[name]
    samples, problems = read(tmp_path, row(ASK, TELL), bad, row(ASK, TELL))
    assert [sample.row for sample in samples] == [1, 3], "only the invalid row is left out"
    assert sorted(problem.field for problem in problems) == sorted(field for field, _ in expected)
    for field, text in expected:
        problem = next(problem for problem in problems if problem.field == field)
        assert text.format(folder=tmp_path) in problem.problem
        assert (problem.row, problem.file) == (2, str(tmp_path / "rows.json"))
        assert problem.fix


def test_the_text_of_a_problem(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, row(ASK, TELL, image="c.png"))
    assert str(problem) == (
        f"{tmp_path}/rows.json row 1, key 'image': no image file at {tmp_path}/c.png\n"
        f"    put the file there, or set data.images (now {tmp_path}) to the folder of the images"
    )
