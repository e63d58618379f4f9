"""A thousand malformed bodies. None stops the server, leaks a resource, or is answered with status 500."""

import json
import random
import threading
from typing import Any

from tests.trainer.serving.service import EchoAnswerer, chat_body, data_uri, open_files, png, resident_bytes, serve, settled

BODIES = 1000
MIB = 2**20
STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**70),
        10**300,
        0.5,
        1e308,
        -0.0,
        "",
        " ",
        "a",
        "\x00",
        "\ud800",
        "\udfff" * 3,
        "é" * 50,
    ),
    *("<image>", "</s>", "data:", "data:image/png;base64,", "file:///etc/passwd", "http://127.0.0.1/", "\u202e", "𝕏" * 20, "x" * 5000),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        {"a": None},
        {"": ""},
        {"type": "text"},
        {"url": "x"},
        {"role": "user"},
        [1, "a", None],
        {"__proto__": {}},
    ),
)


def mutate(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """A copy with some values replaced."""
    if draw.random() < 0.15 + 0.1 * depth:
        return draw.choice(STRANGE)
    if isinstance(value, dict) and value:
        found = {key: mutate(item, draw, depth + 1) if draw.random() < 0.4 else item for key, item in value.items()}
        if draw.random() < 0.2:
            found.pop(draw.choice(list(found)))
        if draw.random() < 0.3:
            found[draw.choice(("model", "stop", "seed", "n", "max_tokens", "temperature", "tools", "user", "x", "\ud800", "stream"))] = (
                draw.choice(STRANGE)
            )
        return found
    if isinstance(value, list) and value:
        return [mutate(item, draw, depth + 1) for item in value] * draw.choice((0, 1, 1, 1, 2, 3))
    return draw.choice(STRANGE)


def corrupt(body: bytes, draw: random.Random) -> bytes:
    """Insert, delete and truncate bytes."""
    corrupted = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(corrupted) + 1)
        how = draw.randrange(4)
        if how == 0:
            corrupted[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 20)))
        elif how == 1:
            del corrupted[place : place + draw.randint(1, 20)]
        elif how == 2:
            corrupted[place:place] = draw.choice(
                (b"[", b"{", b'"', b"\\u", b"\\", b",", b"\x00", b"\xff", b"[[[[", b"1e999", b"NaN")
            ) * draw.randint(1, 30)
        else:
            corrupted = corrupted[:place]
    return bytes(corrupted)


def make_body(draw: random.Random) -> bytes:
    image = data_uri(png(16, 16)) if draw.random() < 0.5 else ""
    good = chat_body("some words", image=image, stream=draw.random() < 0.5, max_tokens=3, temperature=0.5, stop=["x"], seed=1)
    body = json.dumps(mutate(good, draw)).encode()
    return corrupt(body, draw) if draw.random() < 0.5 else body


def test_malformed_bodies() -> None:
    draw = random.Random(9)
    with serve(EchoAnswerer(), max_batch=4, request_timeout_s=30) as served:
        for _ in range(4):
            served.ask("warm")
        files, threads, memory = open_files(), threading.active_count(), resident_bytes()
        seen: dict[int, int] = {}
        for place in range(BODIES):
            body = make_body(draw)
            reply = served.post(body)
            seen[reply.status] = seen.get(reply.status, 0) + 1
            assert reply.status in (200, 400, 404), (reply.status, reply.data, body[:500])
            if reply.status != 200:
                assert set(reply.error) == {"message", "type", "param", "code"} and "Traceback" not in reply.error["message"]
            if place % 50 == 0:
                assert served.ask("in between").text == "in between"
        assert seen[400] > BODIES / 2 and seen.get(200, 0) > 5, seen
        assert served.ask("after").text == "after" and served.metrics.count("failed") == 0
        assert settled(open_files, files + 1) <= files + 1 and threading.active_count() <= threads + 4
        assert (
            resident_bytes() - memory < 512 * MIB
            and served.chat.budget.reserved == 0
            and settled(lambda: served.admission.in_flight, 0) == 0
        )
