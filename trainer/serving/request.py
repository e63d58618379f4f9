"""Read the JSON of a chat completion request. Every key is either used or refused by its name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.contract import LINE_FEED, ImageForm, Sampling
from trainer.data.rows.image_form import as_trained
from trainer.data.rows.parsed_row import MARK, Role, ends_with_question, kind, printable, shorten
from trainer.data.rows.sample import Message
from trainer.serving.refusal import RequestRefused, invalid

MOST_MESSAGES = 64
MOST_STOPS = 4  # as OpenAI allows
MOST_STOP_CHARACTERS = 200
MOST_TEMPERATURE = 2.0
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SURROGATE = re.compile("[\ud800-\udfff]")

# Keys of OpenAI's API that are not implemented, and the values that request nothing and are therefore accepted.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key"})  # strings that identify the client to a provider; ignored


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """`images`: their URLs, one for each MARK of the messages."""

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # send the token counts at the end of a stream


def read_request(
    body: Mapping[str, Any], name: str, sampling: Sampling, most_images: int, most_characters: int, form: ImageForm = LINE_FEED
) -> ChatRequest:
    """`name`: of the model; `sampling`: the defaults; `form`: of images in its training rows. Raises RequestRefused with the name of the key."""
    given = {key: value for key, value in body.items() if value is not None}
    refuse_unread(given)
    model = read_text(given.get("model"), "model")
    if model != name:
        raise RequestRefused(404, f"model: {model[:100]!r} does not exist; this server has {name!r}", param="model", code="model_not_found")
    messages, images = read_messages(given.get("messages"), most_images, most_characters, form)
    stream = read_flag(given, "stream")
    options = given.get("stream_options", {})
    if options and (not stream or not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}):
        raise invalid("stream_options", "is allowed only with stream=true, and has the one key include_usage")
    return ChatRequest(
        messages=messages,
        images=images,
        sampling=read_sampling(given, sampling),
        seed=read_number(given, "seed", int, -(2**63), 2**63 - 1),
        stop=read_stop(given.get("stop")),
        stream=stream,
        usage=bool(options) and read_flag(options, "include_usage", "stream_options."),
    )


READ = frozenset({"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"})
READ |= {"seed", "stop"}


def refuse_unread(given: Mapping[str, Any]) -> None:
    for key in given.keys() - READ:
        shown = shorten(printable(key), 100)
        if key in LABELS:
            read_text(given[key], key)
        elif key not in WITHOUT_EFFECT:
            raise invalid(shown, f"unknown key; known keys are {', '.join(sorted(READ))}", "unknown_parameter")
        elif not any(type(given[key]) is type(value) and given[key] == value for value in WITHOUT_EFFECT[key]):
            raise invalid(shown, f"only {WITHOUT_EFFECT[key][0]!r} is supported: leave the key out", "unsupported_parameter")


def read_sampling(given: Mapping[str, Any], default: Sampling) -> Sampling:
    """OpenAI's API has two names for the maximum number of new tokens."""
    both = [read_number(given, key, int, 1, default.max_new_tokens) for key in ("max_tokens", "max_completion_tokens")]
    most = {value for value in both if value is not None}
    if len(most) > 1:
        raise invalid("max_tokens", "differs from max_completion_tokens: give one of them")
    temperature = read_number(given, "temperature", float, 0.0, MOST_TEMPERATURE)
    top_p = read_number(given, "top_p", float, 0.0, 1.0)
    top_k = read_number(given, "top_k", int, 0, 2**31 - 1)
    if top_p == 0.0:
        raise invalid("top_p", "must be more than 0; for the most likely token each time, set temperature=0")
    return replace(
        default,
        max_new_tokens=most.pop() if most else default.max_new_tokens,
        temperature=default.temperature if temperature is None else temperature,
        top_p=default.top_p if top_p is None else top_p,
        top_k=default.top_k if top_k is None else top_k,
    )


def read_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise invalid("stop", f"must be a string or a list of at most {MOST_STOPS} strings")
    found = tuple(read_text(stop, f"stop[{place}]") for place, stop in enumerate(stops))
    if any(not stop or len(stop) > MOST_STOP_CHARACTERS for stop in found):
        raise invalid("stop", f"each string must have 1 to {MOST_STOP_CHARACTERS} characters")
    return found


