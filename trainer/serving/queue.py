"""Requests that wait for the model, in the order of their arrival."""

import time
from collections import deque
from threading import Condition

from trainer.serving.pending_request import PendingRequest
from trainer.serving.refusal import stopping


class Queue:
    """Filled by the HTTP thread, emptied by the model's thread. `wait_s`: how long a batch waits for further requests."""

    def __init__(self, *, most_batch: int, wait_s: float) -> None:
        self.most_batch, self.wait_s = most_batch, wait_s
        self._waiting: deque[PendingRequest] = deque()
        self._changed = Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, pending: PendingRequest) -> None:
        with self._changed:
            if self._closed:
                pending.finish(stopping())
                return
            self._waiting.append(pending)
            self._changed.notify()

    def close(self) -> int:
        """Refuse the requests that wait and all later ones. Returns how many waited."""
        with self._changed:
            self._closed = True
            left = [pending for pending in self._waiting if not pending.abandoned]
            self._waiting.clear()
        for pending in left:
            pending.finish(stopping())
        return len(left)

    def take(self, idle_s: float) -> list[PendingRequest]:
        """A batch: the first request and those that arrive within `wait_s` after it; empty when none arrived within `idle_s`. Abandoned
        requests are dropped."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._waiting), idle_s):
                return []
            until = time.monotonic() + self.wait_s
            while len(self._waiting) < self.most_batch and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[PendingRequest] = []
            while self._waiting and len(batch) < self.most_batch:
                pending = self._waiting.popleft()
                if not pending.abandoned:
                    batch.append(pending)
            return batch
