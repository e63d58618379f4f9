"""Ranks of a run as processes of their own, which may die by SIGKILL at a place that a test names.

They are forked from a server that has imported everything: a start costs a second instead of the ten that torchrun takes, so that a test
can afford many deaths. Everything else is as under torchrun: the same variables, the same main, and all ranks end with the first.
"""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import trainer.checkpoint.pending
import trainer.checkpoint.resume
import trainer.checkpoint.retention
import trainer.checkpoint.state
import trainer.checkpoint.writer
import trainer.distributed.engine
import trainer.programs.dispatch
import trainer.programs.train
import trainer.tensor.shard
from trainer.__main__ import main
from trainer.contract import METRICS_FILE, RESULT_FILE, SPEC_FILE, TrainResult, TrainSpec, read, write

LIMIT_S = 240  # of any run here, on a machine that has other things to do
LOOK_S = 0.005
END_S = 10.0  # that the others have to end by themselves, once one has ended with an error of its own

# name -> where the trainer looks a function up; a rank dies when it calls it
PLACES: dict[str, tuple[Any, str]] = {
    "backward": (trainer.distributed.engine.Engine, "backward"),
    "update": (trainer.distributed.engine.Engine, "step"),
    "save": (trainer.checkpoint.writer, "save_checkpoint"),
    "weights": (trainer.checkpoint.pending, "write_weights"),
    "state": (trainer.checkpoint.state, "gather_shard"),
    "random numbers": (trainer.checkpoint.state, "read_rng_state"),
    "complete": (trainer.checkpoint.pending, "complete"),
    "complete behind the steps": (trainer.checkpoint.writer, "complete"),
    "collect": (trainer.checkpoint.writer.CheckpointWriter, "_collect"),
    "sync": (trainer.checkpoint.pending, "sync_tree"),
    "remove": (trainer.checkpoint.retention, "remove"),
    "cut rows": (trainer.checkpoint.resume, "cut_rows"),
    "restore": (trainer.checkpoint.resume, "restore_state"),
    "evaluate": (trainer.programs.train, "evaluate"),
}


@dataclass(frozen=True, kw_only=True)
class Death:
    """Of `rank`, as it calls PLACES[place] for the `call`th time."""

    place: str
    call: int = 1
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Gone:
    """Exit codes by rank, negative for a signal, and what rank 0 and the others wrote."""

    codes: tuple[int, ...]
    text: str
    seconds: float


def run_ranks(
    spec: TrainSpec, death: Death | None = None, *, kill_when: Callable[[], bool] = lambda: False, meddle: Callable[[], None] | None = None
) -> Gone:
    """Start the ranks of a spec and wait for them; when one dies, the others are killed too. `kill_when`: asked all the time, kills them
    all. `meddle`: called in every rank before it starts; a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed", "peft", "transformers.models.llava"])
    path = Path(spec.output) / SPEC_FILE
    write(spec, path)
    port, began = free_port(), time.monotonic()
    log = Path(spec.output) / "log.txt"
    log.write_bytes(b"")
    ranks = [
        context.Process(target=be_rank, args=(path, log, rank, spec.device.world_size, port, death, meddle))
        for rank in range(spec.device.world_size)
    ]
    for rank in ranks:
        rank.start()
    wait_for_one(ranks, kill_when)
    for rank in ranks:
        rank.join(LIMIT_S)
    return Gone(codes=tuple(rank.exitcode or 0 for rank in ranks), text=log.read_text(errors="replace"), seconds=time.monotonic() - began)


def expect(gone: Gone, *codes: int) -> Gone:
    assert gone.codes == codes, gone.text
    return gone


def wait_for_one(ranks: list[Any], kill_when: Callable[[], bool]) -> None:
    until, left = time.monotonic() + LIMIT_S, list(ranks)
    while left and time.monotonic() < until and not kill_when():
        wait([rank.sentinel for rank in left], LOOK_S)
        if any(rank.exitcode for rank in ranks):
            break
        left = [rank for rank in left if rank.is_alive()]
    if any((rank.exitcode or 0) > 0 for rank in ranks):
        until = time.monotonic() + END_S
        for rank in left:
            rank.join(max(0.0, until - time.monotonic()))
    for rank in left:
        rank.kill()


def be_rank(path: Path, log: Path, rank: int, ranks: int, port: int, death: Death | None, meddle: Callable[[], None] | None) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    if death is not None and death.rank == rank:
        arm(death)
    if meddle is not None:
        meddle()
    sys.exit(main(["run", str(path)]))


def arm(death: Death) -> None:
    holder, name = PLACES[death.place]
    function, calls = getattr(holder, name), iter(range(1, death.call + 1))

    def die_or_call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == death.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(holder, name, die_or_call)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------- what they left


def rows_of(spec: TrainSpec, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Without what a clock or a memory gauge says."""
    rows = [json.loads(line) for line in (Path(spec.output) / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_bytes")} for row in rows]


def result_of(spec: TrainSpec) -> TrainResult:
    return read(TrainResult, Path(spec.output) / RESULT_FILE)


def fill_the_disk_of_rank_1() -> None:
    """While it writes its part of the second checkpoint."""
    save, calls = trainer.tensor.shard.save_file, itertools.count(1)

    def fail_once(*arguments: Any) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    if os.environ["RANK"] == "1":
        trainer.tensor.shard.save_file = fail_once
