"""Whether the server accepts requests, and how many are in flight. Shared by the model's thread and the HTTP thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

Phase = Literal["loading", "open", "draining"]


class Admission:
    """`stop_requested`: whether this process was asked to stop. `drain_s`: seconds that requests in flight have left after that."""

    def __init__(self, stop_requested: Callable[[], bool], drain_s: float) -> None:
        self.stop_requested, self.drain_s = stop_requested, drain_s
        self.ready = False
        self.in_flight = 0
        self._deadline: float | None = None
        self._lock = Lock()

    @property
    def phase(self) -> Phase:
        if self.stop_requested():
            return "draining"
        return "open" if self.ready else "loading"

    @property
    def drain_deadline(self) -> float | None:
        """When requests in flight are cut off, by time.monotonic; None before a stop is requested. The time starts at the first call."""
        if self._deadline is None and self.stop_requested():
            self._deadline = time.monotonic() + self.drain_s
        return self._deadline

    @property
    def drain_expired(self) -> bool:
        return self.drain_deadline is not None and time.monotonic() >= self.drain_deadline

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Counts one accepted request as in flight, from its headers to the last byte of its answer."""
        with self._lock:
            self.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1
