"""Signals that ask the launcher to end: SIGINT, SIGTERM, and SIGHUP when its terminal is closed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED_CODE = 128 + signal.SIGINT  # the exit code that a shell reports for a command ended by Ctrl-C
Handler = Callable[[int, FrameType | None], None]


class Stopped(Exception):
    """The user asked for a stop while nothing was running that could save."""


class StopRequest:
    """How often the run was asked to stop. The second request kills. There is one for the whole launch, so that at no moment a signal can end the
    launcher and leave its containers running."""

    def __init__(self) -> None:
        self.count, self.reason, self.asked_at, self.interrupts = 0, "", 0.0, False

    def ask(self, reason: str) -> None:
        self.count += 1
        self.reason = self.reason or reason
        self.asked_at = time.monotonic()

    def limit(self, first_s: float, again_s: float = 0.0) -> Callable[[], bool]:
        """A condition for `attempt_each`. It becomes true `first_s` after a stop request, or `again_s` after a second one. A request from before
        this call counts from now; without a request it stays false."""
        began = time.monotonic()

        def is_over() -> bool:
            waited_s = time.monotonic() - max(began, self.asked_at)
            return bool(self.count) and waited_s >= (first_s if self.count == 1 else again_s)

        return is_over

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a request raises Stopped at once: before the ranks run there is nothing to save. So does a request from before."""
        try:
            self.interrupts = True
            if self.count:
                raise Stopped
            yield
        finally:
            self.interrupts = False


@contextmanager
def catch_stops() -> Iterator[StopRequest]:
    """Turn the signals into requests. The previous handlers are restored at the end."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and stop.count:
            return  # a terminal that is closed after Ctrl-C is no second request: the run is being saved
        stop.ask(signal.Signals(number).name)
        if stop.interrupts:
            raise Stopped

    with handler_for(STOP_SIGNALS, handle):
        yield stop


@contextmanager
def handler_for(signals: tuple[signal.Signals, ...], handler: Handler | signal.Handlers) -> Iterator[None]:
    """Handle these signals so inside; SIG_DFL lets them end the launcher. A signal that is ignored, as under nohup, stays ignored. Except for
    SIGINT: a shell without job control starts `command &` with it ignored, which is not asked for."""
    heard = (number for number in signals if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN)
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
