"""What a value of the config must be, for one that is something else."""

import json
import typing
from typing import Any, Literal

from launcher.config.written import offer_number, quote
from launcher.errors import suggest

SOUND = "audio and speech parts are never trained: the data has no sound, so that no gradient would reach them"
REASONS = dict.fromkeys(("audio", "speech", "apm", "tts"), SOUND)  # of values that users may try

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text; put it in quotes", tuple: "a list"}


def describe_expected(kind: Any, data: Any, key: str) -> str:
    """`"abc" is not allowed; it must be a number`, for a value of another type than `kind`. A whole number in another form is offered as
    it is taken."""
    given, origin = json.dumps(data), typing.get_origin(kind)
    if origin is Literal:
        reason = f" ({REASONS[data]})" if isinstance(data, str) and data in REASONS else ""
        return f"{given} is not allowed{reason}; {suggest(str(data), map(str, typing.get_args(kind)))}"
    if origin is dict and isinstance(data, dict):
        inner = typing.get_args(kind)[1]
        return f"{given} is not allowed; every value must be {EXPECTED.get(inner, inner)}"
    number = f"; {offer}" if kind is int and (offer := offer_number(key, data)) else ""
    if origin is tuple and isinstance(data, str | int | float):
        number = f"; write {quote(f'{key}=[{data}]')}"
    return f"{given} is not allowed; it must be {EXPECTED.get(origin or kind, 'a section')}{number}"
