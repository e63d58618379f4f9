"""Where the ranks of a run begin: at the first step, or where an earlier attempt of the same run left off.

Rank 0 decides from its own disk, since that is where checkpoints are written; every other rank must find the same checkpoint.
"""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from trainer.checkpoint import RESUME, prune
from trainer.contract import FAILURE_FILES, METRICS_FILE, RESULT_FILE, InputRefused, RunFailed, SpecError, TrainResult, TrainSpec, read
from trainer.engine import Engine
from trainer.models.family import Family
from trainer.precision import loading_dtype
from trainer.resume import CheckpointState, Rows, cut_rows, newest_checkpoint, refuse_other_run, whole_state
from trainer.state import load_masters, restore_state


@dataclass(frozen=True, kw_only=True)
class Start:
    """`checkpoint` None: from the beginning. `rows`: those that stand, on rank 0 alone. `data_sha256`: of the training rows' file."""

    checkpoint: CheckpointState | None
    rows: Rows
    data_sha256: str

    @property
    def step(self) -> int:
        """The last one that is done."""
        return self.checkpoint.step if self.checkpoint else 0


def finished_before(spec: TrainSpec) -> TrainResult | None:
    """The result of a run that needs nothing more, on every rank. Each rank's report of an earlier failure goes away with this start."""
    rank = torch.distributed.get_rank()
    (Path(spec.output) / FAILURE_FILES.format(rank=rank)).unlink(missing_ok=True)
    found: TrainResult | None = None
    if rank == 0:
        try:
            found = read(TrainResult, Path(spec.output) / RESULT_FILE)
        except SpecError:
            found = None  # not there, or from a trainer that wrote another shape
        if found is not None and found.status != "finished":
            found = None
        if found is not None:
            print(f"{spec.output} is finished, as {RESULT_FILE} says: nothing is left to do", flush=True)
    result: TrainResult | None = tell_all(found)
    return result


def choose_start(spec: TrainSpec, data_sha256: str) -> Start:
    """Every rank must call it. Raises InputRefused on all of them for a checkpoint of another run, RunFailed on a rank that lacks it."""
    rank, run = torch.distributed.get_rank(), Path(spec.output)
    said: tuple[CheckpointState | None, str] = (None, "")
    if rank == 0:
        found = newest_checkpoint(run)
        try:
            if found is not None:
                refuse_other_run(found, spec, data_sha256)
            said = (found, "")
        except InputRefused as error:
            said = (None, str(error))
    checkpoint, refusal = tell_all(said)
    if refusal:
        raise InputRefused(refusal)
    if checkpoint is not None and whole_state(run / checkpoint.path) != checkpoint:
        raise RunFailed(
            f"rank {rank} on {socket.gethostname()} has no whole {run / checkpoint.path}, from which rank 0 goes on. Let the nodes share "
            "the run's folder, or copy that folder from the first node to this one, and start again."
        )
    start = Start(checkpoint=checkpoint, rows=Rows(), data_sha256=data_sha256)
    return Start(checkpoint=checkpoint, rows=clear_way(spec, start), data_sha256=data_sha256) if rank == 0 else start


def clear_way(spec: TrainSpec, start: Start) -> Rows:
    """Remove what an earlier attempt left half-done, and its rows of steps that will be done again. Returns the rows that stand."""
    run = Path(spec.output)
    prune(spec)
    if start.step < spec.steps:
        (run / RESULT_FILE).unlink(missing_ok=True)  # of an attempt that was stopped
    rows = cut_rows(run, start.step)
    if start.checkpoint is not None:
        print(f"going on from {start.checkpoint.path}", flush=True)
        if rows.count < start.step:
            print(f"{run / METRICS_FILE} has rows of {rows.count} of these steps only", flush=True)
        if start.checkpoint.world_size not in (0, spec.device.world_size):
            print(
                f"it was saved by {start.checkpoint.world_size} ranks, now there are {spec.device.world_size}: equal up to rounding, and "
                "each rank's random numbers begin anew from seed, step and rank",
                flush=True,
            )
    return rows


def tell_all(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    said = [value]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


# ---------------------------------------------------------------------------------------------------------------- going on


def resume_weights(model: torch.nn.Module, spec: TrainSpec, start: Start) -> None:
    """Before an engine takes the model. Nothing to do at the first step."""
    if start.checkpoint is not None:
        load_masters(model, Path(spec.output) / start.checkpoint.path / RESUME)


def resume_engine(engine: Engine, spec: TrainSpec, start: Start) -> None:
    """The last thing before the steps, since it sets the random numbers too."""
    if start.checkpoint is not None:
        folder = Path(spec.output) / start.checkpoint.path / RESUME
        restore_state(engine, folder, seed=spec.seed, step=start.step, world_size=start.checkpoint.world_size)


def trained_model(spec: TrainSpec, family: Family, base: torch.nn.Module, start: Start) -> torch.nn.Module:
    """The model as it stood after the last step. `base`: the model that the stage began with."""
    assert start.checkpoint is not None
    folder = Path(spec.output) / start.checkpoint.path
    if spec.stage.lora is None:
        return family.load(folder, spec.model, loading_dtype(spec.precision))
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)  # not merged: the same sums as in training
