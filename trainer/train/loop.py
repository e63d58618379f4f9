"""The training loop: from micro-batches to optimizer steps, with one metrics row per step."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType

import torch
from torch import Tensor

from trainer.contract import RunFailed, StepRow, TrainSpec
from trainer.distributed.engine import IGNORED, Engine, Update
from trainer.optim.schedule import lr_at
from trainer.train.nonfinite import StepSnapshot, gather_first_finding, restore_rng, take_snapshot, watch_modules
from trainer.train.watchdog import Watchdog

Batches = Iterable[tuple[dict[str, Tensor], ...]]
SKIPS_ALLOWED = 30  # a loss scale that starts at 2**16 is at 1 after 17


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step`: the last finished one. `seconds`: of all steps, also those before a resume, without saving. `loss`: of the last step. `ended`:
    why the run is finished before its last step; `scores`: of the evaluation that ended it, if this attempt made it."""

    step: int = 0
    stopped: bool = False
    seconds: float = 0.0
    loss: float | None = None
    ended: str = ""
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepRequests:
    """What a rank, or any rank, requests at the end of a step: to stop, to save, to report that a checkpoint could not be written."""

    stop: bool = False
    save: bool = False
    failed: bool = False


class StopFlag:
    """Set by SIGTERM or SIGINT; the loop checks it at the end of a step."""

    def __init__(self) -> None:
        self.up = False

    def raise_it(self, _number: int, _frame: FrameType | None) -> None:
        self.up = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it SIGTERM and SIGINT request a stop instead of ending the process. Yields the flag."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.raise_it) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    engine: Engine,
    batches: Batches,
    spec: TrainSpec,
    *,
    done: Progress,
    watchdog: Watchdog,
    write: Callable[[StepRow], None],
    own_requests: Callable[[], StepRequests],
    after_step: Callable[[int, StepRequests], bool],
    peak_bytes: Callable[[], int],
    name_samples: Callable[[int], str],
    save_last_good: Callable[[int], str],
) -> Progress:
    """Run the steps after `done`, for which `batches` are, up to spec.steps, or until a rank is asked to stop. `own_requests`: of this rank.
    `after_step(step, requests)` gets those of all ranks after each step, and returns whether to stop. `name_samples(step)`: where the samples
    of a step are. `save_last_good(step)`: save a checkpoint of this step, if there is none, and say where. Raises RunFailed for a non-finite
    loss or gradient, naming the samples and the layer."""
    source = iter(batches)
    step, seconds, loss, skips, stopped = done.step, done.seconds, done.loss, 0, done.stopped
    engine.model.train()
    while step < spec.steps and not stopped:
        began = time.perf_counter()  # includes waiting for data
        step += 1
        watchdog.begin(step, "data")
        micro_batches, snapshot = next(source), take_snapshot(engine)
        row, requests = train_step(engine, micro_batches, spec, step, own_requests=own_requests, watchdog=watchdog, peak_bytes=peak_bytes())
        row = replace(row, seconds=time.perf_counter() - began)
        skips = skips + 1 if row.skipped else 0
        if is_nonfinite(row, spec, skips):
            watchdog.begin(step, "search for the layer that failed", ends=False)
            first, kept = find_nonfinite_layer(engine, micro_batches, snapshot, partial(save_last_good, step - 1))
            raise RunFailed(nonfinite_message(row, skips, first, name_samples(step), kept))
        loss, seconds = row.loss, seconds + row.seconds
        write(row)
        watchdog.pause()
        stopped = after_step(step, requests) or requests.stop
    return Progress(step=step, stopped=stopped, seconds=seconds, loss=loss)


