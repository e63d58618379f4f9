"""The thread of HTTP: uvicorn on a bound socket, with an eye on connections that only hold a place."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.contract import RunFailed

IDLE_TIMEOUT_S = 15.0  # of a connection without a whole request, however slowly one drips in
LOOK_S = 1.0
CLOSE_S = 5.0  # for answers that are on their way, when all is over
FILES_LEFT = 200  # of this process's descriptors, for all that is no connection
MOST_CONNECTIONS = 4096
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]


class Turned:
    """What a connection beyond the most gets: an end."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        return None


class Listener:
    """`answer_s`: the longest that a request may take."""

    def __init__(self, app: Any, socket: Any, answer_s: float) -> None:
        self.answer_s = answer_s
        self.seen: dict[Any, tuple[Any, float]] = {}  # connection -> what it is at, and since when
        most = min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_LEFT)

        def accept(**arguments: Any) -> Any:
            return H11Protocol(**arguments) if len(arguments["server_state"].connections) < most else Turned()

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
            timeout_graceful_shutdown=int(CLOSE_S),
            timeout_notify=int(LOOK_S),
            callback_notify=self._look,
        )
        self.server = uvicorn.Server(config)
        self.thread = Thread(target=self.server.run, args=([socket],), name="http", daemon=True)

    def check(self) -> None:
        """Raises RunFailed when the thread has ended by itself."""
        if not self.thread.is_alive():
            raise RunFailed("the thread that listens has ended, and nobody can ask any more: the log above says why. Start the run again.")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(2 * CLOSE_S)

    async def _look(self) -> None:
        """Once a second, on the event loop: uvicorn waits for ever for a request that began and does not end, and for a client that does not
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
    """Within it requests are heard. Raises RunFailed when they cannot be."""
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
