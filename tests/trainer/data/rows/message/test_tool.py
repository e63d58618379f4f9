"""Tools, their calls and results, as OpenAI, LLaMA-Factory and ms-swift write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.message.turn import OBJECT_AS_TEXT
from trainer.data.rows.parsed_row import ToolCall
from trainer.data.rows.sample import Sample, read_samples

Row = dict[str, Any]
FUNCTION = {"name": "zoom", "description": "looks closer", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "zoom", "arguments": {"x": 1}}
ZOOM = ToolCall(name="zoom", arguments='{"x": 1}')


def read(folder: Path, row: Row) -> tuple[tuple[Sample, ...], Any]:
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return read_samples(folder / "rows.json", folder)


def say(role: str, content: Any, **keys: Any) -> Row:
    return {"role": role, "content": content, **keys}


def share(role: str, value: str) -> Row:
    return {"from": role, "value": value}


def openai(arguments: Any, **keys: Any) -> list[Row]:
    return [{"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": arguments}, **keys}]


# row -> messages as (role, content, calls), number of tools
SHAPES: dict[str, tuple[Row, list[tuple[str, str, tuple[ToolCall, ...]]], int]] = {
    "OpenAI": (
        {
            "tools": [TOOL],
            "messages": [
                say("user", "Colour?"),
                say("assistant", None, tool_calls=openai('{"x": 1}')),
                say("tool", "ok", tool_call_id="c1", name="zoom"),
                say("assistant", "Blue"),
            ],
        },
        [("user", "Colour?", ()), ("assistant", "", (ZOOM,)), ("tool", "ok", ()), ("assistant", "Blue", ())],
        1,
    ),
    "OpenAI, two at once and two results, ending with a call": (
        {
            "messages": [
                say("user", "Colour?"),
                say("assistant", "I look.", tool_calls=openai({"x": 1}) * 2),
                say("tool", "ok"),
                say("tool", {"ok": True}),
                {"role": "assistant", "tool_calls": openai("")},
            ]
        },
        [
            ("user", "Colour?", ()),
            ("assistant", "I look.", (ZOOM, ZOOM)),
            ("tool", "ok", ()),
            ("tool", '{"ok": true}', ()),
            ("assistant", "", (ToolCall(name="zoom", arguments="{}"),)),
        ],
        0,
    ),
    "OpenAI before 2023-11": (
        {
            "functions": [FUNCTION],
            "messages": [
                say("user", "Colour?"),
                say("assistant", None, function_call={"name": "zoom", "arguments": '{"x": 1}'}),
                say("function", "ok", name="zoom"),
                say("assistant", "Blue"),
            ],
        },
        [("user", "Colour?", ()), ("assistant", "", (ZOOM,)), ("tool", "ok", ()), ("assistant", "Blue", ())],
        1,
    ),
    "LLaMA-Factory": (
        {
            "tools": json.dumps([FUNCTION]),
            "conversations": [
                share("human", "Colour?"),
                share("function_call", "<think>Closer.</think>" + json.dumps([CALL, CALL])),
                share("observation", "ok"),
                share("gpt", "Blue"),
            ],
        },
        [("user", "Colour?", ()), ("assistant", "<think>Closer.</think>", (ZOOM, ZOOM)), ("tool", "ok", ()), ("assistant", "Blue", ())],
        1,
    ),
    "ms-swift: a text, calls one by one, and results": (
        {
            "tools": [json.dumps(TOOL)],
            "messages": [
                say("user", "Colour?"),
                say("assistant", "I look."),
                say("tool_call", json.dumps(CALL)),
                say("tool_call", json.dumps(CALL)),
                say("tool_response", "ok"),
                say("tool_response", "ok"),
                say("assistant", "Blue"),
            ],
        },
        [
            ("user", "Colour?", ()),
            ("assistant", "I look.", (ZOOM, ZOOM)),
            ("tool", "ok", ()),
            ("tool", "ok", ()),
            ("assistant", "Blue", ()),
        ],
        1,
    ),
    "calls in the text": (
        {"conversations": [share("human", "?"), share("gpt", "<tool_call>{}</tool_call>"), share("tool", ""), share("gpt", "Blue")]},
        [("user", "?", ()), ("assistant", "<tool_call>{}</tool_call>", ()), ("tool", "", ()), ("assistant", "Blue", ())],
        0,
    ),
    "empty keys": ({"tools": "", "functions": None, "messages": [say("user", "?"), say("assistant", "Blue", tool_calls=[])]}, [], 0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str) -> None:
    row, messages, tools = SHAPES[name]
    (sample,), problems = read(tmp_path, row)
    assert problems == ()
    assert [(message.role, message.content, message.calls) for message in sample.messages] == messages or not messages
    assert [json.loads(tool) for tool in sample.tools] == [TOOL] * tools
    assert sample.adjustments == ((OBJECT_AS_TEXT,) if "two results" in name else ())


def test_a_call_may_be_outside_the_loss(tmp_path: Path) -> None:
    rows = [say("user", "?"), say("tool_call", json.dumps(CALL), loss=False), say("tool_response", "ok"), say("assistant", "Blue")]
    (sample,), _ = read(tmp_path, {"messages": rows})
    assert [message.in_loss for message in sample.messages if message.role == "assistant"] == [False, True]


ASK, TELL = say("user", "Colour?"), say("assistant", "Blue")
CALLING = say("assistant", "", tool_calls=openai("{}"))
REFUSED: dict[str, tuple[Row, str, str]] = {
    "tools that are not JSON": ({"tools": "[", "messages": [ASK, TELL]}, "tools", "is not valid JSON"),
    "tools that are a number": ({"tools": 3, "messages": [ASK, TELL]}, "tools", "is a number, not a list of tools"),
    "half a character": ({"tools": [{"name": "\ud83d"}], "messages": [ASK, TELL]}, "tools", "half of a surrogate pair"),
    "a tool without a name": ({"tools": [{"type": "function"}], "messages": [ASK, TELL]}, "tools[0]", "has no name of a function"),
    "a call without a name": ({"messages": [ASK, say("assistant", "", tool_calls=[{"id": 1}])]}, "messages[1].tool_calls", "has no name"),
    "arguments that are not JSON": ({"messages": [ASK, say("assistant", "", tool_calls=openai("{x"))]}, "messages[1].tool_calls", "no JSON object"),
    "arguments in a list": ({"messages": [ASK, say("assistant", "", tool_calls=openai([1]))]}, "messages[1].tool_calls", "no JSON object"),
    "a call that is a text": ({"messages": [ASK, say("tool_call", "zoom(1)")]}, "messages[1].content", "is not the JSON of a call"),
    "a question with calls": ({"messages": [say("user", "?", tool_calls=openai("{}")), TELL]}, "messages[0]", "the role user with calls"),
    "a result first": ({"messages": [say("tool", "ok"), TELL]}, "messages[0]", "the result of a tool without a call before it"),
    "a result after a question": ({"messages": [ASK, say("tool", "ok"), TELL]}, "messages[1]", "without a call before it"),
    "a question after a result": ({"messages": [ASK, CALLING, say("tool", "ok"), ASK, TELL]}, "messages[3]", "a question after the result"),
    "a result at the end": ({"messages": [ASK, CALLING, say("tool", "ok")]}, "messages[2]", "ends with the result of a tool"),
    "an image in a result": ({"messages": [ASK, CALLING, say("tool", "<image>"), TELL]}, "messages[2].content", "mark in a result of a tool"),
    "half of a text in the loss": (
        {"messages": [ASK, say("assistant", "I look.", loss=False), say("tool_call", json.dumps(CALL))]},
        "messages[2]",
        "its loss is another one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    row, field, text = REFUSED[name]
    samples, (problem,) = read(tmp_path, row)
    assert samples == () and problem.field == field and text in problem.problem and problem.fix
