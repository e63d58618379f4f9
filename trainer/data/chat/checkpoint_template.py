"""The checkpoint's own chat template: conversations handed to it as users of transformers do, and what it can express."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.data.chat.sandbox import TemplateRefused, render
from trainer.data.chat.saved_template import DEFAULT, TOOL_USE
from trainer.data.rows.sample import MARK, Message

THINKING = "enable_thinking"  # Qwen3, Qwen3.5 and others: whether the model thinks before its answer


@dataclass(frozen=True, kw_only=True)
class CheckpointTemplate:
    """`texts`: name -> Jinja. `special`: names of the tokenizer's special tokens -> their text. `mark`: what stands for an image in a text, and
    `image_token` the token in it.

    What trainer.data.chat.probe has found out: `parts`: the roles whose content is handed over as a list of parts, also without an image; `images`:
    whether a question with images is. `after_image`: what the template writes behind each image. `openings`: what it writes before an answer, the
    longest first. `end_mark`: after it. `end_added`: whether the template writes none, so that `end_mark` is put behind each answer. `default`: what it
    writes where there is no system message, after `lead` (the start of each text). `renders`: which of system, tools, calls, tool and reasoning it
    writes. `thinking_off`: whether it is asked with THINKING=false where an answer has no reasoning. `marked`: it has `{% generation %}`."""

    texts: Mapping[str, str]
    special: Mapping[str, str]
    mark: str
    image_token: str
    path: str = ""
    parts: frozenset[str] = frozenset()
    images: bool = True
    after_image: str = ""
    openings: tuple[str, ...] = ()
    end_mark: str = ""
    end_added: bool = False
    lead: str = ""
    default: str = ""
    renders: frozenset[str] = frozenset()
    thinking_off: bool = False
    marked: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def write(
    template: CheckpointTemplate,
    messages: Sequence[Message],
    tools: Sequence[str] = (),
    *,
    prompt: bool = False,
    marks: bool = False,
    thinks: bool = False,
) -> str:
    """The text of a conversation, in which each image is one `image_token`. `prompt`: up to where the next answer begins; `thinks`: one with reasoning.
    `marks`: as of `render`. Raises TemplateRefused."""
    none = bool(messages) and messages[0].role == "system" and not messages[0].content
    values: dict[str, Any] = {
        **template.special,
        **template.extra,
        "messages": [as_dict(template, message) for message in messages[none:]],
        "tools": [as_tool(tool) for tool in tools] or None,
        "documents": None,
        "add_generation_prompt": prompt,
    }
    if template.thinking_off and not thinks:
        values[THINKING] = False
    source = template.texts.get(TOOL_USE, template.texts[DEFAULT]) if tools else template.texts[DEFAULT]
    text = render(source, values, marks=marks)
    if none:
        text = without_default(template, text)
    return text.replace(template.mark, template.image_token) if template.mark != template.image_token else text


def without_default(template: CheckpointTemplate, text: str) -> str:
    """Without what the template writes where there is no system message."""
    start = template.lead + template.default
    if not text.startswith(start):
        raise TemplateRefused("writes its own system text in a way that data.system=none cannot leave out")
    return template.lead + text[len(start) :]


def as_dict(template: CheckpointTemplate, message: Message) -> dict[str, Any]:
    """In OpenAI's form, with the arguments of a call as an object (transformers, docs/source/en/chat_extras.md)."""
    found: dict[str, Any] = {"role": message.role, "content": as_content(template, message)}
    if message.reasoning:
        # transformers hands it over under both names: gpt-oss reads the second.
        found |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": parse(call.arguments, call.name)}} for call in message.calls
        ]
    return found


def as_content(template: CheckpointTemplate, message: Message) -> str | list[dict[str, str]]:
    has_images = message.role == "user" and MARK in message.content
    if not (message.role in template.parts or (has_images and template.images)):
        return message.content.replace(MARK, template.mark) if message.role == "user" else message.content
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message.content.split(MARK) if has_images else [message.content]):
        if number:
            parts.append({"type": "image"})
            text = text.removeprefix(template.after_image)  # which the template writes itself
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def as_tool(tool: str) -> Any:
    found = parse(tool, "a tool")
    return {"type": "function", "function": found} if isinstance(found, dict) and "name" in found and "function" not in found else found


def parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TemplateRefused(f"cannot write {what}: what the row has of it is not JSON") from error


def shared_start(one: str, two: str) -> str:
    """The longest text that both begin with."""
    same = next((place for place, (left, right) in enumerate(zip(one, two, strict=False)) if left != right), min(len(one), len(two)))
    return one[:same]
