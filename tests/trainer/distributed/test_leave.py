"""Leaving the process group: on torch 2.7.1 a rank of gloo's hangs in one of a few dozen times, unless its threads are given a moment."""

import multiprocessing
import os
from typing import Any

import pytest

from tests.trainer.mortal import free_port

ROUNDS = 20
LIMIT_S = 300


def come_and_go(rank: int, ports: list[int], done: Any) -> None:
    import torch
    import torch.distributed

    from trainer.distributed.engine import stop_distributed

    torch.set_num_threads(1)
    for port in ports:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo")
        table = [torch.empty(1000) for _ in range(2)]
        torch.distributed.all_gather(table, torch.ones(1000))
        del table  # so that gloo's own thread is the last to hold the tensors
        stop_distributed()
        done.put(port)


@pytest.mark.slow
def test_every_rank_leaves() -> None:
    context = multiprocessing.get_context("spawn")
    done, ports = context.Queue(), [free_port() for _ in range(ROUNDS)]
    ranks = [context.Process(target=come_and_go, args=(rank, ports, done)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(LIMIT_S)
        assert [rank.exitcode for rank in ranks] == [0, 0], f"{done.qsize()} of {2 * ROUNDS} rounds"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