def train_step(
    engine: Engine,
    micro_batches: tuple[dict[str, Tensor], ...],
    spec: TrainSpec,
    step: int,
    *,
    own_requests: Callable[[], StepRequests],
    watchdog: Watchdog,
    peak_bytes: int,
) -> tuple[StepRow, StepRequests]:
    """One update from this rank's `micro_batches`. Returns the metrics row of the step over all ranks, and the requests of all ranks.

    The loss is the mean over the trained tokens of the global batch, so that the gradient does not depend on how the batch is split into
    ranks and micro-batches; the factor world_size cancels DeepSpeed's mean over ranks."""
    lr = lr_at(step, spec.steps, spec.optimizer)
    watchdog.phase("forward and backward")
    total, trained = accumulate(engine, micro_batches)
    watchdog.phase("update")
    update = engine.step(lr)
    if engine.average and not update.skipped:
        engine.average.update(step)
    watchdog.phase("exchange of the row")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
    requests = own_requests()  # here, so that a signal is answered at the end of the step in which it came
    # Bytes in KiB: float32 is exact up to 2**24 only, and an NPU has no float64.
    values = (tokens, peak_bytes / 1024, requests.stop, requests.save, requests.failed)
    own = torch.tensor(values, dtype=torch.float32, device=engine.device)
    table = engine.gather_vectors(torch.cat([total.view(1), trained.view(1), own]))
    return read_step_row(table, update, spec, step=step, lr=lr)


def accumulate(engine: Engine, micro_batches: tuple[dict[str, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Forward and backward passes of a step. Returns this rank's summed loss and the trained tokens of all ranks, float32, scalars."""
    trained = engine.sum_over_ranks(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches))
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for number, batch in enumerate(micro_batches, start=1):
        engine.begin_micro(last=number == len(micro_batches))
        loss = engine.loss_sum(batch)
        engine.backward(loss * (engine.world_size / trained))
        total += loss.detach()
        if number < len(micro_batches):
            engine.micro_step()
    return total, trained


def read_step_row(table: Tensor, update: Update, spec: TrainSpec, *, step: int, lr: float) -> tuple[StepRow, StepRequests]:
    """`table`: (ranks, 7) float32, the values of each rank."""
    losses, denominators, tokens, peaks, stops, saves, failures = table.unbind(dim=1)
    row = StepRow(
        step=step,
        steps=spec.steps,
        loss=float(losses.sum() / denominators[0]),
        lr=lr,
        grad_norm=update.grad_norm,
        samples=spec.batch.global_batch,
        tokens=int(tokens.sum()),
        seconds=0.0,
        peak_bytes=int(peaks.max()) * 1024,
        loss_scale=update.loss_scale,
        skipped=update.skipped,
    )
    return row, StepRequests(stop=bool(stops.any()), save=bool(saves.any()), failed=bool(failures.any()))


def is_nonfinite(row: StepRow, spec: TrainSpec, skips: int) -> bool:
    """Whether the run has to end. With dynamic loss scaling an overflow of the gradient alone skips the step and lowers the scale; that does
    not help if the loss is not finite."""
    if not math.isfinite(row.loss):
        return True
    if row.skipped:
        return spec.precision.loss_scaling != "dynamic" or skips > SKIPS_ALLOWED
    return not math.isfinite(row.grad_norm)


def find_nonfinite_layer(
    engine: Engine, micro_batches: tuple[dict[str, Tensor], ...], snapshot: StepSnapshot, save_last_good: Callable[[], str]
) -> tuple[str, str]:
    """After a step that changed no weight: save a checkpoint of the step before it, then repeat its forward and backward passes with the same
    random numbers and every layer checked. Every rank must call it. Returns the first finding, and where the checkpoint is."""
    restore_rng(engine, snapshot)
    try:
        kept = save_last_good()
    except RunFailed as error:  # on every rank, as for a full disk; the cause of the failure is still reported
        kept = str(error)
    restore_rng(engine, snapshot)
    with watch_modules(engine.model) as watch:
        accumulate(engine, micro_batches)
    return gather_first_finding(engine, watch), kept


def nonfinite_message(row: StepRow, skips: int, first: str, samples: str, kept: str) -> str:
    again = f" for the {skips}th time in a row, at a loss scale of {row.loss_scale:g}" if skips > 1 else ""
    return (
        f"step {row.step}: the loss is {row.loss:g} and the gradient norm {row.grad_norm:g}{again}. This step has changed no weight. {first} "
        f"Its samples: {samples}. {kept} Check the samples first; then start a new run from that checkpoint with a lower stage.optimizer.lr or a "
        "longer warmup, or in bf16 or fp32."
    )
