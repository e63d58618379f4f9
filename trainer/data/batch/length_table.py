"""The lengths of all samples in memory that the ranks of a node share, so that each sample is measured once a node."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.contract import TrainSpec
from trainer.distributed.collective import gather_objects


@dataclass(frozen=True, kw_only=True)
class LengthTable:
    """`known`: int32, one for each sample, 0 where it was not measured yet. `place` of `ranks`: of this rank among those that share it."""

    known: NDArray[np.int32]
    place: int = 0
    ranks: int = 1

    def measure(self, numbers: Iterable[int], count: Callable[[int], int]) -> list[int]:
        """The length of each sample, by `count` for those that no rank has measured. Each rank begins at another place of the list, so that together
        they measure each about once, and none waits for another. Two ranks that measure the same sample write the same number."""
        chosen = list(numbers)
        first = len(chosen) * self.place // self.ranks
        for number in (*chosen[first:], *chosen[:first]):
            if not self.known[number]:
                self.known[number] = count(number)
        return [int(self.known[number]) for number in chosen]


def private_table(count: int) -> LengthTable:
    return LengthTable(known=np.zeros(count, np.int32))


def open_table(spec: TrainSpec, count: int, rank: int) -> LengthTable:
    """A table that the ranks of a node share; a private one for a single rank, where no lengths are needed, and where the node has no room for a
    file of it. Every rank must call it."""
    ranks = spec.device.devices_per_node
    if spec.device.world_size == 1 or ranks == 1 or not (spec.data.packing or spec.data.length_aware != "off"):
        return private_table(count)
    leads = rank % ranks == 0
    host = socket.gethostname()
    path = make_file(count) if leads else ""
    names = gather_objects((host, path))
    leader, shared = names[rank - rank % ranks]
    table = private_table(count)
    if shared and leader == host:
        try:
            table = LengthTable(known=np.memmap(shared, np.int32, mode="r+", shape=(count,)), place=rank % ranks, ranks=ranks)
        except (OSError, ValueError):  # another container with the same host name
            table = private_table(count)
    gather_objects(None)  # all have opened it
    if path:
        Path(path).unlink(missing_ok=True)  # the memory stays until the last rank ends
    return table


def make_file(count: int) -> str:
    """A file of zeros that takes room only where it is written; '' if there is none."""
    try:
        handle, path = tempfile.mkstemp(prefix="omnilaunch-lengths-")
    except OSError:
        return ""
    with os.fdopen(handle, "wb") as file:
        file.truncate(4 * max(1, count))
    return path
