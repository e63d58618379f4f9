"""Which tensors are alive at each moment, by kind, observed operator by operator; memory inside a kernel is not seen.

torch.distributed._tools.mem_tracker does the same by module, but takes some ten times as long, and its parts moved between torch 2.7 and
2.13. This one uses only dispatch modes and weak references to storages.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A live storage, weakly referenced."""

    kind: str
    size_bytes: int
    reference: Any


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes alive, by kind, at the highest sum."""

    total_bytes: int = 0
    kinds_bytes: Mapping[str, int] = field(default_factory=dict)


class AllocationTracker(TorchDispatchMode):  # type: ignore[misc]
    """While it is active, every storage that an operator creates is recorded under the current kind, and removed when it is freed. `shares`:
    kind -> the part of it that one rank holds, default 1. `grain_bytes`: the device's allocator rounds storages up to multiples of it."""

    def __init__(self, shares: Mapping[str, float] | None = None, *, grain_bytes: int = 1) -> None:
        super().__init__()
        self.shares, self.grain_bytes = dict(shares or {}), grain_bytes
        self.entries: dict[int, Allocation] = {}
        self.alive_bytes: dict[str, int] = {}
        self.phase, self.kind = "", "inputs"
        self.peaks: dict[str, Moment] = {}
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.enter(value)
        return result

    @contextmanager
    def during(self, phase: str, kind: str) -> Iterator[None]:
        """A phase of the step; its storages are recorded under `kind`."""
        before = self.phase, self.kind
        self.phase, self.kind = phase, kind
        self.update_peak()
        try:
            yield
        finally:
            self.phase, self.kind = before

    def enter(self, tensor: Tensor) -> None:
        """Record the tensor's storage under the current kind, unless it is known already, or on the meta device, which has no storage."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.entries.get(key)
        if known is not None and known.reference() is storage:
            return
        size = -(-storage.nbytes() // self.grain_bytes) * self.grain_bytes
        reference = weakref.ref(storage, partial(self.remove, key))
        self.entries[key] = Allocation(kind=self.kind, size_bytes=size, reference=reference)
        self.add(self.kind, size)

    def remove(self, key: int, reference: Any) -> None:
        entry = self.entries.get(key)
        if entry is not None and entry.reference is reference:  # otherwise the key already belongs to another storage
            del self.entries[key]
            self.add(entry.kind, -entry.size_bytes)

    def assign(self, tensor: Tensor, kind: str) -> None:
        """Record the tensor's storage under `kind`, also if it was recorded under another one."""
        self.enter(tensor)
        key = tensor.untyped_storage()._cdata
        entry = self.entries[key]
        if entry.kind != kind:
            self.add(entry.kind, -entry.size_bytes)
            self.entries[key] = replace(entry, kind=kind)
            self.add(kind, entry.size_bytes)

    def add(self, kind: str, size: int) -> None:
        """Bytes that are allocated, or freed if negative; also those without a tensor."""
        self.alive_bytes[kind] = self.alive_bytes.get(kind, 0) + size
        self.total += size * self.shares.get(kind, 1.0)
        if size > 0:
            self.update_peak()

    def update_peak(self) -> None:
        """Keep this moment if it is the highest of its phase."""
        if self.total > self.peaks.get(self.phase, Moment()).total_bytes:
            held = {kind: round(size * self.shares.get(kind, 1.0)) for kind, size in self.alive_bytes.items() if size}
            self.peaks[self.phase] = Moment(total_bytes=round(self.total), kinds_bytes=held)
