"""The routes, the access check, and requests that fail, hang or flood the server. The model is a stub."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.trainer.serving.service import COMPLETIONS, TOKEN, EchoAnswerer, Served, chat_body, data_uri, open_files, png, serve, settled

BEARER = {"Authorization": f"Bearer {TOKEN}"}
ROUTES = [
    *(
        ("GET", path)
        for path in ("/", "/health", "/metrics", "/v1/models", "/v1/models/echo", "/docs", "/openapi.json", "/redoc", "/nowhere")
    ),
    *(("POST", path) for path in (COMPLETIONS, "/v1/completions", "/")),
    *(
        ("OPTIONS", COMPLETIONS),
        ("HEAD", "/"),
        ("DELETE", "/v1/models/echo"),
        ("GET", "//v1/models"),
        ("GET", "/v1/../metrics"),
        ("GET", "/%2e%2e/"),
    ),
]


@pytest.fixture(scope="module")
def served() -> Any:
    with serve(EchoAnswerer(), max_batch=4, max_waiting=8, request_timeout_s=20) as served:
        yield served


def test_an_answer_is_sent_whole_or_streamed(served: Served) -> None:
    whole = served.ask("one two three").json
    assert whole["object"] == "chat.completion" and whole["model"] == "echo" and re.fullmatch(r"chatcmpl-[0-9a-f]{24}", whole["id"])
    assert whole["choices"][0]["message"]["content"] == "one two three" and whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    reply = served.ask("one two three", stream=True, stream_options={"include_usage": True})
    *parts, last, done = reply.parts
    assert reply.headers["content-type"].startswith("text/event-stream") and done == "[DONE]"
    assert "".join(choice["delta"].get("content", "") for part in parts for choice in part["choices"]) == "one two three"
    assert parts[-1]["choices"][0]["finish_reason"] == "stop" and last["choices"] == [] and last["usage"]["total_tokens"] == 6
    assert served.ask("one two three", max_tokens=2).text == "one two"


def test_an_image_is_put_on_a_line_of_its_own_above_the_text(served: Served) -> None:
    assert served.ask("see", image=data_uri(png(40, 20))).text == "<image> see"
    assert served.chat.answerer.looked[-1] == (40, 20)  # type: ignore[union-attr]


def test_models_health_and_metrics(served: Served) -> None:
    assert [model["id"] for model in served.call("GET", "/v1/models").json["data"]] == ["echo"]
    assert served.call("GET", "/v1/models/echo").json["object"] == "model"
    assert served.call("GET", "/v1/models/other").status == 404
    assert served.call("GET", "/health").json == {"status": "open"}
    text = served.call("GET", "/metrics").data.decode()
    for name in (
        "requests_total{outcome=",
        "waiting ",
        "batch_size_bucket",
        "first_token_seconds_sum",
        "request_seconds_count",
        "new_tokens_total",
    ):
        assert f"omnilaunch_{name}" in text


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_requires_the_token(method: str, path: str, guarded: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong-token-of-many"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}):
        reply = guarded.call(method, path, headers=headers)
        assert reply.status == 401 and reply.headers["www-authenticate"].startswith("Bearer")
    assert guarded.call(method, path, headers=BEARER).status != 401


@pytest.fixture(scope="module")
def guarded() -> Any:
    with serve(EchoAnswerer(), token=TOKEN) as guarded:
        yield guarded


def test_without_a_token_a_browser_gets_only_the_page_with_its_token_field(guarded: Served) -> None:
    reply = guarded.call("GET", "/", headers={"Accept": "text/html,*/*"})
    assert reply.status == 401 and b'data-token="yes"' in reply.data and b"echo" not in reply.data
    assert guarded.call("GET", "/metrics", headers={"Accept": "text/html"}).json["error"]["code"] == "invalid_api_key"
    assert guarded.ask(headers=BEARER).text == "one two"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::2]", "127.0.0.2", "a@localhost"]
)
def test_other_host_headers_are_refused(host: str, served: Served) -> None:
    assert served.call("GET", "/health", headers={"Host": host}).json["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost", "http://localhost:1"])
def test_pages_of_other_origins_are_refused(origin: str, served: Served) -> None:
    reply = served.ask(headers={"Origin": origin})
    assert reply.status == 403 and not [name for name in reply.headers if name.lower().startswith("access-control")]
    assert served.ask(headers={"Origin": f"http://127.0.0.1:{served.port}"}).status == 200


def test_there_are_no_other_routes(served: Served) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/v1/completions", "/v1/models/", "/metrics/"):
        reply = served.call("GET", path)
        assert reply.status == 404 and reply.error["type"] == "invalid_request_error"
    assert served.call("GET", COMPLETIONS).status == 405
    assert "server" not in {name.lower() for name in served.call("GET", "/health").headers}


def test_waiting_requests_are_batched() -> None:
    echo = EchoAnswerer(pause_s=0.02)
    with serve(echo, max_batch=8, wait_ms=50) as served, ThreadPoolExecutor(24) as clients:
        texts = [f"question {number} of many" for number in range(24)]
        assert [reply.text for reply in clients.map(served.ask, texts)] == texts
        assert max(echo.sizes) == 8 and len(echo.sizes) <= 8
        assert served.metrics.count("answered") == 24


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    with serve(EchoAnswerer(pause_s=0.02), max_batch=2, wait_ms=200) as served, ThreadPoolExecutor(2) as clients:
        long = clients.submit(served.ask, "word " * 100)
        began = time.monotonic()
        assert served.ask("short").text == "short" and time.monotonic() - began < 1.5
        assert not long.done() and len(long.result().text.split()) == 100


def test_a_request_that_fails_the_batch_gets_the_only_error(capfd: pytest.CaptureFixture[str]) -> None:
    echo = EchoAnswerer(pause_s=0.01)
    with serve(echo, max_batch=8, wait_ms=200) as served, ThreadPoolExecutor(8) as clients:
        texts = [*(f"number {place}" for place in range(7)), "please die now"]
        replies = dict(zip(texts, clients.map(lambda text: served.ask(text, stream=text == "number 3"), texts), strict=True))
        assert [replies[text].text for text in texts if text not in ("please die now", "number 3")] == [
            t for t in texts[:7] if t != "number 3"
        ]
        assert (
            "".join(choice["delta"].get("content", "") for part in replies["number 3"].parts[:-1] for choice in part["choices"])
            == "number 3"
        )
        assert replies["please die now"].status == 500 and "died" not in replies["please die now"].data.decode()
        assert 8 in echo.sizes and served.metrics.count("failed") == 1
    assert "the model died of this" in capfd.readouterr().err


def test_a_request_that_hangs_gets_a_timeout() -> None:
    with serve(EchoAnswerer(), request_timeout_s=1.0) as served:
        reply = served.ask("hang on")
        assert reply.status == 504 and reply.error["code"] == "timeout"
        assert served.ask("next").text == "next"


def send_raw(served: Served, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(data)
    return sock


def request_head(length: int) -> bytes:
    return f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_client_that_disconnects_frees_its_row() -> None:
    with serve(EchoAnswerer(), max_batch=1, request_timeout_s=60) as served:
        for stream in (False, True):
            body = json.dumps(chat_body("hang here", stream=stream)).encode()
            sock = send_raw(served, request_head(len(body)) + body)
            assert settled(lambda: 1 - served.admission.in_flight, 0) == 0
            time.sleep(0.2)  # until it is in a batch
            sock.close()
            assert served.ask("next").text == "next"
        assert settled(lambda: served.admission.in_flight, 0) == 0
        assert served.metrics.count("gone") == 2


def test_requests_beyond_the_queue_limit_get_429_with_retry_after() -> None:
    with serve(EchoAnswerer(pause_s=0.05), max_batch=1, max_waiting=3, request_timeout_s=30) as served, ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda _: served.ask("a b c d e f"), range(12)))
        turned = [reply for reply in replies if reply.status == 429]
        assert turned and all(reply.headers["retry-after"] == "1" and reply.error["type"] == "rate_limit_error" for reply in turned)
        assert len(turned) + sum(reply.status == 200 for reply in replies) == 12


def test_incomplete_requests_do_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.body.BODY_TIMEOUT_S", 1.0)
    monkeypatch.setattr("trainer.serving.listener.IDLE_TIMEOUT_S", 1.5)
    with serve(EchoAnswerer(), max_batch=2, max_waiting=4) as served:
        before, threads = open_files(), threading.active_count()
        bodies = [send_raw(served, request_head(1000) + b'{"model": ') for _ in range(30)]
        heads = [send_raw(served, b"POST /v1/chat/comple") for _ in range(30)]
        silent = [send_raw(served, b"") for _ in range(30)]
        unread = [send_raw(served, request_head(10**11) + b"x" * 1000) for _ in range(10)]
        assert served.ask("in between").text == "in between"
        for sock in bodies:
            assert b"408" in sock.recv(1000)
        for sock in unread:
            assert b" 413 " in sock.recv(1000)
        for sock in (*bodies, *heads, *silent, *unread):
            while sock.recv(1000):  # until the server closes it
                continue
            sock.close()
        assert settled(open_files, before) <= before and settled(threading.active_count, threads + 4) <= threads + 4
        assert served.ask("after").text == "after"


def test_a_client_that_does_not_read_its_answer_is_disconnected() -> None:
    with serve(EchoAnswerer(), max_batch=2, answer_s=2.0) as served:
        body = json.dumps(chat_body("flood " * 30, stream=True)).encode()
        with send_raw(served, request_head(len(body)) + body):
            time.sleep(0.5)
            assert served.admission.in_flight == 1 and served.ask("in between").text == "in between"
            assert settled(lambda: served.admission.in_flight, 0) == 0


def test_invalid_requests_leave_no_open_files(served: Served) -> None:
    before = settled(open_files, 0, 1)
    for place in range(200):
        junk = [b"\x00" * 50 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"][
            place % 4
        ]
        try:
            sock = send_raw(served, junk)
            sock.close()
        except OSError:  # the server closed it during the write
            continue
    assert served.ask("after").text == "after"
    assert settled(open_files, before) <= before


# -------------------------------------------------------------------------------------------------------------- loading, draining


def test_requests_are_refused_while_the_model_loads() -> None:
    with serve(EchoAnswerer(), ready=False) as served:
        assert served.call("GET", "/health").status == 503 and served.call("GET", "/health").json == {"status": "loading"}
        reply = served.ask()
        assert reply.status == 503 and reply.error["code"] == "loading" and reply.headers["retry-after"] == "5"
        assert served.call("GET", "/v1/models").status == 200


def test_accepted_requests_are_answered_before_the_server_stops() -> None:
    with serve(EchoAnswerer(pause_s=0.05), max_batch=2, drain_timeout_s=30) as served, ThreadPoolExecutor(8) as clients:
        texts = [f"number {place} a b c d" for place in range(8)]
        asked = [clients.submit(served.ask, text, stream=place % 2 == 0) for place, text in enumerate(texts)]
        slow = send_raw(served, request_head(len(body := json.dumps(chat_body("slow body")).encode())) + body[:10])
        assert settled(lambda: 9 - served.admission.in_flight, 0) == 0
        served.flag.up = True
        late = served.ask("too late")
        assert late.status == 503 and late.error["code"] == "stopping" and served.call("GET", "/health").json == {"status": "draining"}
        slow.sendall(body[10:])
        with slow, slow.makefile("rb") as file:
            assert any(b"slow body" in line for line in file)
        for place, (text, reply) in enumerate(zip(texts, asked, strict=True)):
            found = reply.result()
            parts = () if place % 2 else found.parts[:-1]
            assert text == (found.text if place % 2 else "".join(c["delta"].get("content", "") for part in parts for c in part["choices"]))


def test_requests_beyond_the_drain_timeout_get_503() -> None:
    with serve(EchoAnswerer(), drain_timeout_s=0.5, request_timeout_s=60) as served, ThreadPoolExecutor(2) as clients:
        asked = clients.submit(served.ask, "hang on")
        assert settled(lambda: 1 - served.admission.in_flight, 0) == 0
        time.sleep(0.1)
        served.flag.up = True
        reply = asked.result()
        assert reply.status == 503 and reply.error["code"] == "stopping"
