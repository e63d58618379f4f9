"""Read and parse the body of a request, with limits on size, time, number of values and nesting."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request

from trainer.serving.byte_budget import Reservation
from trainer.serving.refusal import RequestRefused

BODY_TIMEOUT_S = 30.0  # for the whole body to arrive
MOST_DELIMITERS = 200_000  # brackets, commas and colons, also those in strings: 32 MB of JSON could be 16 million lists, 1 GB of memory
MOST_DEPTH = 16


async def read_body(request: Request, most: int, reservation: Reservation) -> bytes:
    """Raises RequestRefused for a content type other than JSON, for more than `most` bytes, and after BODY_TIMEOUT_S."""
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestRefused(415, "the body must be JSON: send the header Content-Type: application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestRefused(415, "a compressed body is not supported: send it without Content-Encoding", code="unsupported_media_type")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:  # h11 already refused a value that is not a number
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                reservation.reserve(len(piece))
                body += piece
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise RequestRefused(408, f"the whole body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    return bytes(body)


def too_large(most: int) -> RequestRefused:
    return RequestRefused(413, f"the body has more than {most} bytes: send fewer or smaller images", code="too_large")


def parse_body(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises RequestRefused."""
    if sum(map(body.count, (b"[", b"{", b",", b":"))) > MOST_DELIMITERS:
        raise RequestRefused(400, f"the body has more than {MOST_DELIMITERS} brackets, commas and colons", code="too_many_values")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of more than 4,300 digits
        raise RequestRefused(400, f"the body is not JSON: {type(error).__name__} {where(error)}".strip(), code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestRefused(400, "the body is not a JSON object", code="invalid_json")
    refuse_deep(value)
    return value


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that occurs twice in one object: it is not defined which of them counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


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
    return RequestRefused(400, f"the body is nested more than {MOST_DEPTH} levels deep", code="too_deep")
