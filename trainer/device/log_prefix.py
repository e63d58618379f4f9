"""Puts the rank in front of every line that a rank prints, so that a node's log shows which rank wrote a line.

This works on file descriptors, below Python: NCCL, HCCL, CANN and the fault handler write lines too. A separate process does it: it
outlives a rank that is killed, so no last lines are lost, and it keeps the lines of two ranks apart. (torchrun's own `--tee` writes a file
per stream: the order of the two streams is lost, a line can be split if it is read too early, and a full disk stops the run.)
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from trainer.contract import PHASE_LINE, RANK_PREFIX, START_PHASES

PIECE_BYTES = 1 << 16  # longer lines are split
DRAIN_S = 2.0  # for the last lines, at the end
POLL_S = 0.005
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which a terminal or a container engine sends to all processes


def report_phase(number: int) -> None:
    """Print which of contract.START_PHASES this rank begins: if a run does not start, this shows which rank is slowest."""
    print(PHASE_LINE.format(phase=START_PHASES[number]), flush=True)


@contextmanager
def prefix_lines(environ: Mapping[str, str]) -> Iterator[None]:
    """Until the block ends, stdout and stderr both go to stdout, with `[rank N] ` in front of each line, in the order of writing. With one
    rank nothing changes. `environ`: RANK and WORLD_SIZE as set by torchrun."""
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
    """Returns its process id, and the descriptor that it reads lines from. The process is ready when this returns."""
    source, target = os.pipe()
    ready, report_ready = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(source, 1, prefix, report_ready, close=(target, ready))
    os.close(source)
    os.close(report_ready)
    os.read(ready, 1)
    os.close(ready)
    return child, target


def wait_for_child(child: int) -> None:
    """Until it has written everything. If another process, such as a data loader's worker, still holds the pipe, do not wait for it."""
    deadline = time.monotonic() + DRAIN_S
    with suppress(ChildProcessError):
        while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < deadline:
            time.sleep(POLL_S)


def run_child(source: int, target: int, prefix: bytes, report_ready: int, *, close: Sequence[int]) -> None:
    """The child process. Never returns, since the code that forked it continues in the parent."""
    try:
        os.setsid()  # torchrun ends a rank's whole process group
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for number in (*close, report_ready):
            os.close(number)
        copy_with_prefix(source, target, prefix)
    finally:
        os._exit(0)


def copy_with_prefix(source: int, target: int, prefix: bytes) -> None:
    """Copy every line of `source` to `target` with `prefix` in front, until `source` has no writer."""
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
    """Write whole lines, at most PIPE_BUF bytes at once, so that the lines of two ranks do not mix."""
    batch = b""
    for line in lines:
        if batch and len(batch) + len(line) > select.PIPE_BUF:
            write_all(batch, target)
            batch = b""
        batch += line
    write_all(batch, target)


def write_all(text: bytes, target: int) -> None:
    """On a full disk the text is lost; the rank continues."""
    with suppress(OSError):
        while text:
            text = text[os.write(target, text) :]
