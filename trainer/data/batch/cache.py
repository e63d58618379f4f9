"""Keeps what was costly to make, the latest used first, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

Value = TypeVar("Value")


class Cache:
    """A bounded map from key to (value, bytes). Safe to use from several threads: two may make the same value, one is kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of `key`, made now if it is not kept. `size`: bytes of a value. Whatever `make` raises goes through."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]  # type: ignore[return-value]  # a key always has one type of value
        value = make()
        self._keep(key, value, size(value))
        return value

    def _keep(self, key: Hashable, value: object, size_bytes: int) -> None:
        with self._lock:
            if key in self._entries or size_bytes > self.limit_bytes:
                return
            self._entries[key] = (value, size_bytes)
            self.used_bytes += size_bytes
            while self.used_bytes > self.limit_bytes:
                self.used_bytes -= self._entries.popitem(last=False)[1][1]
