"""A request for a chat completion: every key read, or refused by its name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.contract import Sampling
from trainer.data.rows.parsed_row import KINDS, MARK, Role
from trainer.data.rows.sample import Message
from trainer.serving.refusal import RequestRefused, wrong

MOST_MESSAGES = 64
MOST_STOPS = 4  # as OpenAI allows
MOST_STOP_CHARACTERS = 200
MOST_TEMPERATURE = 2.0
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SURROGATE = re.compile("[\ud800-\udfff]")

# Keys of OpenAI's that nothing here carries out, and the values under which they ask for nothing.
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
LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key"})  # texts by which a client names itself to a provider


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """`pictures`: where the images lie, each for one MARK of the messages."""

    messages: tuple[Message, ...]
    pictures: tuple[str, ...]
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # at the end of a stream


def read_request(body: Mapping[str, Any], name: str, sampling: Sampling, most_images: int, most_characters: int) -> ChatRequest:
    """`name`: of the model; `sampling`: what counts where nothing is said. Raises RequestRefused that names the key."""
    given = {key: value for key, value in body.items() if value is not None}
    refuse_unread(given)
    model = read_text(given.get("model"), "model")
    if model != name:
        raise RequestRefused(
            404, f"model: there is no {model[:100]!r} here; this server has {name!r}", param="model", code="model_not_found"
        )
    messages, pictures = read_messages(given.get("messages"), most_images, most_characters)
    stream = read_flag(given, "stream")
    options = given.get("stream_options", {})
    if options and (not stream or not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}):
        raise wrong("stream_options", "it goes with stream=true, and has include_usage alone")
    return ChatRequest(
        messages=messages,
        pictures=pictures,
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
        shown = printable(key)[:100]
        if key in LABELS:
            read_text(given[key], key)
        elif key not in WITHOUT_EFFECT:
            raise wrong(shown, f"unknown; known are {', '.join(sorted(READ))}", "unknown_parameter")
        elif not any(type(given[key]) is type(value) and given[key] == value for value in WITHOUT_EFFECT[key]):
            values = " or ".join(map(repr, WITHOUT_EFFECT[key][:1]))
            raise wrong(shown, f"not supported here but as {values}: leave it out", "unsupported_parameter")


def read_sampling(given: Mapping[str, Any], default: Sampling) -> Sampling:
    """OpenAI has two names for the most new tokens."""
    both = [read_number(given, key, int, 1, default.max_new_tokens) for key in ("max_tokens", "max_completion_tokens")]
    most = {value for value in both if value is not None}
    if len(most) > 1:
        raise wrong("max_tokens", "max_completion_tokens says another number: give one of them")
    temperature = read_number(given, "temperature", float, 0.0, MOST_TEMPERATURE)
    top_p = read_number(given, "top_p", float, 0.0, 1.0)
    top_k = read_number(given, "top_k", int, 0, 2**31 - 1)
    if top_p == 0.0:
        raise wrong("top_p", "0 leaves no token: give more than 0; the likeliest token each time is temperature=0")
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
        raise wrong("stop", f"give a text, or a list of up to {MOST_STOPS}")
    found = tuple(read_text(stop, f"stop[{place}]") for place, stop in enumerate(stops))
    if any(not stop or len(stop) > MOST_STOP_CHARACTERS for stop in found):
        raise wrong("stop", f"each has 1 to {MOST_STOP_CHARACTERS} characters")
    return found


# ---------------------------------------------------------------------------------------------------------------- messages


def read_messages(value: Any, most_images: int, most_characters: int) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise wrong("messages", f"give a list of 1 to {MOST_MESSAGES} messages")
    pictures: list[str] = []
    messages = tuple(read_message(item, f"messages[{place}]", pictures) for place, item in enumerate(value))
    if len(pictures) > most_images:
        raise wrong("messages", f"{len(pictures)} images; one request may have {most_images}")
    if sum(len(message.content) for message in messages) > most_characters:
        raise wrong(
            "messages", f"more than {most_characters} characters, which the model's context does not hold", "context_length_exceeded"
        )
    refuse_order([message.role for message in messages])
    return messages, tuple(pictures)


def refuse_order(roles: list[Role]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or turns != expected[: len(turns)] or turns[-1] != "user":
        raise wrong("messages", "the order is: a system message, if any, then user and assistant in turn, and the user last")


def read_message(item: Any, field: str, pictures: list[str]) -> Message:
    if not isinstance(item, dict):
        raise wrong(field, f"is {kind(item)}, not a message")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{field}.role", f"can be {', '.join(ROLES)}")
    more = {key for key, value in item.items() if value is not None} - {"role", "content", "name"}
    if more:
        raise wrong(
            field,
            f"has the keys {', '.join(sorted(map(repr, map(printable, more))))[:200]}; role and content are read",
            "unknown_parameter",
        )
    content = read_content(item.get("content"), f"{field}.content", pictures if role == "user" else None)
    if not content or content.isspace():
        raise wrong(f"{field}.content", "is empty")
    return Message(role=ROLES[role], content=content)


def read_content(value: Any, field: str, pictures: list[str] | None) -> str:
    """Its text with a MARK for each image; `pictures`: takes the images, None where none may stand."""
    if isinstance(value, str):
        return read_words(value, field)
    if not isinstance(value, list):
        raise wrong(field, f"is {kind(value)}, neither text nor a list of parts")
    text = ""
    for place, part in enumerate(value):
        found = read_part(part, f"{field}[{place}]", pictures)
        # As the rows of a training set have it, and so what the model has learned: the image on a line of its own above the question.
        text += "\n" + found if text.endswith(MARK) and found != MARK and not found[:1].isspace() else found
    return text


def read_part(part: Any, field: str, pictures: list[str] | None) -> str:
    if not isinstance(part, dict):
        raise wrong(field, f"is {kind(part)}, not a part of a message")
    if part.get("type") == "text":
        return read_words(part.get("text"), f"{field}.text")
    if part.get("type") != "image_url":
        raise wrong(f"{field}.type", "can be text or image_url")
    if pictures is None:
        raise wrong(field, "only a message of the user may hold images")
    shown = part.get("image_url")
    if not isinstance(shown, dict):
        raise wrong(f"{field}.image_url", 'give {"url": "data:image/png;base64,..."}')
    if shown.get("detail") not in (None, "auto"):
        raise wrong(f"{field}.image_url.detail", "an image is read as the model's processor does: leave it out", "unsupported_parameter")
    if unread := set(shown) - {"url", "detail"}:
        raise wrong(f"{field}.image_url", f"has {len(unread)} keys besides url", "unknown_parameter")
    pictures.append(read_text(shown.get("url"), f"{field}.image_url.url"))
    return MARK


def read_words(value: Any, field: str) -> str:
    text = read_text(value, field)
    if MARK in text:
        raise wrong(field, f"holds {MARK}, which stands for an image here: reword it, and give images as parts of their own")
    return text


# ------------------------------------------------------------------------------------------------------------------- values


def read_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise wrong(field, f"is {kind(value)}, not a text" if value is not None else "is missing")
    if SURROGATE.search(value):
        raise wrong(field, "holds half of a surrogate pair, which is no character")
    return value


def read_flag(given: Mapping[str, Any], key: str, prefix: str = "") -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(prefix + key, f"is {kind(value)}, not true or false")
    return bool(value)


def read_number(given: Mapping[str, Any], key: str, number: Callable[[Any], Any], least: float, most: float) -> Any:
    """None where it is not given."""
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if number is int else (int, float)) or not least <= value <= most:
        raise wrong(key, f"can be a{' whole' if number is int else ''} number from {least} to {most}")
    return number(value)


def kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
