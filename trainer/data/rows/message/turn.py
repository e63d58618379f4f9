"""Read messages: role and text under all usual names, the content as a string or as blocks of text and images; loss, reasoning and calls."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.data.rows.message.loss_flag import read_loss
from trainer.data.rows.message.reasoning import is_reasoning, read_reasoning
from trainer.data.rows.message.role import ReadRole, find_role, suggest_role
from trainer.data.rows.message.tool import make_calls, read_calls, split_calls
from trainer.data.rows.parsed_row import MARK, AddProblem, ImageReference, Row, ToolCall, Turn, keys_of, kind, quote

# Of a block {"type": "image", KEY: path}: transformers' chat templates use the first three, ms-swift and OpenAI the last.
PATH_KEYS = ("image", "path", "url", "image_url")
IMAGE_TYPES = ("image", "image_url")
WRITE_TEXT = "write the text as a string"
WRITE_MESSAGE = 'give it "from" and "value", or "role" and "content"'
FROM_IMAGES = object()  # instead of a path: the block only marks the position, and the row lists the path under image or images
OBJECT_AS_TEXT = "result of a tool that is an object, written as JSON"

Read = tuple[Turn, tuple[ImageReference, ...]]
Content = tuple[str, tuple[ImageReference, ...]]


def read_turns(row: Row, key: str, add_problem: AddProblem) -> tuple[tuple[Turn, ...] | None, tuple[ImageReference, ...]]:
    """The messages under `key`, None if one of them cannot be parsed; and the images in their blocks."""
    if not isinstance(row[key], list) or not row[key]:
        fix = 'write a list of messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        add_problem(key, "is empty" if row[key] == [] else f"is {kind(row[key])}, not a list of messages", fix)
        return None, ()
    read = [read_turn(item, f"{key}[{index}]", add_problem) for index, item in enumerate(row[key])]
    images = tuple(image for found in read if found for image in found[1])
    turns = [found[0] for found in read if found] if all(read) else None
    if turns is not None and any(turn.calls for turn in turns):
        turns = join_calls(turns, add_problem)
    return (None if turns is None else tuple(turns)), images


def read_turn(item: Any, field: str, add_problem: AddProblem) -> Read | None:
    if not isinstance(item, dict):
        add_problem(field, f"is {kind(item)}, not an object", WRITE_MESSAGE)
        return None
    role_key, text_key = pick(item, "from", "role"), pick(item, "value", "content")
    if not text_key and role_key and item.get("tool_calls"):
        item, text_key = {**item, "content": None}, "content"
    if not role_key or not text_key:
        add_problem(field, f"has the keys {keys_of(item)}", WRITE_MESSAGE)
        return None
    role = find_role(item[role_key])
    if role is None:
        add_problem(f"{field}.{role_key}", f"unknown role {quote(item[role_key])}", suggest_role(item[role_key]))
        return None
    if len(item) == 2 and isinstance(item[text_key], str) and not role.is_call:  # the usual case, without other keys
        adjusted = (role.adjustment,) if role.adjustment else ()
        return Turn(role=role.role, content=item[text_key], field=field, text_key=text_key, adjustments=adjusted), ()
    return read_more(item, role, field, text_key, add_problem)


def pick(item: Row, first: str, second: str) -> str:
    """Which of two keys is used: tables have both, and null under the other one. '' without either."""
    return first if item.get(first) is not None else second if second in item else first if first in item else ""


def read_more(item: Row, role: ReadRole, field: str, text_key: str, add_problem: AddProblem) -> Read | None:
    """A message with more than a role and a text."""
    if twice := next((pair for pair in (("from", "role"), ("value", "content")) if differ(item, *pair)), None):
        add_problem(field, f"{' and '.join(twice)} say different things", "keep one of them")
        return None
    value, calls, adjustments = item[text_key], read_calls(item, field, add_problem), [role.adjustment]
    if calls and role.role != "assistant":
        add_problem(field, f"the role {role.role} with calls of tools", 'only "assistant" calls tools')
        return None
    value, called = take_calls(value, field, add_problem)
    calls = None if calls is None or called is None else (*calls, *called)
    reasoning = read_reasoning(item, role.role, field, add_problem)
    in_loss = read_loss(item, role.role, field, add_problem)
    content: Content | None = None
    if role.is_call:
        called = split_calls(value, f"{field}.{text_key}", add_problem)
        content, calls = ((called[0], ()), called[1]) if called else (None, None)
    elif value is None and calls:
        content = ("", ())
    elif role.role == "tool" and isinstance(value, dict):
        content = (json.dumps(value, ensure_ascii=False), ())
        adjustments.append(OBJECT_AS_TEXT)
    else:
        content = read_content(value, f"{field}.{text_key}", add_problem)
    if content is None or in_loss is None or reasoning is None or calls is None:
        return None
    return Turn(
        role=role.role,
        content=content[0],
        field=field,
        text_key=text_key,
        in_loss=in_loss,
        in_parts=isinstance(value, list) and not role.is_call,
        reasoning=reasoning,
        calls=calls,
        adjustments=tuple(filter(None, adjustments)),
    ), content[1]


def take_calls(value: Any, field: str, add_problem: AddProblem) -> tuple[Any, tuple[ToolCall, ...] | None]:
    """The blocks of an answer that are not calls, and the calls: {"type": "tool_call", "value": JSON} of LLaMA-Factory (data/v1_sft_demo.jsonl)."""
    found = [block for block in value if is_call(block)] if isinstance(value, list) else []
    if not found:
        return value, ()
    read = [make_calls(block.get("value"), field, add_problem) for block in found]
    calls = None if None in read else tuple(call for each in read if each for call in each)
    return [block for block in value if not is_call(block)], calls


def is_call(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "tool_call"


def differ(item: Row, first: str, second: str) -> bool:
    """Whether a message has both keys, which are two names of the same, with different values."""
    if item.get(first) is None or item.get(second) is None or item[first] == item[second]:
        return False
    roles = find_role(item[first]), find_role(item[second])
    return first == "value" or None in roles or (roles[0].role, roles[0].is_call) != (roles[1].role, roles[1].is_call)  # type: ignore[union-attr]


def join_calls(turns: Sequence[Turn], add_problem: AddProblem) -> list[Turn] | None:
    """Calls in messages of their own belong to the answer before them (ms-swift, swift/template/base.py): a text and its calls, or several
    calls at once."""
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if last is None or last.role != "assistant" or not turn.calls or turn.content:
            joined.append(turn)
        elif last.in_loss != turn.in_loss:
            add_problem(
                turn.field, f"is a part of the answer {last.field}, but its loss is another one", "give both the same value of loss"
            )
            return None
        else:
            merged: tuple[ToolCall, ...] = (*last.calls, *turn.calls)
            reasoning = "\n".join(filter(None, (last.reasoning, turn.reasoning)))
            joined[-1] = replace(last, calls=merged, reasoning=reasoning, adjustments=(*last.adjustments, *turn.adjustments))
    return joined


def read_content(value: Any, field: str, add_problem: AddProblem) -> Content | None:
    if isinstance(value, str):
        return value, ()
    if not isinstance(value, list):
        add_problem(field, f"is {kind(value)}, not a string", f"write the text, with {MARK} at the position of each image")
        return None
    blocks = [read_block(block, f"{field}[{index}]", add_problem) for index, block in enumerate(value) if not is_reasoning(block)]
    if not all(blocks):
        return None
    return "".join(block[0] for block in blocks if block), tuple(block[1] for block in blocks if block and block[1])


def read_block(block: Any, field: str, add_problem: AddProblem) -> tuple[str, ImageReference | None] | None:
    """(text, None) or (MARK, image)."""
    if isinstance(block, str):
        return block, None
    if not isinstance(block, dict):
        add_problem(field, f"is {kind(block)}, not an object", 'write {"type": "text" or "image", ...}')
        return None
    block = rename_value(block)
    if block.get("type") == "text" or ("type" not in block and "text" in block):
        if not isinstance(block.get("text"), str):
            add_problem(f"{field}.text", f"is {kind(block.get('text'))}, not a string", WRITE_TEXT)
            return None
        return block["text"], None
    given = [key for key in PATH_KEYS if block.get(key) is not None]
    if block.get("type", "image") in IMAGE_TYPES and len(given) <= 1 and (given or "type" in block):
        name = block[given[0]] if given else FROM_IMAGES
        return MARK, ImageReference(name=path_of(name), field=f"{field}.{given[0]}" if given else field)
    add_problem(field, describe_block(block, given), 'a block is {"type": "text", "text": ...} or {"type": "image", "image": PATH}')
    return None


def rename_value(block: Row) -> Row:
    """LLaMA-Factory writes the text and the path of a block under `value` (data/v1_sft_demo.jsonl, data/v1_multimodal_demo.jsonl)."""
    if "value" not in block or block.get("type") not in ("text", *IMAGE_TYPES):
        return block
    key = "text" if block["type"] == "text" else "image"
    return {**{name: item for name, item in block.items() if name != "value"}, key: block.get(key, block["value"])}


def path_of(item: Any) -> Any:
    """OpenAI writes {"url": ...}, ms-swift and the datasets library {"path": ..., "bytes": null}. An object without a path is unchanged, and one with
    bytes, which are kept as a file later (trainer.data.rows.inline_image)."""
    if not isinstance(item, dict) or item.get("bytes"):
        return item
    return next((item[key] for key in PATH_KEYS if isinstance(item.get(key), str)), item)


def describe_block(block: Row, given: list[str]) -> str:
    if len(given) > 1:
        return f"has more than one image path: {' and '.join(given)}"
    if isinstance(block.get("type"), str) and block["type"] not in IMAGE_TYPES:
        return f"has the type {quote(block['type'])}; only text and images are supported"
    return f"has the keys {keys_of(block)}"


def pair(question: Any, answer: Any, fields: tuple[str, str], add_problem: AddProblem) -> tuple[Turn, Turn] | None:
    """A question and its answer, in a format without roles."""
    invalid = [(text, field) for text, field in zip((question, answer), fields, strict=True) if not isinstance(text, str)]
    for text, field in invalid:
        add_problem(field, "is missing" if text is None else f"is {kind(text)}, not a string", WRITE_TEXT)
    if invalid:
        return None
    return Turn(role="user", content=question, field=fields[0]), Turn(role="assistant", content=answer, field=fields[1])


def read_system(row: Row, turns: tuple[Turn, ...] | None, add_problem: AddProblem) -> tuple[Turn, ...] | None:
    """The turns, after the value of the key `system` as a system message, if there is one."""
    text = row.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        add_problem("system", f"is {kind(text)}, not a string", "write the text of the system message")
        return None
    if turns and turns[0].role == "system":
        add_problem("system", f"there is another system message in {turns[0].field}", "keep one of them")
        return None
    return (Turn(role="system", content=text, field="system"), *turns) if turns is not None else None
