"""Handle one chat completion request, from its body to its answer."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trainer.contract import LINE_FEED, InputRefused, Serving
from trainer.data.batch.collate import Features
from trainer.generation.answerer import Answerer
from trainer.generation.question import Answer, Prepared, Question
from trainer.serving.body import parse_body, read_body
from trainer.serving.byte_budget import ByteBudget, Reservation
from trainer.serving.fetch import Fetcher
from trainer.serving.image import decode, is_data, read_data
from trainer.serving.metric import Metrics, outcome_of
from trainer.serving.pending_request import Event, PendingRequest
from trainer.serving.queue import Queue
from trainer.serving.refusal import RequestRefused, invalid, timed_out, too_busy
from trainer.serving.reply import CompletionHeader, stream
from trainer.serving.request import ChatRequest, read_request

BODIES = 4  # of the maximum size, in memory at a time
THREADS = 4  # for parsing bodies and decoding images
CHARACTERS_PER_TOKEN = 16  # four times that of usual text; longer requests are refused before they are tokenized
LATE_S = 5.0  # after the deadline, until the model reaches its next token, where it checks the deadline
HEADERS = {"X-Accel-Buffering": "no"}  # nginx would buffer the stream


class ChatHandler:
    """`answerer` is set when the model is loaded. Everything else is used on one event loop."""

    def __init__(self, serving: Serving, name: str, queue: Queue, metrics: Metrics, fetcher: Fetcher) -> None:
        self.serving, self.name = serving, name
        self.queue, self.metrics, self.fetcher = queue, metrics, fetcher
        self.answerer: Answerer | None = None
        self.images = LINE_FEED  # of the model's training rows, set with `answerer`
        self.waiting = 0  # requests whose body was read and that are not in a batch yet
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self.budget = ByteBudget(BODIES * serving.max_body_bytes)
        self.prepared = asyncio.Semaphore(2 * serving.max_batch)  # requests that hold the tensors of all their images

    async def complete(self, request: Request) -> Response:
        """Raises RequestRefused and ClientDisconnect."""
        arrived = time.monotonic()
        try:
            chat, pending = await self._enqueue(request, arrived)
            header = CompletionHeader(id=f"chatcmpl-{secrets.token_hex(12)}", created=int(time.time()), model=self.name)
            first = await unless_disconnected(request, self._next(pending))
            self.metrics.first_token.observe(time.monotonic() - arrived)
            if isinstance(first, RequestRefused):
                raise first
            if chat.stream:
                parts = stream(self._events(pending, first, arrived), header, usage=chat.usage)
                return StreamingResponse(parts, media_type="text/event-stream", headers=HEADERS)
            answer = await unless_disconnected(request, self._last(pending, first))
        except (Exception, asyncio.CancelledError) as error:
            gone = isinstance(error, ClientDisconnect | asyncio.CancelledError)
            outcome = outcome_of_accepted(error) if isinstance(error, RequestRefused) else "gone" if gone else "failed"
            self._count(outcome, arrived)
            raise
        self._count("answered", arrived, answer)
        return JSONResponse(header.whole(answer))

    # ------------------------------------------------------------------------------------------------- from body to batch

    async def _enqueue(self, request: Request, arrived: float) -> tuple[ChatRequest, PendingRequest]:
        """Returns when the request is in a batch."""
        with self.budget.reservation() as reservation:
            chat = await self._in_thread(self._parse, await read_body(request, self.serving.max_body_bytes, reservation))
            if self.waiting >= self.serving.max_waiting:
                raise too_busy("the queue is full")
            self.waiting += 1
            try:
                return chat, await unless_disconnected(request, self._start(chat, reservation, arrived + self.serving.request_timeout_s))
            finally:
                self.waiting -= 1

    def _parse(self, body: bytes) -> ChatRequest:
        most = CHARACTERS_PER_TOKEN * self._model.context
        return read_request(parse_body(body), self.name, self.serving.sampling, self.serving.max_images, most, self.images)

    async def _start(self, chat: ChatRequest, reservation: Reservation, deadline: float) -> PendingRequest:
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self.prepared:
                pending = PendingRequest(await self._prepare(chat, reservation), deadline)
                self.queue.put(pending)
                with abandoned_on_error(pending):
                    await pending.started.wait()
                return pending
        except TimeoutError:
            raise timed_out(self.serving.request_timeout_s) from None

    async def _prepare(self, chat: ChatRequest, reservation: Reservation) -> Prepared:
        """Decodes one image after the other, so that the pixels of only one are in memory."""
        features = [
            await self._load_image(url, f"messages: image {number}", reservation) for number, url in enumerate(chat.images, start=1)
        ]
        question = Question(
            messages=chat.messages,
            sampling=chat.sampling,
            seed=secrets.randbits(63) if chat.seed is None else chat.seed,
            stop=chat.stop,
            name="messages",
        )
        return await self._in_thread(self._tokenize, question, features)  # type: ignore[no-any-return]

    async def _load_image(self, url: str, param: str, reservation: Reservation) -> Features:
        if is_data(url):
            return await self._in_thread(lambda: self._features(read_data(url, self.serving.max_image_bytes, param), param))  # type: ignore[no-any-return]
        content = await self.fetcher.fetch(url, param, reservation.reserve)
        found: Features = await self._in_thread(self._features, content, param)
        reservation.release(len(content))
        return found

    def _features(self, content: bytes, param: str) -> Features:
        try:
            return self._model.image_features(decode(content, self.serving.max_image_pixels, param))
        except InputRefused as error:
            raise invalid(param, one_line(error), "invalid_image") from error

    def _tokenize(self, question: Question, features: list[Features]) -> Prepared:
        try:
            return self._model.prepare(question, features)
        except InputRefused as error:
            raise invalid("messages", one_line(error), "context_length_exceeded" if "tokens" in str(error) else "invalid_value") from error

    @property
    def _model(self) -> Answerer:
        assert self.answerer is not None, "requests are accepted only after the model is loaded"
        return self.answerer

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the thread pool, so that the event loop keeps sending the text of other requests."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    # --------------------------------------------------------------------------------------------- from first text to answer

    async def _next(self, pending: PendingRequest) -> Event:
        """Marks the request as abandoned when the wait for it is cancelled or times out."""
        with abandoned_on_error(pending):
            try:
                async with asyncio.timeout(pending.deadline + LATE_S - time.monotonic()):
                    return await pending.events.get()
            except TimeoutError:
                raise timed_out(self.serving.request_timeout_s) from None

    async def _last(self, pending: PendingRequest, event: Event) -> Answer:
        while isinstance(event, str):
            event = await self._next(pending)
        if isinstance(event, RequestRefused):
            raise event
        return event

    async def _events(self, pending: PendingRequest, event: Event, arrived: float) -> AsyncIterator[Event]:
        outcome, answer = "gone", None
        try:
            while isinstance(event, str):
                yield event
                try:
                    event = await self._next(pending)
                except RequestRefused as timeout:
                    event = timeout
            outcome = "answered" if isinstance(event, Answer) else outcome_of_accepted(event)
            answer = event if isinstance(event, Answer) else None
            yield event
        finally:
            pending.abandoned = True
            self._count(outcome, arrived, answer)

    def _count(self, outcome: str, arrived: float, answer: Answer | None = None) -> None:
        self.metrics.requests.labels(outcome).inc()
        self.metrics.seconds.observe(time.monotonic() - arrived)
        if answer is not None:
            self.metrics.prompt_tokens.inc(answer.prompt_tokens)
            self.metrics.new_tokens.inc(answer.new_tokens)


@contextmanager
def abandoned_on_error(pending: PendingRequest) -> Iterator[None]:
    """Marks the request as abandoned when the wait for it ends with an exception, so that the model's thread drops it."""
    try:
        yield
    except BaseException:
        pending.abandoned = True
        raise


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`. If the client disconnects first, `work` is cancelled and ClientDisconnect raised."""
    working, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, disconnected):
            task.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def outcome_of_accepted(refusal: RequestRefused) -> str:
    """The outcome of a request that was accepted before the server was asked to stop."""
    return "cut_off" if refusal.code == "stopping" else outcome_of(refusal.status)


def one_line(error: InputRefused) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())
