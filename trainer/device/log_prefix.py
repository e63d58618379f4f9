"""Puts the rank in front of every line that a rank prints, so that the log of a node says whose a line is.

Below Python, at the file descriptors: NCCL, HCCL, CANN and a fault handler's last words are lines as well. A process of its own does it,
which outlives a rank that is killed and so loses none of its last lines; and it keeps a line whole that two ranks write at once.
(torchrun's own `--tee` goes through a file for each stream: the order of the two is lost, a line can be cut where it was read too early,
and a full disk takes the run down.)
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from trainer.contract import PHASE_LINE, RANK_PREFIX, START_PHASES

PIECE_BYTES = 1 << 16  # a line that is longer is cut
DRAIN_S = 2.0  # for the last lines, when all is over
POLL_S = 0.005
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which a terminal or an engine sends to all


def report_phase(number: int) -> None:
    """Which of contract.START_PHASES this rank begins: where a run does not start, the slowest rank is told by it."""
    print(PHASE_LINE.format(phase=START_PHASES[number]), flush=True)


@contextmanager
def prefix_lines(environ: Mapping[str, str]) -> Iterator[None]:
    """Until the block ends, what goes to stdout and stderr comes out of stdout with `[rank N] ` in front of each line, in the order in
    which it was written. With one rank nothing changes. `environ`: RANK and WORLD_SIZE as torchrun sets them."""
    if int(environ.get("WORLD_SIZE") or 1) < 2:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    child, target = start_prefix_process(RANK_PREFIX.format(rank=environ.get("RANK", "?")).encode())
    before = tuple((number, os.dup(number)) for number in (1, 2))
    for number, _ in before:
        os.dup2(target, number)
    os.close(target)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for number, old in before:
            os.dup2(old, number)
            os.close(old)
        wait_for_child(child)


def start_prefix_process(prefix: bytes) -> tuple[int, int]:
    """Its process id, and the descriptor whose lines it takes. It stands by itself when this returns."""
    source, target = os.pipe()
    stands, says = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(source, 1, prefix, says, close=(target, stands))
    os.close(source)
    os.close(says)
    os.read(stands, 1)
    os.close(stands)
    return child, target


def wait_for_child(child: int) -> None:
    """Until it has written what it was given. One whose pipe somebody else still holds, as a worker of a data loader, is left alone."""
    deadline = time.monotonic() + DRAIN_S
    with suppress(ChildProcessError):
        while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < deadline:
            time.sleep(POLL_S)


def run_child(source: int, target: int, prefix: bytes, says: int, *, close: Sequence[int]) -> None:
    """The child. It never returns: what it was forked from goes on elsewhere."""
    try:
        os.setsid()  # torchrun ends a rank's whole process group
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for number in (*close, says):
            os.close(number)
        copy_with_prefix(source, target, prefix)
    finally:
        os._exit(0)


def copy_with_prefix(source: int, target: int, prefix: bytes) -> None:
    """Every line of `source` to `target` with `prefix` in front, until no one can write to `source` any more."""
    held = b""
    while piece := os.read(source, PIECE_BYTES):
        *lines, held = (held + piece).split(b"\n")
        if len(held) > PIECE_BYTES:
            lines.append(held)
            held = b""
        write_lines([prefix + line + b"\n" for line in lines], target)
    if held:
        write_lines([prefix + held + b"\n"], target)


def write_lines(lines: Sequence[bytes], target: int) -> None:
    """Whole lines at a time, no more than a pipe takes at once, so that those of two ranks do not mix."""
    batch = b""
    for line in lines:
        if batch and len(batch) + len(line) > select.PIPE_BUF:
            write_all(batch, target)
            batch = b""
        batch += line
    write_all(batch, target)


def write_all(text: bytes, target: int) -> None:
    """What cannot be written, on a disk that is full, is lost; the rank goes on."""
    with suppress(OSError):
        while text:
            text = text[os.write(target, text) :]
