"""Notices a step that does not end: a rank that hangs leaves no error, and those that wait for it look like it.

A log that has gone quiet is no sign, since steps may be long; so each rank looks at its own clock, from a thread of its own, and says in
which step and phase it waits, with all stacks. The rank that is in no collective is the one to look at.
"""

import faulthandler
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.contract import FAILURE_FILES, SCHEMA, Exit, FailureReport, TrainSpec, write

CHECKS_PER_TIMEOUT = 20  # at the clock, in each timeout
CHECK_S = 1.0  # the longest time between two looks, so that all ranks tell and end within a second of each other
# From the stacks to the end: every rank has told by then, whose step began later because it waited, and no collective has given up yet,
# whose error would take the place of the cause.
GRACE_S = 30.0
STUCK_S = 10  # longer than the thread would take to end the process, if it could run at all


class Watchdog:
    """`begin` a step, name its `phase`, `rest` while no step is under way. `timeout_s` 0: it never wakes.

    `end(reason)` is called from the thread GRACE_S later, and has to end the process; with `begin(ends=False)` stacks are all.
    """

    def __init__(self, *, timeout_s: float, rank: int, stream: TextIO, end: Callable[[str], None]) -> None:
        self.timeout_s, self.rank, self.stream, self.end = timeout_s, rank, stream, end
        # Step, phase, when it began, whether it may be ended. Replaced whole, so that no lock is needed.
        self.current: tuple[int, str, float, bool] | None = None
        self.told = -math.inf  # when that began whose stacks are written

    def begin(self, step: int, phase: str, *, ends: bool = True) -> None:
        if not self.timeout_s:
            return
        self.current = (step, phase, time.monotonic(), ends)
        # For a rank that hangs inside a library which holds the interpreter's lock: this one is a thread of C, and needs no lock.
        faulthandler.dump_traceback_later(self.timeout_s + GRACE_S + STUCK_S, exit=ends, file=self.stream)

    def phase(self, name: str) -> None:
        if self.current is not None:
            step, _, since, ends = self.current
            self.current = (step, name, since, ends)

    def rest(self) -> None:
        if self.timeout_s:
            self.current = None
            faulthandler.cancel_dump_traceback_later()

    def look(self, now: float) -> None:
        """Tell a step that is too long, once; end the process when it is so GRACE_S later."""
        current = self.current
        if current is None:
            return
        step, phase, since, ends = current
        waited = now - since
        if waited >= self.timeout_s and self.told != since:
            self.told = since
            self.say(f"rank {self.rank} has waited {waited:.0f} s in step {step} ({phase})")
            self.say_stacks()
        if ends and waited >= self.timeout_s + GRACE_S:
            reason = f"step {step} ({phase}) has not ended in {waited:.0f} s; run.hang_timeout_s is {self.timeout_s:g}"
            self.say(f"rank {self.rank} ends: {reason}")
            self.end(reason)

    def say_stacks(self) -> None:
        """Line by line: a fault handler writes word by word."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            for line in file:
                os.write(self.stream.fileno(), line.encode())

    def say(self, text: str) -> None:
        self.stream.flush()
        os.write(self.stream.fileno(), f"omnilaunch: {text}\n".encode())  # one write, so that two ranks' lines do not mix


@contextmanager
def watch_steps(timeout_s: float, *, rank: int, stream: TextIO, end: Callable[[str], None]) -> Iterator[Watchdog]:
    """A watchdog at work until the block ends. `stream`: a file with a number, as sys.stderr."""
    watchdog = Watchdog(timeout_s=timeout_s, rank=rank, stream=stream, end=end)
    over = threading.Event()

    def guard() -> None:
        while not over.wait(min(timeout_s / CHECKS_PER_TIMEOUT, CHECK_S)):
            watchdog.look(time.monotonic())

    thread = threading.Thread(target=guard, name="watchdog", daemon=True)
    if timeout_s:
        thread.start()
    try:
        yield watchdog
    finally:
        over.set()
        watchdog.rest()
        if timeout_s:
            thread.join()


def end_hung(spec: TrainSpec, rank: int, reason: str) -> None:
    """End this process, whose main thread will never come back to do it; torchrun then ends the other ranks."""
    report = FailureReport(
        schema=SCHEMA,
        rank=rank,
        hostname=socket.gethostname(),
        unix_s=time.time(),
        code=Exit.HUNG,
        kind="Hung",
        message=f"{reason}. Every rank's stacks are in its log; the rank to look at is the one that waits in no collective.",
        traceback="",
    )
    try:
        write(report, Path(spec.output) / FAILURE_FILES.format(rank=rank))
    finally:
        os._exit(Exit.HUNG)
