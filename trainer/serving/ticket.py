"""One accepted request between the two threads: HTTP waits for what the model says."""

import asyncio
import time
from contextlib import suppress

from trainer.generation.question import Answer, Prepared
from trainer.serving.refusal import RequestRefused

Event = str | Answer | RequestRefused  # new text, then one of the others


class Ticket:
    """Made on the event loop, which alone reads `events`. `deadline` by time.monotonic. `gone`: nobody waits any more."""

    def __init__(self, prepared: Prepared, deadline: float) -> None:
        self.prepared, self.deadline = prepared, deadline
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.taken = asyncio.Event()  # out of the queue, into a batch
        self.gone = False
        self.ended = False
        self._seen, self._sent = 0, 0  # characters of this attempt, and of all

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def begin(self) -> None:
        """An attempt to answer. An answer is the same each time, so that a second one says what the first had not come to."""
        self._seen = 0
        self._call(self.taken.set)

    def say(self, text: str) -> None:
        self._seen += len(text)
        fresh = self._seen - self._sent
        if fresh > 0:
            self._sent = self._seen
            self._call(self.events.put_nowait, text[-fresh:])

    def end(self, event: Answer | RequestRefused) -> None:
        """The first one counts."""
        if not self.ended:
            self.ended = True
            self._call(self.taken.set)
            self._call(self.events.put_nowait, event)

    def _call(self, function: object, *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who waited
            self.loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
