"""Which rows a step trains on: a pure function of seed and step, independent of the number of ranks and workers."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def rows_of_step(step: int, *, seed: int, rows: int, global_batch: int) -> tuple[int, ...]:
    """Indices (from 0) of the `global_batch` rows of `step` (from 0), in order.

    The rows of all steps in sequence are one permutation of range(rows) after the other; a batch may span several of them.
    """
    if rows < 1 or global_batch < 1 or step < 0:
        raise ValueError(f"rows_of_step needs rows and global_batch >= 1 and step >= 0, got {rows}, {global_batch}, {step}")
    return rows_between(step * global_batch, (step + 1) * global_batch, seed=seed, rows=rows)


def rows_between(first: int, end: int, *, seed: int, rows: int) -> tuple[int, ...]:
    """Indices of the rows at the positions `first` to `end` - 1 of the sequence of all steps."""
    found: list[int] = []
    while first < end:
        epoch, offset = divmod(first, rows)
        taken = min(end - first, rows - offset)
        found += permute(rows, f"{seed}:{epoch}")[offset : offset + taken].tolist()
        first += taken
    return tuple(found)


def rows_of_rank(rows: tuple[int, ...], *, rank: int, world_size: int) -> tuple[int, ...]:
    """Every world_size-th row, starting at `rank`. The rows of all ranks are disjoint and together the whole step."""
    return rows[rank::world_size]


@lru_cache(maxsize=4)  # two epochs in one batch, for training and for a split of the data
def permute(rows: int, key: str) -> NDArray[np.int64]:
    """A permutation of range(rows) that depends only on `key`, in all versions of numpy.

    Sorts by the raw words of Philox-4x64-10 (Salmon et al., SC'11). numpy guarantees the stream of its bit generators (NEP 19);
    Generator.permutation and random.shuffle may change with a version.
    """
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")).random_raw(rows)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
