"""One stream to many nodes at the same time."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from launcher.errors import ImageFailed, NodeFailed
from launcher.run.delivery.broadcast import send
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local, Result
from tests.launcher.engine import command

CHUNKS = [b"%02d" % number for number in range(40)]


class Unlimited(Local):
    """A node that receives whatever it is sent, and this machine, which sends CHUNKS; no process is started."""

    received, fails = b"", False

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        if self.fails:
            raise NodeFailed(f"{self.host}: lost the connection")
        self.received = b"".join(chunks)
        return Result(argv=argv, code=0, output="", errors="")

    @contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        yield iter(CHUNKS)


def test_many_nodes_receive_at_the_same_time() -> None:
    """More nodes than the 140 threads there were once: a pipe without a thread stopped the reader, and with it every other node."""
    nodes = [Unlimited({}, f"host{rank}") for rank in range(200)]
    nodes[150].fails = True
    working = [WorkingNode(command=command(node.host, rank), transport=node) for rank, node in enumerate(nodes)]
    answers: list[object] = []
    sending = threading.Thread(target=lambda: answers.extend(send(("save",), ("load",), working, Unlimited({}), print)), daemon=True)
    sending.start()
    sending.join(30)
    assert [str(answer) for answer in answers if answer] == ["host150: lost the connection"] and len(answers) == 200
    assert {node.received for node in nodes if not node.fails} == {b"".join(CHUNKS)}


def test_a_source_that_fails_in_any_way_ends_the_transfer() -> None:
    """The reader is a thread of its own: if it dies without a word, every node waits for ever."""

    class Exhausted(Unlimited):
        @contextmanager
        def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
            raise OSError(24, "Too many open files")
            yield

    class Receiving(Unlimited):
        def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
            return Result(argv=argv, code=len(b"".join(chunks)), output="", errors="")

    working = [WorkingNode(command=command("host0", 0), transport=Receiving({}, "host0"))]
    with pytest.raises(ImageFailed, match=r"could not be read on this machine: OSError: .*Too many open files"):
        send(("save",), ("load",), working, Exhausted({}), print)
