"""A least-recently-used cache, bounded by bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

Value = TypeVar("Value")


class Cache:
    """Thread-safe. Two threads may compute the same value at the same time; one of the two is kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of `key`; computed with `make` if it is not in the cache. `size`: bytes of a value. Exceptions of `make` are passed on."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]  # type: ignore[return-value]  # a key always has one type of value
        value = make()
        self._store(key, value, size(value))
        return value

    def _store(self, key: Hashable, value: object, size_bytes: int) -> None:
        with self._lock:
            if key in self._entries or size_bytes > self.limit_bytes:
                return
            self._entries[key] = (value, size_bytes)
            self.used_bytes += size_bytes
            while self.used_bytes > self.limit_bytes:
                self.used_bytes -= self._entries.popitem(last=False)[1][1]
