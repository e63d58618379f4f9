"""Saves checkpoints while training waits, or in the background from a copy in host memory.

At most one background save runs at a time, and it uses no collective: the other writing ranks report to rank 0 with a file. Its errors reach
all ranks with the values that they exchange at each step, and are raised on all of them.
"""

import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint import RESUME_FOLDER, describe_failure
from trainer.checkpoint.pending import (
    PendingCheckpoint,
    SavedCheckpoint,
    begin_folder,
    complete,
    disk_error,
    disk_error_on_first_rank,
    plan_checkpoint,
    save_checkpoint,
    update_best_and_prune,
    write_weights,
)
from trainer.checkpoint.state import finish_state, full_state_bytes, gather_state, open_shards, weights_bytes
from trainer.contract import RunFailed, TrainSpec, WeightsLineage, write_text
from trainer.device.device import host_memory_bytes
from trainer.distributed.engine import Engine
from trainer.models.family import Processor
from trainer.tensor.shard import ShardWriter

RANK_DONE_FILE = ".written-{rank:03d}"  # in the folder, written by each rank but 0 when it is done: its error, or nothing
POLL_S = 0.05
LAST_WRITE_S = 60.0  # for the last files of a run that failed
MEMORY_SHARE = 0.8  # of the host's free memory that copies may use


class CheckpointWriter:
    """Saves for one engine. Every rank has one and calls the same methods at the same steps. With `background` training continues as soon as
    weights and optimizer state are copied, whole, to the host memory of the ranks of the first node."""

    def __init__(
        self, engine: Engine, processor: Processor, spec: TrainSpec, *, data_sha256: str, lineage: WeightsLineage, background: bool = False
    ) -> None:
        self.engine, self.processor, self.spec, self.background = engine, processor, spec, background
        self.context = {"data_sha256": data_sha256, "lineage": lineage}
        self.thread: threading.Thread | None = None
        self.problem = ""  # of this rank's thread
        self.abandoned = threading.Event()

    @property
    def failed(self) -> bool:
        return bool(self.problem)

    def save(self, step: int) -> SavedCheckpoint:
        """The checkpoint is on disk when it returns. Raises RunFailed like `save_checkpoint`."""
        self.settle()
        return save_checkpoint(self.engine, self.processor, self.spec, step, **self.context)  # type: ignore[arg-type]

    def begin(self, step: int) -> None:
        """The same, in the background if that is set. Raises RunFailed for the previous checkpoint, or if the disk is too full."""
        if not self.background or step >= self.spec.steps:
            self.save(step)
            return
        self.settle()
        engine = self.engine
        with engine.with_exported_weights():
            pending, copies, averages = self._copy_weights(step)
        shards = open_shards(engine, pending.partial_folder / RESUME_FOLDER, hold=True)
        rest = gather_state(engine, shards, writers=pending.writers)
        if engine.rank < pending.writers:
            work = (
                (lambda: self._finish(pending, copies, averages, shards, rest))
                if engine.rank == 0
                else (lambda: self._hand_in(pending, shards))
            )
            self.thread = threading.Thread(target=self._guard, args=(pending, work), name="checkpoint", daemon=True)
            self.thread.start()

    def _copy_weights(self, step: int) -> tuple[PendingCheckpoint, dict[str, Tensor], dict[str, Tensor]]:
        """Begin the folder, and copy weights and averages to the host of rank 0."""
        engine = self.engine
        weights, averages = engine.gather_weights(), engine.gather_averages()
        pending = plan_checkpoint(engine, self.spec, step, weights, averages=averages, **self.context)  # type: ignore[arg-type]
        no_room = disk_error_on_first_rank(engine, lambda: begin_folder(pending))
        if no_room:
            shutil.rmtree(pending.partial_folder, ignore_errors=True)
        engine.fail_together(no_room and describe_failure(self.spec, step, pending.needed, no_room))
        partitioned = engine.handle.zero_optimization_stage() == 3  # the gathered weights are copies already
        return pending, {name: weights.pop(name).to("cpu", copy=not partitioned) for name in tuple(weights)}, averages

    def settle(self) -> None:
        """Wait until the background save is complete. Raises RunFailed on every rank if it failed on one."""
        if not self.background:
            return
        if self.engine.rank:
            self._join()
        try:
            # Rank 0 is still writing, and learns here of a rank that could not even write its file, on a disk that is full.
            self.engine.fail_together(self.problem if self.engine.rank else "")
        except RunFailed:
            self.abandoned.set()
            raise
        finally:
            self._join()
        self.engine.fail_together(self.problem)

    def close(self) -> None:
        """After a failure, without the other ranks: some may be gone and will never report."""
        if self.thread is not None:
            self.thread.join(LAST_WRITE_S)
            self.abandoned.set()
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _guard(self, pending: PendingCheckpoint, work: Callable[[], str]) -> None:
        """Keeps a thread's exception, which would be lost otherwise."""
        try:
            problem = work()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.problem = problem and describe_failure(self.spec, pending.step, pending.needed, problem)

    def _hand_in(self, pending: PendingCheckpoint, shards: ShardWriter) -> str:
        """A rank other than 0: write its part of the state, then report."""
        problem = finish_state(self.engine.rank, shards, {})
        return disk_error(lambda: write_text(problem, pending.partial_folder / RANK_DONE_FILE.format(rank=self.engine.rank))) or problem

    def _finish(
        self, pending: PendingCheckpoint, copies: dict[str, Tensor], averages: dict[str, Tensor], shards: ShardWriter, rest: dict[str, Any]
    ) -> str:
        """Rank 0: write the weights and its part of the state, wait for the other ranks, rename the folder."""
        problem = disk_error(lambda: write_weights(self.engine, self.processor, pending.partial_folder, copies, averages))
        copies.clear(), averages.clear()
        problems = [problem or finish_state(0, shards, rest), *self._collect(pending)]
        problem = next(filter(None, problems), "") or disk_error(lambda: complete(pending, self.spec))
        if problem:
            shutil.rmtree(pending.partial_folder, ignore_errors=True)
        else:
            update_best_and_prune(self.spec)
        return problem

    def _collect(self, pending: PendingCheckpoint) -> list[str]:
        """The reports of the other writers, once all are there."""
        reports = []
        for rank in range(1, pending.writers):
            file = pending.partial_folder / RANK_DONE_FILE.format(rank=rank)
            while not file.exists():
                if self.abandoned.is_set():
                    return [f"rank {rank} has not written its part"]
                time.sleep(POLL_S)
            reports.append(file.read_text(encoding="utf-8"))
            file.unlink()
        return reports


def choose_background(engine: Engine, spec: TrainSpec) -> bool:
    """Whether checkpoints are written in the background, the same on every rank: not if the first node's memory is too small for a copy."""
    if not (spec.checkpoint_background and (spec.save_every or spec.save_every_s or spec.keep_best)):
        return False
    needed, free = weights_bytes(engine) + full_state_bytes(engine), host_memory_bytes()
    fits = needed <= free * MEMORY_SHARE
    if engine.rank == 0:
        cost = f"background checkpoints hold up to {needed / 2**30:.2f} GiB of the first node's memory, of {free / 2**30:.2f} GiB free"
        print(cost if fits else f"{cost}: too much, so training waits for each checkpoint", flush=True)
    return bool(engine.gather_vectors(torch.tensor([float(fits)], device=engine.device))[0, 0])
