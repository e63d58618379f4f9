"""The output of one command on this machine as the input of a command on every node, all at the same time."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from launcher.errors import ImageFailed, NodeFailed
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import Result, Transport

QUEUED_CHUNKS = 8  # of 256 KiB, for each node: the slowest node sets the speed, and memory stays small
REPORT_BYTES = 256 * 2**20
LAST_LINES = 20  # of a command that failed
LIMIT_S = 7200.0


def send(
    save: tuple[str, ...],
    load: tuple[str, ...],
    nodes: Sequence[WorkingNode],
    source: Transport,
    say: Callable[[str], None],
    *,
    what: str = "the image",
    before_bytes: int = 0,
    total_bytes: int = 0,
) -> tuple[NodeFailed | None, ...]:
    """Run `save` on this machine and stream its output into `load` on every node; for each node None, or the error there. A node that
    fails does not delay the others. `before_bytes` and `total_bytes` (0: unknown) are for the progress lines of a larger transfer.
    Raises ImageFailed when `save` itself fails; no node has then seen the end of its input."""
    total = f" of {total_bytes / 1e9:.1f}" if total_bytes else ""
    pipes = [Pipe() for _ in nodes]
    broken: list[NodeFailed] = []

    def read() -> None:
        try:
            fill_pipes(pipes, save, source, lambda count: say(f"  {(before_bytes + count) / 1e9:.1f}{total} GB"))
        except Exception as error:  # also a bug: without an end, every node would wait for ever
            broken.append(error if isinstance(error, NodeFailed) else NodeFailed(f"{type(error).__name__}: {error}"))
            for pipe in pipes:
                pipe.put(broken[0])

    reader = threading.Thread(target=read, name="omnilaunch-save", daemon=True)
    reader.start()
    answers = attempt_each(lambda pair: feed(*pair, load, what), list(zip(nodes, pipes, strict=True)))
    reader.join()
    if broken:
        raise ImageFailed(f"{what} could not be read on this machine: {broken[0]}")
    return answers


def fill_pipes(pipes: Sequence["Pipe"], save: tuple[str, ...], source: Transport, report: Callable[[int], None]) -> None:
    """Every chunk of the command's output into every pipe. `report` gets the bytes so far after every REPORT_BYTES."""
    count, reported = 0, 0
    with source.stream(save) as chunks:
        for chunk in chunks:
            for pipe in pipes:
                pipe.put(chunk)
            count += len(chunk)
            if count - reported >= REPORT_BYTES:
                report(count)
                reported = count
    for pipe in pipes:
        pipe.put(b"")


def feed(node: WorkingNode, pipe: "Pipe", load: tuple[str, ...], what: str) -> None:
    try:
        done = node.transport.feed(load, pipe, timeout_s=LIMIT_S)
        if done.code:
            raise NodeFailed(f"{node.command.host}: receiving {what} failed with exit code {done.code}:\n{last_lines(done)}")
    finally:
        pipe.close()


def last_lines(done: Result) -> str:
    """The end of what a command printed."""
    return "\n".join((done.errors or done.output).strip().splitlines()[-LAST_LINES:])


class Pipe:
    """Chunks from the reader to one node. An empty chunk is the end; an error is raised on the node's side. Closed by a node that has
    failed, it drops the rest."""

    def __init__(self) -> None:
        self.chunks: queue.Queue[bytes | NodeFailed] = queue.Queue(maxsize=QUEUED_CHUNKS)
        self.closed = threading.Event()

    def put(self, chunk: bytes | NodeFailed) -> None:
        while not self.closed.is_set():
            with suppress(queue.Full):
                self.chunks.put(chunk, timeout=0.2)
                return

    def close(self) -> None:
        self.closed.set()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            chunk = self.chunks.get()
            if isinstance(chunk, NodeFailed):
                raise chunk
            if not chunk:
                return
            yield chunk
