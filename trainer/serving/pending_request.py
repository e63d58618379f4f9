"""One accepted request, shared by two threads: the HTTP thread waits for what the model's thread generates."""

import asyncio
import time
from contextlib import suppress

from trainer.generation.question import Answer, Prepared
from trainer.serving.refusal import RequestRefused

Event = str | Answer | RequestRefused  # new text, any number of times, then one of the other two


class PendingRequest:
    """Created on the event loop, which alone reads `events`. `deadline` is by time.monotonic. `abandoned`: the client no longer waits."""

    def __init__(self, prepared: Prepared, deadline: float) -> None:
        self.prepared, self.deadline = prepared, deadline
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.started = asyncio.Event()  # it left the queue and is in a batch
        self.abandoned = False
        self.finished = False
        self._generated, self._sent = 0, 0  # characters of this attempt, and of all attempts

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline

    def start(self) -> None:
        """Start an attempt. Every attempt generates the same answer, so a second one sends only what the first did not reach."""
        self._generated = 0
        self._call(self.started.set)

    def add_text(self, text: str) -> None:
        self._generated += len(text)
        fresh = self._generated - self._sent
        if fresh > 0:
            self._sent = self._generated
            self._call(self.events.put_nowait, text[-fresh:])

    def finish(self, event: Answer | RequestRefused) -> None:
        """Only the first call has an effect."""
        if not self.finished:
            self.finished = True
            self._call(self.started.set)
            self._call(self.events.put_nowait, event)

    def _call(self, function: object, *arguments: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed: no client is connected any more
            self.loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
