"""How many bytes of requests are held at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.serving.refusal import busy


class Budget:
    """Of one event loop."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        lease = Lease(self)
        try:
            yield lease
        finally:
            lease.give_back(lease.held)


class Lease:
    """What one request holds."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held = budget, 0

    def take(self, size: int) -> None:
        """Raises RequestRefused when others hold too much."""
        if self.budget.held + size > self.budget.limit:
            raise busy("the server holds as many bytes of requests as it may")
        self.budget.held += size
        self.held += size

    def give_back(self, size: int) -> None:
        self.budget.held -= size
        self.held -= size
