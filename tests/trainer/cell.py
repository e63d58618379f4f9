"""One step of a tiny family in every stage, precision and ZeRO stage, by two ranks that stay: a process group costs seconds, a cell a
fraction of one.

The spec of a cell is planned by the launcher from conf/, as that of a user's run: this file has no engine config of its own.
"""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.contract import TrainSpec
from trainer.data.batch.load import batches
from trainer.data.check import resolve
from trainer.data.rows.sample import Sample, read_samples
from trainer.device.dtype import loading_dtype
from trainer.distributed.engine import Engine, start_distributed, start_engine
from trainer.distributed.zero3 import SOURCE_RANK, partition_model
from trainer.models import find_family
from trainer.stages.group import apply_stage
from trainer.train.loop import StepRequests, train_step
from trainer.train.model import CPU, create_on_meta, create_random
from trainer.train.watchdog import Watchdog

RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Cell:
    model: str
    stage: str
    precision: str
    zero: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.stage}-{self.precision}-zero{self.zero}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 saw of one step. `trained`: names that the stage gives gradients to; `reached`: those that a gradient came to, on either
    rank's side; `changed`: those whose values are others than before. `weights`: trained name -> values after, float32, by the name that
    peft gives them. `error`: a traceback in place of all that."""

    loss: float = 0.0
    grad_norm: float = 0.0
    trained: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    weights: dict[str, Any] | None = None
    error: str = ""


def run_cells(rank: int, port: int, specs: dict[Cell, TrainSpec], log: Path, answers: Any) -> None:
    """Be one of the ranks: every cell in turn, its outcome into the queue. Ends at the first one that fails, since the ranks part there."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    start_distributed(next(iter(specs.values())).device)
    samples = read_rows(next(iter(specs.values())))
    for cell, spec in specs.items():
        try:
            outcome = run_cell(spec, samples, rank)
        except Exception:
            outcome = Outcome(error=f"rank {rank}:\n{traceback.format_exc()}")
        if rank == 0 or outcome.error:
            answers.put((cell, outcome))
        if outcome.error:
            break
    torch.distributed.barrier() if not outcome.error else None
    answers.close()
    answers.join_thread()


def read_rows(spec: TrainSpec) -> tuple[Sample, ...]:
    places = resolve(spec.data)
    assert places.train
    return read_samples(places.train, places.images)[0]


def run_cell(spec: TrainSpec, samples: tuple[Sample, ...], rank: int) -> Outcome:
    family = find_family(spec.model.family)
    torch.manual_seed(spec.seed)
    started = create_on_meta if spec.partitioned and rank != SOURCE_RANK else partial(create_random, device=CPU)
    model = started(spec.model, family, loading_dtype(spec.precision))
    staged = apply_stage(model, spec, family.unused(model))
    trained = frozenset(name for name, p in staged.model.named_parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in staged.model.named_parameters()}
    if spec.partitioned:
        partition_model(staged.model, spec, CPU)
    reached: set[str] = set()
    for name, parameter in staged.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    torch.manual_seed(spec.seed + 1 + rank)  # for dropout
    engine = start_engine(staged.model, spec, torch.device("cpu"), rates=staged.rates)
    try:
        batch = next(iter(batches(samples, family.create_processor(spec.model), spec, rank=rank, first_step=0)))
        engine.model.train()
        watchdog = Watchdog(timeout_s=0, rank=rank, stream=io.StringIO(), end=sys.exit)
        row, _ = train_step(engine, batch, spec, 1, own_requests=StepRequests, watchdog=watchdog, peak_bytes=0)
        reached |= {name for name, p in engine.model.named_parameters() if p.grad is not None}
        after = dict(whole_parameters(engine))
    finally:
        engine.handle.destroy()
    return Outcome(
        loss=row.loss,
        grad_norm=row.grad_norm,
        trained=trained,
        reached=frozenset(reached),
        changed=frozenset(name for name, value in after.items() if rank == SOURCE_RANK and not torch.equal(value, before[name])),
        names=frozenset(before),
        weights={name: value.float().numpy() for name, value in after.items() if name in trained} if rank == 0 else None,
    )


def whole_parameters(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, frozen ones too, gathered where ZeRO 3 has cut it. Every rank must walk it to the end."""
    import deepspeed

    for name, parameter in engine.model.named_parameters():
        if engine.handle.zero_optimization_stage() < 3:
            yield name, parameter.detach().clone()
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.detach().clone()


def with_root(spec: TrainSpec, root: Path) -> TrainSpec:
    return replace(spec, data=replace(spec.data, root=str(root)))
