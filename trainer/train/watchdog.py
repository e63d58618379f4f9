"""Detects a step that does not end: a rank that hangs raises no error, and the ranks that wait for it look the same.

Each rank checks its own clock in a thread, and prints in which step and phase it waits, with all stacks. The rank that waits in no collective
is the cause. A quiet log is not enough: steps may be long.
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

CHECKS_PER_TIMEOUT = 20
CHECK_S = 1.0  # the longest time between two checks, so that all ranks report and end within a second of each other
# From the stacks to the end: long enough for every rank to report, also those whose step began later because they waited; and before a
# collective times out, whose error would hide the cause.
GRACE_S = 30.0
STUCK_S = 10  # longer than the thread needs to end the process, if it can run at all


class Watchdog:
    """`begin` a step, name its `phase`, `pause` while no step runs. `timeout_s` 0: never reports.

    GRACE_S after the report the thread calls `end(reason)`, which must end the process; after `begin(ends=False)` it only reports.
    """

    def __init__(self, *, timeout_s: float, rank: int, stream: TextIO, end: Callable[[str], None]) -> None:
        self.timeout_s, self.rank, self.stream, self.end = timeout_s, rank, stream, end
        # Step, phase, start time, whether the process may be ended. Replaced as a whole, so that no lock is needed.
        self.current: tuple[int, str, float, bool] | None = None
        self.reported = -math.inf  # start time of the step that was reported

    def begin(self, step: int, phase: str, *, ends: bool = True) -> None:
        if not self.timeout_s:
            return
        self.current = (step, phase, time.monotonic(), ends)
        # For a rank that hangs in a library that holds the interpreter's lock: this timer is a C thread and needs no lock.
        faulthandler.dump_traceback_later(self.timeout_s + GRACE_S + STUCK_S, exit=ends, file=self.stream)

    def phase(self, name: str) -> None:
        if self.current is not None:
            step, _, since, ends = self.current
            self.current = (step, name, since, ends)

    def pause(self) -> None:
        if self.timeout_s:
            self.current = None
            faulthandler.cancel_dump_traceback_later()

    def check(self, now: float) -> None:
        """Report a step that takes too long, once; GRACE_S later end the process."""
        current = self.current
        if current is None:
            return
        step, phase, since, ends = current
        waited = now - since
        if waited >= self.timeout_s and self.reported != since:
            self.reported = since
            self.log(f"rank {self.rank} has waited {waited:.0f} s in step {step} ({phase})")
            self.log_stacks()
        if ends and waited >= self.timeout_s + GRACE_S:
            reason = f"step {step} ({phase}) has not ended in {waited:.0f} s; run.hang_timeout_s is {self.timeout_s:g}"
            self.log(f"rank {self.rank} ends: {reason}")
            self.end(reason)

    def log_stacks(self) -> None:
        """Line by line: faulthandler writes in small pieces, which would mix with those of other ranks."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            for line in file:
                os.write(self.stream.fileno(), line.encode())

    def log(self, text: str) -> None:
        self.stream.flush()
        os.write(self.stream.fileno(), f"omnilaunch: {text}\n".encode())  # one write, so that lines of two ranks do not mix


@contextmanager
def watch_steps(timeout_s: float, *, rank: int, stream: TextIO, end: Callable[[str], None]) -> Iterator[Watchdog]:
    """Runs a watchdog until the block ends. `stream`: a file with a descriptor, as sys.stderr."""
    watchdog = Watchdog(timeout_s=timeout_s, rank=rank, stream=stream, end=end)
    over = threading.Event()

    def guard() -> None:
        while not over.wait(min(timeout_s / CHECKS_PER_TIMEOUT, CHECK_S)):
            watchdog.check(time.monotonic())

    thread = threading.Thread(target=guard, name="watchdog", daemon=True)
    if timeout_s:
        thread.start()
    try:
        yield watchdog
    finally:
        over.set()
        watchdog.pause()
        if timeout_s:
            thread.join()


def end_hung(spec: TrainSpec, rank: int, reason: str) -> None:
    """End this process, whose main thread is stuck; torchrun then ends the other ranks."""
    report = FailureReport(
        schema=SCHEMA,
        rank=rank,
        hostname=socket.gethostname(),
        unix_s=time.time(),
        code=Exit.HUNG,
        kind="Hung",
        message=f"{reason}. Every rank's stacks are in its node's log.",
        traceback="",
    )
    try:
        write(report, Path(spec.output) / FAILURE_FILES.format(rank=rank))
    finally:
        os._exit(Exit.HUNG)
