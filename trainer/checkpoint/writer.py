"""Saves checkpoints in the steps' way, or behind the steps from a copy in the host's memory.

Behind the steps there is at most one under way, and no collective: the ranks that write tell rank 0 by a file beside theirs. What goes wrong
there is told by the row that the ranks exchange at each step, and raised on all of them.
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
    update_best_and_prune,
    disk_error_on_first_rank,
    plan_checkpoint,
    save_checkpoint,
    disk_error,
    write_weights,
)
from trainer.checkpoint.state import finish_state, full_state_bytes, gather_state, open_shards, weights_bytes
from trainer.contract import WeightsLineage, RunFailed, TrainSpec, write_text
from trainer.device.device import host_memory_bytes
from trainer.distributed.engine import Engine
from trainer.models.family import Processor
from trainer.tensor.shard import ShardWriter

RANK_DONE_FILE = ".written-{rank:03d}"  # in the folder, by a rank other than 0 that is through: what went wrong, or nothing
POLL_S = 0.05
LAST_WRITE_S = 60.0  # for the last files of a run that ends in failure
MEMORY_SHARE = 0.8  # of the host's free memory that copies may take


class CheckpointWriter:
    """Saves for one engine. Every rank has one and calls the same methods at the same steps. With `background` the steps go on as soon as
    the weights and the optimizer's state are copied to the host's memory, whole, by the ranks of the first node."""

    def __init__(
        self, engine: Engine, processor: Processor, spec: TrainSpec, *, data_sha256: str, origin: WeightsLineage, background: bool = False
    ) -> None:
        self.engine, self.processor, self.spec, self.background = engine, processor, spec, background
        self.said = {"data_sha256": data_sha256, "origin": origin}
        self.thread: threading.Thread | None = None
        self.problem = ""  # of this rank's thread
        self.abandoned = threading.Event()

    @property
    def failed(self) -> bool:
        return bool(self.problem)

    def save(self, step: int) -> SavedCheckpoint:
        """With all on the disk when it returns. Raises RunFailed as `save_checkpoint`."""
        self.settle()
        return save_checkpoint(self.engine, self.processor, self.spec, step, **self.said)  # type: ignore[arg-type]

    def begin(self, step: int) -> None:
        """The same, behind the steps where that is wanted. Raises RunFailed for the checkpoint before, or where there is no room."""
        if not self.background or step >= self.spec.steps:
            self.save(step)
            return
        self.settle()
        engine = self.engine
        weights = engine.gather_weights()
        draft = plan_checkpoint(engine, self.spec, step, weights, **self.said)  # type: ignore[arg-type]
        no_room = disk_error_on_first_rank(engine, lambda: begin_folder(draft))
        if no_room:
            shutil.rmtree(draft.aside, ignore_errors=True)
        engine.agree(no_room and describe_failure(self.spec, step, draft.needed, no_room))
        partitioned = engine.handle.zero_optimization_stage() == 3  # what was gathered is a copy already
        copies = {name: weights.pop(name).to("cpu", copy=not partitioned) for name in tuple(weights)}
        shards = open_shards(engine, draft.aside / RESUME_FOLDER, held=True)
        rest = gather_state(engine, shards, writers=draft.writers)
        if engine.rank < draft.writers:
            work = (lambda: self._finish(draft, copies, shards, rest)) if engine.rank == 0 else (lambda: self._hand_in(draft, shards))
            self.thread = threading.Thread(target=self._guard, args=(draft, work), name="checkpoint", daemon=True)
            self.thread.start()

    def settle(self) -> None:
        """Wait until what is under way is whole. Raises RunFailed on every rank where it could not be written on one."""
        if not self.background:
            return
        if self.engine.rank:
            self._join()
        try:
            # The first rank, which still writes, hears here of one that could not even leave it a word, on a disk that is full to the brim.
            self.engine.agree(self.problem if self.engine.rank else "")
        except RunFailed:
            self.abandoned.set()
            raise
        finally:
            self._join()
        self.engine.agree(self.problem)

    def close(self) -> None:
        """After a failure, without the other ranks: some of them may be gone, and what they have not written will not come."""
        if self.thread is not None:
            self.thread.join(LAST_WRITE_S)
            self.abandoned.set()
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _guard(self, draft: PendingCheckpoint, work: Callable[[], str]) -> None:
        """A thread's exception would be told to nobody."""
        try:
            problem = work()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.problem = problem and describe_failure(self.spec, draft.step, draft.needed, problem)

    def _hand_in(self, draft: PendingCheckpoint, shards: ShardWriter) -> str:
        """A rank other than the first: its part of the state, then word of it."""
        problem = finish_state(self.engine.rank, shards, {})
        return disk_error(lambda: write_text(problem, draft.aside / RANK_DONE_FILE.format(rank=self.engine.rank))) or problem

    def _finish(self, draft: PendingCheckpoint, copies: dict[str, Tensor], shards: ShardWriter, rest: dict[str, Any]) -> str:
        """Rank 0: the weights, its part of the state, and when all are through, the name."""
        problem = disk_error(lambda: write_weights(self.engine, self.processor, draft.aside, copies))
        copies.clear()
        problems = [problem or finish_state(0, shards, rest), *self._collect(draft)]
        problem = next(filter(None, problems), "") or disk_error(lambda: complete(draft, self.spec))
        if problem:
            shutil.rmtree(draft.aside, ignore_errors=True)
        else:
            update_best_and_prune(self.spec)
        return problem

    def _collect(self, draft: PendingCheckpoint) -> list[str]:
        """What the other writers say, when all have."""
        said = []
        for rank in range(1, draft.writers):
            word = draft.aside / RANK_DONE_FILE.format(rank=rank)
            while not word.exists():
                if self.abandoned.is_set():
                    return [f"rank {rank} has not written its part"]
                time.sleep(POLL_S)
            said.append(word.read_text(encoding="utf-8"))
            word.unlink()
        return said


def choose_background(engine: Engine, spec: TrainSpec) -> bool:
    """Whether checkpoints are written behind the steps, the same on every rank: not where the first node's memory has no room for a copy."""
    if not (spec.checkpoint_background and (spec.save_every or spec.save_every_s or spec.keep_best)):
        return False
    needed, free = weights_bytes(engine) + full_state_bytes(engine), host_memory_bytes()
    fits = needed <= free * MEMORY_SHARE
    if engine.rank == 0:
        cost = (
            f"checkpoints behind the steps hold up to {needed / 2**30:.2f} GiB of the first node's memory, of {free / 2**30:.2f} GiB free"
        )
        print(cost if fits else f"{cost}: too much, and so the steps wait for each checkpoint", flush=True)
    return bool(engine.gather(torch.tensor([float(fits)], device=engine.device))[0, 0])
