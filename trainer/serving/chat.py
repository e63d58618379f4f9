"""One request for a chat completion, from its body to its answer."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trainer.contract import InputRefused, Serving
from trainer.data.batch.collate import Features
from trainer.generation.answerer import Answerer
from trainer.generation.question import Answer, Prepared, Question
from trainer.serving.body import parse_body, read_body
from trainer.serving.budget import Budget, Lease
from trainer.serving.fetch import Fetcher
from trainer.serving.metric import Meters, outcome_of
from trainer.serving.picture import decode, is_data, read_data
from trainer.serving.queue import Queue
from trainer.serving.refusal import RequestRefused, busy, timed_out, wrong
from trainer.serving.reply import Head, stream
from trainer.serving.request import ChatRequest, read_request
from trainer.serving.ticket import Event, Ticket

BODIES = 4  # of the largest size, that are held at a time
THREADS = 4  # that parse bodies and decode images
CHARACTERS_PER_TOKEN = 16  # four times what usual text has: more is refused before the tokenizer sees it
LATE_S = 5.0  # for the model to come to its next token, where it is told that a request's time is over
HEADERS = {"X-Accel-Buffering": "no"}  # a proxy that gathers the parts of a stream would undo it


class Chat:
    """What a request needs besides itself. `answerer` is there once the model is loaded. All but the answerer is of one event loop."""

    def __init__(self, serving: Serving, name: str, queue: Queue, meters: Meters, fetcher: Fetcher) -> None:
        self.serving, self.name = serving, name
        self.queue, self.meters, self.fetcher = queue, meters, fetcher
        self.answerer: Answerer | None = None
        self.waiting = 0  # requests whose body is read and that are in no batch yet
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self.budget = Budget(BODIES * serving.max_body_bytes)
        self.places = asyncio.Semaphore(2 * serving.max_batch)  # for questions with all the tensors of their images

    async def complete(self, request: Request) -> Response:
        """Raises RequestRefused, and ClientDisconnect."""
        came = time.monotonic()
        try:
            asked, ticket = await self._take(request, came)
            head = Head(id=f"chatcmpl-{secrets.token_hex(12)}", created=int(time.time()), model=self.name)
            first = await until_gone(request, self._next(ticket))
            self.meters.first_token.observe(time.monotonic() - came)
            if isinstance(first, RequestRefused):
                raise first
            if asked.stream:
                parts = stream(self._events(ticket, first, came), head, usage=asked.usage)
                return StreamingResponse(parts, media_type="text/event-stream", headers=HEADERS)
            answer = await until_gone(request, self._last(ticket, first))
        except RequestRefused as refusal:
            self._count(outcome_inside(refusal), came)
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            self._count("gone", came)
            raise
        except Exception:
            self._count("failed", came)
            raise
        self._count("answered", came, answer)
        return JSONResponse(head.whole(answer))

    # ------------------------------------------------------------------------------------------------ from bytes to a batch

    async def _take(self, request: Request, came: float) -> tuple[ChatRequest, Ticket]:
        """Up to the moment when the model takes it."""
        with self.budget.lease() as lease:
            asked = await self._aside(self._read, await read_body(request, self.serving.max_body_bytes, lease))
            if self.waiting >= self.serving.max_waiting:
                raise busy("as many requests wait as may")
            self.waiting += 1
            try:
                return asked, await until_gone(request, self._enter(asked, lease, came + self.serving.request_timeout_s))
            finally:
                self.waiting -= 1

    def _read(self, body: bytes) -> ChatRequest:
        most = CHARACTERS_PER_TOKEN * self._model.context
        return read_request(parse_body(body), self.name, self.serving.sampling, self.serving.max_images, most)

    async def _enter(self, asked: ChatRequest, lease: Lease, deadline: float) -> Ticket:
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self.places:
                ticket = Ticket(await self._prepare(asked, lease), deadline)
                self.queue.put(ticket)
                with marked(ticket):
                    await ticket.taken.wait()
                return ticket
        except TimeoutError:
            raise timed_out(self.serving.request_timeout_s) from None

    async def _prepare(self, asked: ChatRequest, lease: Lease) -> Prepared:
        """One image after the other, so that the pixels of one are there at a time."""
        features = [await self._look(url, f"messages: image {place}", lease) for place, url in enumerate(asked.pictures, start=1)]
        question = Question(
            messages=asked.messages,
            sampling=asked.sampling,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            stop=asked.stop,
            name="messages",
        )
        return await self._aside(self._ask, question, features)  # type: ignore[no-any-return]

    async def _look(self, url: str, param: str, lease: Lease) -> Features:
        if is_data(url):
            return await self._aside(lambda: self._features(read_data(url, self.serving.max_image_bytes, param), param))  # type: ignore[no-any-return]
        content = await self.fetcher.fetch(url, param, lease.take)
        found: Features = await self._aside(self._features, content, param)
        lease.give_back(len(content))
        return found

    def _features(self, content: bytes, param: str) -> Features:
        try:
            return self._model.look(decode(content, self.serving.max_image_pixels, param))
        except InputRefused as error:
            raise wrong(param, one_line(error), "invalid_image") from error

    def _ask(self, question: Question, features: list[Features]) -> Prepared:
        try:
            return self._model.prepare(question, features)
        except InputRefused as error:
            raise wrong("messages", one_line(error), "context_length_exceeded" if "tokens" in str(error) else "invalid_value") from error

    @property
    def _model(self) -> Answerer:
        assert self.answerer is not None, "the gate lets nobody in before"
        return self.answerer

    async def _aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """On a thread, so that others' text goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    # ---------------------------------------------------------------------------------------------------- from text to an end

    async def _next(self, ticket: Ticket) -> Event:
        """Marks the ticket when whoever waits for it does so no more."""
        with marked(ticket):
            try:
                async with asyncio.timeout(ticket.deadline + LATE_S - time.monotonic()):
                    return await ticket.events.get()
            except TimeoutError:
                raise timed_out(self.serving.request_timeout_s) from None

    async def _last(self, ticket: Ticket, event: Event) -> Answer:
        while isinstance(event, str):
            event = await self._next(ticket)
        if isinstance(event, RequestRefused):
            raise event
        return event

    async def _events(self, ticket: Ticket, event: Event, came: float) -> AsyncIterator[Event]:
        outcome, answer = "gone", None
        try:
            while isinstance(event, str):
                yield event
                try:
                    event = await self._next(ticket)
                except RequestRefused as late:
                    event = late
            outcome = "answered" if isinstance(event, Answer) else outcome_inside(event)
            answer = event if isinstance(event, Answer) else None
            yield event
        finally:
            ticket.gone = True
            self._count(outcome, came, answer)

    def _count(self, outcome: str, came: float, answer: Answer | None = None) -> None:
        self.meters.requests.labels(outcome).inc()
        self.meters.seconds.observe(time.monotonic() - came)
        if answer is not None:
            self.meters.prompt_tokens.inc(answer.prompt_tokens)
            self.meters.new_tokens.inc(answer.new_tokens)


@contextmanager
def marked(ticket: Ticket) -> Iterator[None]:
    """Where the wait for it is given up, the ticket says so to the model."""
    try:
        yield
    except BaseException:
        ticket.gone = True
        raise


async def until_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns, unless the client goes away first: then it is cancelled, and ClientDisconnect raised."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(hear_end(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def hear_end(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def outcome_inside(refusal: RequestRefused) -> str:
    """Of a request that was taken before the server was to stop."""
    return "cut_off" if refusal.code == "stopping" else outcome_of(refusal.status)


def one_line(error: InputRefused) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())
