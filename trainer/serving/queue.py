"""Requests that wait for the model, in the order in which they came."""

import time
from collections import deque
from threading import Condition

from trainer.serving.refusal import stopping
from trainer.serving.ticket import Ticket


class Queue:
    """Filled by the thread of HTTP, emptied by that of the model."""

    def __init__(self, *, most_batch: int, wait_s: float) -> None:
        self.most_batch, self.wait_s = most_batch, wait_s
        self._waiting: deque[Ticket] = deque()
        self._changed = Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ticket: Ticket) -> None:
        with self._changed:
            if self._closed:
                ticket.end(stopping())
                return
            self._waiting.append(ticket)
            self._changed.notify()

    def close(self) -> int:
        """Nobody is answered any more: those that wait are told, and whoever comes. Returns how many waited."""
        with self._changed:
            self._closed = True
            left = [ticket for ticket in self._waiting if not ticket.gone]
            self._waiting.clear()
        for ticket in left:
            ticket.end(stopping())
        return len(left)

    def take(self, idle_s: float) -> list[Ticket]:
        """A batch: the first that waits, and whoever joins it within `wait_s`; nothing when none came within `idle_s`. Those that nobody
        waits for are left out."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._waiting), idle_s):
                return []
            until = time.monotonic() + self.wait_s
            while len(self._waiting) < self.most_batch and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[Ticket] = []
            while self._waiting and len(batch) < self.most_batch:
                ticket = self._waiting.popleft()
                if not ticket.gone:
                    batch.append(ticket)
            return batch
