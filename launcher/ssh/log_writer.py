"""One thread that writes the output of all running commands into their logs. A thread for each would be 128 more on 128 nodes."""

import queue
import selectors
import socket
import threading
from pathlib import Path

from paramiko import Channel  # type: ignore[import-untyped]

from launcher.ssh.channel import SETTLE_S, Marker, drain, has_ended, is_lost


class FollowedCommand:
    """A running command whose output goes to a log file. `done` is set when it has ended or its connection was lost (`lost`); `code` is then
    its exit code (-1: ended by a signal). `failure`: why the log could not be written; the output is still read, so that a full disk on this
    machine does not block the command."""

    def __init__(self, channel: Channel, marker: Marker, log: Path, first: bytes) -> None:
        self.channel, self.marker = channel, marker
        self.done, self.code, self.lost, self.failure = threading.Event(), -1, False, ""
        self.file = log.open("ab", buffering=0)
        self.write(first)

    def read(self) -> bool:
        """Write what has arrived; False when there was nothing."""
        piece = drain(self.channel)
        for part in piece:
            self.write(part)
        return any(piece)

    def write(self, text: bytes) -> None:
        try:
            while text and not self.failure:
                text = text[self.file.write(text) :]
        except OSError as error:
            self.failure = f"{self.file.name} cannot be written: {error.strerror}"

    def finish(self) -> None:
        self.code, self.lost = self.channel.exit_status, is_lost(self.channel)
        self.file.close()
        self.channel.close()
        self.done.set()


class LogWriter:
    """Starts its thread with the first command. `close` ends it; commands that still run are not affected."""

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[FollowedCommand | None] = queue.SimpleQueue()
        self._near, self._far = socket.socketpair()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def follow(self, command: FollowedCommand) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="omnilaunch-log-writer", daemon=True)
                self._thread.start()
        self._new.put(command)
        self._near.send(b"\0")

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._new.put(None)
            self._near.send(b"\0")
            thread.join()
        self._near.close()
        self._far.close()

    def _serve(self) -> None:
        settling: set[FollowedCommand] = set()  # their output is closed, and their exit code has not arrived yet
        with selectors.DefaultSelector() as selector:
            selector.register(self._far, selectors.EVENT_READ, None)
            while True:
                for key, _ in selector.select(SETTLE_S if settling else None):
                    if key.data is None:
                        self._far.recv(4096)
                        if not self._take_new(selector):
                            for left in (*settling, *(key.data for key in selector.get_map().values() if key.data is not None)):
                                left.file.close()
                            return
                        continue
                    command: FollowedCommand = key.data
                    over = has_ended(command.channel)
                    if not command.read() and (over or command.channel.eof_received):
                        selector.unregister(command.channel)
                        settling.add(command)
                for command in [command for command in settling if has_ended(command.channel)]:
                    settling.discard(command)
                    command.finish()

    def _take_new(self, selector: selectors.BaseSelector) -> bool:
        """False when the thread has to end."""
        while not self._new.empty():
            command = self._new.get()
            if command is None:
                return False
            selector.register(command.channel, selectors.EVENT_READ, command)
        return True
