"""Signals that ask the launcher to end: SIGINT, SIGTERM, and SIGHUP of a terminal that was closed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WATCH_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # while containers run, which a closed terminal does not concern
STOPPED_CODE = 128 + signal.SIGINT  # as a shell reports a command that Ctrl-C ended


class Stopped(Exception):
    """The user asked for a stop while nothing was running that could save."""


class StopRequest:
    """How often the user, or something that went wrong, has asked the run to stop. The second time kills."""

    def __init__(self) -> None:
        self.count, self.reason = 0, ""

    def ask(self, reason: str) -> None:
        self.count += 1
        self.reason = self.reason or reason


@contextmanager
def catch_stops(signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> Iterator[StopRequest]:
    """The signals become requests; the handlers of before come back at the end."""
    stop = StopRequest()
    with handling(lambda number: stop.ask(signal.Signals(number).name), signals):
        yield stop


@contextmanager
def stops_interrupt() -> Iterator[None]:
    """The signals end what is going on at once, as Stopped: before the ranks run there is nothing to save."""

    def end(number: int) -> None:
        raise Stopped

    with handling(end, STOP_SIGNALS):
        yield


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
