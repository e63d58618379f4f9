"""Which answers are in the loss, under the keys of the formats that say it."""

from typing import Any

import pytest

from trainer.data.rows.message.loss_flag import read_loss

# keys of an answer -> whether it is in the loss
READ: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, True),
    "ms-swift": ({"loss": False}, False),
    "AgentInstruct": ({"loss": None}, True),
    "axolotl": ({"train": False}, False),
    "axolotl, its default key": ({"training": True}, True),
    "OpenAI": ({"weight": 0}, False),
    "OpenAI, in": ({"weight": 1}, True),
    "SlimOrca": ({"weight": 0.0}, False),
    "LLaMA-Factory": ({"loss_weight": 1.0}, True),
    "ms-swift's scale": ({"loss_scale": 0}, False),
    "masked": ({"no_train": True}, False),
    "not masked": ({"no_train": False}, True),
    "two that agree": ({"train": False, "weight": 0}, False),
}
# keys -> key of the problem, its text
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a part": ({"weight": 0.5}, "m[1].weight", "is 0.5: an answer is in the loss or not"),
    "more than one": ({"loss_scale": 2}, "m[1].loss_scale", "weights between are not supported"),
    "negative": ({"weight": -1}, "m[1].weight", "is -1"),
    "not a number": ({"loss_weight": float("nan")}, "m[1].loss_weight", "is nan"),
    "a word": ({"train": "no"}, "m[1].train", "is a string, not true or false"),
    "a number for loss": ({"loss": 1}, "m[1].loss", "is a number, not true or false"),
    "a text for a weight": ({"weight": "1"}, "m[1].weight", "is a string, not 0 or 1"),
    "two that differ": ({"loss": True, "weight": 0}, "m[1]", "loss and weight say different things"),
}


def read(item: dict[str, Any], role: Any = "assistant") -> tuple[bool | None, list[tuple[str, str, str]]]:
    problems: list[tuple[str, str, str]] = []
    return read_loss({"role": role, "content": "x", **item}, role, "m[1]", lambda *problem: problems.append(problem)), problems


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str) -> None:
    item, in_loss = READ[name]
    assert read(item) == (in_loss, [])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    item, field, text = REFUSED[name]
    found, [(key, problem, fix)] = read(item)
    assert found is None and key == field and text in problem and fix


@pytest.mark.parametrize("key", ["loss", "train", "weight", "loss_weight"])
def test_a_question_cannot_be_in_the_loss(key: str) -> None:
    assert read({key: False if key in ("loss", "train") else 0}, "user") == (False, [])
    found, [(field, problem, _)] = read({key: True if key in ("loss", "train") else 1}, "user")
    assert found is None and field == f"m[1].{key}" and problem == "only answers can be in the loss"
