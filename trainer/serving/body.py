"""A request's body: bounded while it comes in, before it is parsed, and while it is."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request

from trainer.serving.budget import Lease
from trainer.serving.refusal import RequestRefused

BODY_TIMEOUT_S = 30.0  # for all of it to come in
MOST_MARKS = 200_000  # of JSON's structure, those inside of strings counted in: a body of 32 MB could be 16 million lists, a GB of memory
MOST_DEPTH = 16


async def read_body(request: Request, most: int, lease: Lease) -> bytes:
    """Raises RequestRefused for what is no JSON by its headers, more than `most` bytes, or does not come in time."""
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestRefused(415, "the body must be JSON: send it with Content-Type: application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestRefused(415, "a compressed body is not read: send it without Content-Encoding", code="unsupported_media_type")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:  # h11 has refused one that is no number
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                lease.take(len(piece))
                body += piece
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise RequestRefused(408, f"the body did not come in whole within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    return bytes(body)


def too_large(most: int) -> RequestRefused:
    return RequestRefused(413, f"the body is larger than {most} bytes: send fewer or smaller images", code="too_large")


def parse_body(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises RequestRefused."""
    if sum(map(body.count, (b"[", b"{", b",", b":"))) > MOST_MARKS:
        raise RequestRefused(400, f"the body has more than {MOST_MARKS} brackets, commas and colons", code="too_many_values")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:  # no UTF-8, no JSON, a number of more than 4,300 digits
        raise RequestRefused(400, f"the body is not JSON: {type(error).__name__} {where(error)}".strip(), code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestRefused(400, "the body is not a JSON object", code="invalid_json")
    refuse_deep(value)
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that stands twice: which of them would count?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"at character {error.pos}: {error.msg}"
    return "" if isinstance(error, UnicodeError) else str(error)


def refuse_deep(value: Any) -> None:
    level: Iterable[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [
            item for found in level for item in (found.values() if isinstance(found, dict) else found if isinstance(found, list) else ())
        ]
        if not level:
            return
    raise too_deep()


def too_deep() -> RequestRefused:
    return RequestRefused(400, f"the body has values more than {MOST_DEPTH} levels deep", code="too_deep")
