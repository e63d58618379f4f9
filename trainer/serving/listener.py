"""The HTTP thread: uvicorn on a bound socket. Idle and slow connections are closed."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.contract import RunFailed

IDLE_TIMEOUT_S = 15.0  # of a connection without a complete request, even if bytes of one keep arriving
CHECK_S = 1.0
SHUTDOWN_S = 5.0  # for answers that are being sent
RESERVED_FILES = 200  # file descriptors of this process that are not for connections
MOST_CONNECTIONS = 4096
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]


class RejectedConnection:
    """The protocol for connections beyond the limit: closes them."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        return None


class Listener:
    """`answer_s`: the longest time that a request may take."""

    def __init__(self, app: Any, socket: Any, answer_s: float) -> None:
        self.answer_s = answer_s
        self.seen: dict[Any, tuple[Any, float]] = {}  # connection -> its state, and since when
        most = min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FILES)

        def accept(**arguments: Any) -> Any:
            return H11Protocol(**arguments) if len(arguments["server_state"].connections) < most else RejectedConnection()

        config = uvicorn.Config(
            app,
            http=accept,  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="error",
            proxy_headers=False,
            server_header=False,
            headers=HEADERS,
            timeout_graceful_shutdown=int(SHUTDOWN_S),
            timeout_notify=int(CHECK_S),
            callback_notify=self._close_slow,
        )
        self.server = uvicorn.Server(config)
        self.thread = Thread(target=self.server.run, args=([socket],), name="http", daemon=True)

    def check(self) -> None:
        """Raises RunFailed when the thread ended unexpectedly."""
        if not self.thread.is_alive():
            raise RunFailed("the HTTP thread ended unexpectedly; the log above shows why. Start the run again.")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(2 * SHUTDOWN_S)

    async def _close_slow(self) -> None:
        """Called once a second on the event loop. uvicorn itself has no timeout for an incomplete request, nor for a client that does not
        read its answer."""
        now, connections = time.monotonic(), set(self.server.server_state.connections)
        self.seen = {connection: since for connection, since in self.seen.items() if connection in connections}
        for connection in connections:
            cycle: Any = getattr(connection, "cycle", None)
            idle = cycle is None or cycle.response_complete
            known, since = self.seen.setdefault(connection, ((cycle, idle), now))
            if known != (cycle, idle):
                self.seen[connection] = ((cycle, idle), now)
            elif now - since > (IDLE_TIMEOUT_S if idle else self.answer_s):
                connection.transport.abort()


@contextmanager
def listening(app: Any, socket: Any, answer_s: float) -> Iterator[Listener]:
    """Serves HTTP within the block. Raises RunFailed when the thread cannot start."""
    listener = Listener(app, socket, answer_s)
    listener.thread.start()
    try:
        while not listener.server.started:
            listener.check()
            time.sleep(0.01)
        yield listener
    finally:
        listener.stop()
        socket.close()