# ---------------------------------------------------------------------------------------------------------------- messages


def read_messages(value: Any, most_images: int, most_characters: int, form: ImageForm) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise invalid("messages", f"must be a list of 1 to {MOST_MESSAGES} messages")
    images: list[str] = []
    messages = tuple(read_message(item, f"messages[{number}]", images, form) for number, item in enumerate(value))
    if len(images) > most_images:
        raise invalid("messages", f"{len(images)} images; at most {most_images} are allowed in a request")
    if sum(len(message.content) for message in messages) > most_characters:
        raise invalid("messages", f"more than {most_characters} characters do not fit into the model's context", "context_length_exceeded")
    if not ends_with_question([message.role for message in messages]):
        raise invalid("messages", "wrong order of roles: an optional system message, then user and assistant alternately, ending with user")
    return messages, tuple(images)


def read_message(item: Any, field: str, images: list[str], form: ImageForm) -> Message:
    if not isinstance(item, dict):
        raise invalid(field, f"is {kind(item)}, not a message")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{field}.role", f"must be one of {', '.join(ROLES)}")
    more = {key for key, value in item.items() if value is not None} - {"role", "content", "name"}
    if more:
        raise invalid(
            field,
            f"has the keys {', '.join(sorted(map(repr, map(printable, more))))[:200]}; only role and content are supported",
            "unknown_parameter",
        )
    content = read_content(item.get("content"), f"{field}.content", images if role == "user" else None, form)
    if not content or content.isspace():
        raise invalid(f"{field}.content", "is empty")
    return Message(role=ROLES[role], content=content)


def read_content(value: Any, field: str, images: list[str] | None, form: ImageForm) -> str:
    """The text with a MARK for each image, in the form of the training rows where these are known. URLs are appended to
    `images`, which is None where images are not allowed."""
    if isinstance(value, str):
        return read_words(value, field)
    if not isinstance(value, list):
        raise invalid(field, f"is {kind(value)}; must be a string or a list of parts")
    text = ""
    for number, part in enumerate(value):
        found = read_part(part, f"{field}[{number}]", images)
        text += form.separator + found if text.endswith(MARK) and found != MARK and not found[:1].isspace() else found
    return as_trained(text, form)


def read_part(part: Any, field: str, images: list[str] | None) -> str:
    if not isinstance(part, dict):
        raise invalid(field, f"is {kind(part)}, not a part of a message")
    if part.get("type") == "text":
        return read_words(part.get("text"), f"{field}.text")
    if part.get("type") != "image_url":
        raise invalid(f"{field}.type", "must be text or image_url")
    if images is None:
        raise invalid(field, "only user messages may contain images")
    image = part.get("image_url")
    if not isinstance(image, dict):
        raise invalid(f"{field}.image_url", 'must be an object {"url": "data:image/png;base64,..."}')
    if image.get("detail") not in (None, "auto"):
        raise invalid(f"{field}.image_url.detail", "only 'auto' is supported: leave the key out", "unsupported_parameter")
    if unread := set(image) - {"url", "detail"}:
        raise invalid(f"{field}.image_url", f"has {len(unread)} unknown keys; only url is supported", "unknown_parameter")
    images.append(read_text(image.get("url"), f"{field}.image_url.url"))
    return MARK


def read_words(value: Any, field: str) -> str:
    text = read_text(value, field)
    if MARK in text:
        raise invalid(field, f"contains {MARK}, which marks an image: reword the text, and send images as parts of type image_url")
    return text


# ------------------------------------------------------------------------------------------------------------------- values


def read_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise invalid(field, f"is {kind(value)}, not a string" if value is not None else "is missing")
    if SURROGATE.search(value):
        raise invalid(field, "contains half of a surrogate pair, which is not a character")
    return value


def read_flag(given: Mapping[str, Any], key: str, prefix: str = "") -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(prefix + key, f"is {kind(value)}, not true or false")
    return bool(value)


def read_number(given: Mapping[str, Any], key: str, number: Callable[[Any], Any], least: float, most: float) -> Any:
    """None when the key is missing."""
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if number is int else (int, float)) or not least <= value <= most:
        raise invalid(key, f"must be {'an integer' if number is int else 'a number'} from {least} to {most}")
    return number(value)
