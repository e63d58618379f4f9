"""Whether requests are taken, and how many are inside: what the thread of the model and that of HTTP both look at."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

Phase = Literal["loading", "open", "draining"]


class Gate:
    """`asked`: whether this process was asked to stop. `drain_s`: how long those inside may take from then on."""

    def __init__(self, asked: Callable[[], bool], drain_s: float) -> None:
        self.asked, self.drain_s = asked, drain_s
        self.ready = False
        self.inside = 0
        self._until: float | None = None
        self._lock = Lock()

    @property
    def phase(self) -> Phase:
        if self.asked():
            return "draining"
        return "open" if self.ready else "loading"

    @property
    def until(self) -> float | None:
        """When the time of those inside is over, by time.monotonic; None while nobody asked to stop. Counts from the first look."""
        if self._until is None and self.asked():
            self._until = time.monotonic() + self.drain_s
        return self._until

    @property
    def closed(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Of a request that was taken, from its headers to the last byte of its answer."""
        with self._lock:
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
