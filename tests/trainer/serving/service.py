"""A server in this process, by default with a stub in place of the model."""

import base64
import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from trainer.contract import Serving
from trainer.data.batch.collate import Features
from trainer.generation.question import Answer, Question
from trainer.serving.admission import Admission
from trainer.serving.app import make_app
from trainer.serving.chat import ChatHandler
from trainer.serving.endpoint import open_endpoint
from trainer.serving.fetch import Fetcher, read_hosts
from trainer.serving.listener import listening
from trainer.serving.metric import Metrics, make_metrics
from trainer.serving.queue import Queue
from trainer.serving.worker import work
from trainer.train.loop import StopFlag

COMPLETIONS = "/v1/chat/completions"
TOKEN = "a-token-of-many-characters"
NAME = "echo"


class EchoAnswerer:
    """A stub for Answerer: repeats the last question, one word per step. The word `die` raises, `hang` continues until it is cancelled, and
    `flood` becomes a megabyte."""

    context = 1024

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s, self.sizes, self.looked = pause_s, list[int](), list[tuple[int, int]]()

    def image_features(self, image: Image.Image) -> Features:
        self.looked.append(image.size)
        return Features(tensors={}, size=image.size)

    def prepare(self, question: Question, features: Sequence[Features]) -> Any:
        words = question.messages[-1].content.split()
        return SimpleNamespace(words=words[: question.sampling.max_new_tokens], length=len(words), features=features)

    def answer(self, batch: Sequence[Any], *, on_text: Any, on_end: Any, halted: Any) -> list[Answer]:
        self.sizes.append(len(batch))
        said: list[list[str]] = [[] for _ in batch]
        ended: dict[int, Answer] = {}
        while len(ended) < len(batch):
            time.sleep(self.pause_s)
            for row, one in enumerate(batch):
                if row not in ended and (
                    how := self.step(one, said[row], lambda text, row=row: on_text(row, text), lambda row=row: halted(row))
                ):
                    ended[row] = Answer(text="".join(said[row]), prompt_tokens=one.length, new_tokens=len(said[row]), ended=how)
                    on_end(row, ended[row])
        return [ended[row] for row in range(len(batch))]

    def step(self, one: Any, said: list[str], say: Callable[[str], None], halted: Callable[[], bool]) -> Any:
        if halted():
            return "halted"
        if "die" in one.words:
            raise ValueError("the model died of this")
        if "hang" in one.words:
            time.sleep(0.005)
            return None
        if len(said) == len(one.words):
            return "stop"
        said.append((" " if said else "") + one.words[len(said)].replace("flood", "flood" * 200_000))
        say(said[-1])
        return None


@dataclass
class Served:
    port: int
    admission: Admission
    metrics: Metrics
    chat: ChatHandler
    flag: StopFlag
    worker: threading.Thread
    failures: list[BaseException] = field(default_factory=list)

    def ask(self, text: str = "one two", *, image: str = "", headers: dict[str, str] | None = None, **more: Any) -> "Reply":
        return self.post(chat_body(text, image=image, **more), headers=headers)

    def post(self, body: Any, *, headers: dict[str, str] | None = None, timeout_s: float = 60) -> "Reply":
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", COMPLETIONS, data, {"Content-Type": "application/json", **(headers or {})}, timeout_s)

    def call(
        self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout_s: float = 60
    ) -> "Reply":
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Reply(status=response.status, headers=dict(response.getheaders()), data=response.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def parts(self) -> list[Any]:
        events = [event.removeprefix("data: ") for event in self.data.decode().split("\n\n") if event]
        return [event if event == "[DONE]" else json.loads(event) for event in events]


def chat_body(text: str = "one two", *, image: str = "", **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


@contextmanager
def serve(
    answerer: Any = None,
    *,
    token: str = "",
    fetcher: Fetcher | None = None,
    name: str = NAME,
    ready: bool = True,
    answer_s: float = 100.0,
    **options: Any,
) -> Iterator[Served]:
    """`options`: fields of Serving. Stops the server at the end; a worker or listener that does not end fails the test."""
    serving = Serving(port=0, token="TOKEN" if token else "", **options)
    endpoint = open_endpoint(serving, {"TOKEN": token})
    flag = StopFlag()
    admission = Admission(lambda: flag.up, serving.drain_timeout_s)
    queue = Queue(most_batch=serving.max_batch, wait_s=serving.wait_ms / 1000)
    metrics = make_metrics(lambda: chat.waiting, lambda: admission.in_flight)
    fetcher = fetcher or Fetcher(hosts=read_hosts(serving.hosts), timeout_s=serving.fetch_timeout_s, most_bytes=serving.max_image_bytes)
    chat = ChatHandler(serving, name, queue, metrics, fetcher)
    with listening(make_app(chat, admission, metrics, endpoint, began=0), endpoint.listener, answer_s) as listener:
        chat.answerer = answerer or EchoAnswerer()

        def serve_on() -> None:
            try:
                work(queue, chat.answerer, admission, metrics, limit_s=serving.request_timeout_s, check=listener.check)  # type: ignore[arg-type]
                queue.close()
            except BaseException as error:
                served.failures.append(error)

        served = Served(int(endpoint.url.rpartition(":")[2]), admission, metrics, chat, flag, threading.Thread(target=serve_on))
        admission.ready = ready
        served.worker.start()
        try:
            yield served
        finally:
            flag.up = True
            served.worker.join(serving.drain_timeout_s + 20)
            chat.pool.shutdown()
    assert not served.worker.is_alive() and not served.failures, served.failures
    assert not listener.thread.is_alive()


def png(width: int = 32, height: int = 32, *, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    file = BytesIO()
    Image.new(mode, (width, height), 128 if mode == "L" else (10, 200, 30)).save(file, kind, **options)
    return file.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - links that come and go while they are listed


def resident_bytes(process: int | str = "self") -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled(value: Callable[[], int], least: int, timeout_s: float = 20) -> int:
    """Waits until the value is at most `least`, and returns it: threads and event loops release their resources a little later."""
    until = time.monotonic() + timeout_s
    while value() > least and time.monotonic() < until:
        time.sleep(0.05)
    return value()
