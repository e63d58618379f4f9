"""A call on a thread of its own that does not delay the end of the program.

A `ThreadPoolExecutor` does: the interpreter joins its threads at exit, so that one command to a node that stopped responding holds up Ctrl-C for
the whole timeout of that command.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")


def in_background(function: Callable[[], Answer], *, name: str = "omnilaunch-background") -> "Future[Answer]":
    """Start `function` on a daemon thread. The future has its answer, or raises what it raised."""
    future: Future[Answer] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
