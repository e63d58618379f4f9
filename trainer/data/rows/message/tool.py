"""Tools of a row, the calls of an answer, and the results."""

import json
from collections.abc import Sequence
from typing import Any

from trainer.data.rows.parsed_row import AddProblem, Row, ToolCall, kind

TOOL_KEYS = ("tools", "functions")  # functions: OpenAI's rows before 2023-11, as function_call in a message
TOOL_FIX = 'write a list of tools, or its JSON as a string: [{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
CALL_FIX = 'write {"name": "...", "arguments": {...}}, or a list of these'
THINK_END = "</think>"  # hiyouga/LLaMA-Factory, src/llamafactory/data/formatter.py: thoughts may stand before the JSON of a call


def read_tools(row: Row, add_problem: AddProblem) -> tuple[str, ...]:
    """The JSON of each tool, in {"type": "function", "function": ...}, as LLaMA-Factory (src/llamafactory/data/tool_utils.py) and ms-swift
    (swift/template/base.py) wrap them. () without tools, and with a problem."""
    given = [key for key in TOOL_KEYS if row.get(key)]
    if not given:
        return ()
    key = given[0]
    found = listed(parse(row[key]))
    if found is None:
        add_problem(key, "is not valid JSON" if isinstance(row[key], str) else f"is {kind(row[key])}, not a list of tools", TOOL_FIX)
        return ()
    tools = [parse(tool) for tool in found]
    wrong = next((number for number, tool in enumerate(tools) if not isinstance(name_of(tool), str)), None)
    if wrong is not None:
        add_problem(f"{key}[{wrong}]", "has no name of a function", TOOL_FIX)
        return ()
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    texts = tuple(json.dumps(tool, ensure_ascii=False) for tool in wrapped)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        add_problem(key, "half of a surrogate pair, which is not a character", "write the tools again from their source")
        return ()
    return texts


def read_calls(item: Row, field: str, add_problem: AddProblem) -> tuple[ToolCall, ...] | None:
    """Of OpenAI's keys tool_calls and function_call. () without them; None with a problem."""
    key = next((key for key in ("tool_calls", "function_call") if item.get(key)), "")
    if not key:
        return ()
    return make_calls(item[key], f"{field}.{key}", add_problem)


def split_calls(text: Any, field: str, add_problem: AddProblem) -> tuple[str, tuple[ToolCall, ...]] | None:
    """(thoughts before it, calls) of a message whose text is the JSON of calls; None with a problem."""
    thoughts = ""
    if isinstance(text, str) and THINK_END in text and parse(text) is None:
        before, end, text = text.rpartition(THINK_END)
        thoughts = before + end
    calls = make_calls(text, field, add_problem)
    return None if calls is None else (thoughts, calls)


def make_calls(value: Any, field: str, add_problem: AddProblem) -> tuple[ToolCall, ...] | None:
    """An object or a list of them, or its JSON: {"name", "arguments"}, also within {"function": ...}."""
    found = listed(parse(value))
    if not found:
        add_problem(field, "is not the JSON of a call" if isinstance(value, str) else f"is {kind(value)}, not a list of calls", CALL_FIX)
        return None
    calls = [make_call(parse(call)) for call in found]
    wrong = next((number for number, call in enumerate(calls) if call is None), None)
    if wrong is not None:
        add_problem(f"{field}[{wrong}]" if len(found) > 1 else field, "has no name, or no JSON object as its arguments", CALL_FIX)
        return None
    return tuple(call for call in calls if call is not None)


def make_call(call: Any) -> ToolCall | None:
    """The arguments stay as they are written. Without any, an empty object."""
    name = name_of(call)
    if not isinstance(name, str) or not name:
        return None
    inner = call.get("function", call)
    given = inner.get("arguments")
    arguments = "{}" if given in (None, "") else given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return ToolCall(name=name, arguments=arguments) if isinstance(parse(arguments), dict) else None


def name_of(tool: Any) -> Any:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return inner.get("name") if isinstance(inner, dict) else None


def parse(value: Any) -> Any:
    """The value of a JSON text; None for a text that is not JSON. Other values are unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def listed(value: Any) -> Sequence[Any] | None:
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else None
