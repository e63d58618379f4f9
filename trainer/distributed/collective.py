"""Collectives over Python objects, and refusals that every rank raises together. Every rank must call each of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed

from trainer.contract import InputRefused


def gather_objects(value: Any) -> list[Any]:
    """Each rank's value, by rank, on every rank; without a process group only the own one."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    gathered = [value] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def refuse_on_all_ranks() -> Iterator[None]:
    """An InputRefused that one rank raises within the block is raised on all ranks: otherwise the others would wait for it in the next
    collective until that times out."""
    problem = ""
    try:
        yield
    except InputRefused as error:
        problem = str(error)
    if first := next(filter(None, gather_objects(problem)), ""):
        raise InputRefused(first)
