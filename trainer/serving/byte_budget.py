"""A limit on the bytes of request bodies and images that are in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.serving.refusal import too_busy


class ByteBudget:
    """Used on one event loop, without a lock. `limit` in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.reserved = limit, 0

    @contextmanager
    def reservation(self) -> Iterator["Reservation"]:
        """An empty reservation, which is released at the end."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release(reservation.reserved)


class Reservation:
    """The bytes of one request."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget, self.reserved = budget, 0

    def reserve(self, size: int) -> None:
        """Raises RequestRefused (429) when the limit of the server would be exceeded."""
        if self.budget.reserved + size > self.budget.limit:
            raise too_busy("the server already holds as many bytes of requests as its limit allows")
        self.budget.reserved += size
        self.reserved += size

    def release(self, size: int) -> None:
        self.budget.reserved -= size
        self.reserved -= size
