"""Signals that ask the launcher to end: SIGINT, SIGTERM, and SIGHUP of a terminal that was closed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED_CODE = 128 + signal.SIGINT  # as a shell reports a command that Ctrl-C ended


class Stopped(Exception):
    """The user asked for a stop while nothing was running that could save."""


class StopRequest:
    """How often the user, or something that went wrong, has asked the run to stop. The second time kills. One for the whole of a launch,
    so that no moment of it is left in which a signal would end the launcher and leave its containers."""

    def __init__(self) -> None:
        self.count, self.reason, self.asked_at, self.interrupts = 0, "", 0.0, False

    def ask(self, reason: str) -> None:
        self.count += 1
        self.reason = self.reason or reason
        self.asked_at = time.monotonic()

    def is_over(self, patience_s: float, *, haste_s: float = 0.0) -> bool:
        """Whether what was under way is waited for no more: `patience_s` after the request, or `haste_s` after it came again."""
        return bool(self.count) and time.monotonic() - self.asked_at >= (patience_s if self.count == 1 else haste_s)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Here a request ends what is going on at once, as Stopped: before the ranks run there is nothing to save. One that came before
        counts as well."""
        try:
            self.interrupts = True
            if self.count:
                raise Stopped
            yield
        finally:
            self.interrupts = False


@contextmanager
def catch_stops() -> Iterator[StopRequest]:
    """The signals become requests; the handlers of before come back at the end."""
    stop = StopRequest()

    def act(number: int) -> None:
        stop.ask(signal.Signals(number).name)
        if stop.interrupts:
            raise Stopped

    with handling(act, STOP_SIGNALS):
        yield stop


@contextmanager
def released(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """These end the launcher again, as they do any program. One that was ignored, as under nohup, stays so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def handling(act: Callable[[int], None], signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """One that was ignored, as under nohup, stays so."""

    def handler(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handler) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
