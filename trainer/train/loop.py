"""The training loop: from micro-batches to steps, a row each."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType

import torch
from torch import Tensor

from trainer.contract import RunFailed, StepRow, TrainSpec
from trainer.distributed.engine import IGNORED, Engine, Update
from trainer.optim.schedule import lr_at
from trainer.train.nonfinite import StepSnapshot, gather_first_finding, take_snapshot, restore_rng, watch_modules
from trainer.train.watchdog import Watchdog

Batches = Iterable[tuple[dict[str, Tensor], ...]]
SKIPS_ALLOWED = 30  # a scale that starts at 2**16 is at 1 after 17


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step`: the last one done. `seconds`: of the steps alone, those before a resume too, saving left out. `loss`: of the last step."""

    step: int = 0
    stopped: bool = False
    seconds: float = 0.0
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRequests:
    """What a rank, or any of them, asks for at the end of a step: to stop, to save, to hear that a checkpoint could not be written."""

    stop: bool = False
    save: bool = False
    failed: bool = False


class StopFlag:
    """Set by SIGTERM or SIGINT; the loop looks at it at the end of a step."""

    def __init__(self) -> None:
        self.up = False

    def raise_it(self, _number: int, _frame: FrameType | None) -> None:
        self.up = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it SIGTERM and SIGINT ask for a stop instead of ending the process. Yields the flag."""
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
    asks: Callable[[], StepRequests],
    between: Callable[[int, StepRequests], bool],
    peak_bytes: Callable[[], int],
    name_samples: Callable[[int], str],
    rescue: Callable[[int], str],
) -> Progress:
    """Run the steps after `done`, where `batches` begin, up to spec.steps, or fewer when any rank is asked to stop. `asks`: what this
    rank wishes; `between(step, wish)` follows each step with what any of them did, and says whether one was asked to stop meanwhile.
    `name_samples(step)`: where the samples of a step lie. `rescue(step)`: have a checkpoint of the last good step, and say where. Raises
    RunFailed, naming the samples and the layer, for a loss or gradient that is no number."""
    source = iter(batches)
    step, seconds, loss, skips, stopped = done.step, done.seconds, done.loss, 0, done.stopped
    engine.model.train()
    while step < spec.steps and not stopped:
        began = time.perf_counter()  # a step is as long as its data makes it wait, too
        step += 1
        watchdog.begin(step, "data")
        parts, noted = next(source), take_snapshot(engine)
        row, wish = train_step(engine, parts, spec, step, asks=asks, watchdog=watchdog, peak_bytes=peak_bytes())
        row = replace(row, seconds=time.perf_counter() - began)
        skips = skips + 1 if row.skipped else 0
        if is_nonfinite(row, spec, skips):
            watchdog.begin(step, "search for the layer that failed", ends=False)
            first, kept = find_nonfinite_layer(engine, parts, noted, partial(rescue, step - 1))
            raise RunFailed(nonfinite_message(row, skips, first, name_samples(step), kept))
        loss, seconds = row.loss, seconds + row.seconds
        write(row)
        watchdog.rest()
        stopped = between(step, wish) or wish.stop
    return Progress(step=step, stopped=stopped, seconds=seconds, loss=loss)


def train_step(
    engine: Engine,
    parts: tuple[dict[str, Tensor], ...],
    spec: TrainSpec,
    step: int,
    *,
    asks: Callable[[], StepRequests],
    watchdog: Watchdog,
    peak_bytes: int,
) -> tuple[StepRow, StepRequests]:
    """One update from this rank's micro-batches, `parts`. Returns the row of the step over all ranks, and what any of them asked for.

    The loss is the mean over the trained tokens of the whole global batch, so that the gradient is the same however the batch is
    cut into ranks and micro-batches; DeepSpeed's mean over ranks is undone by the factor world_size."""
    lr = lr_at(step, spec.steps, spec.optimizer)
    watchdog.phase("forward and backward")
    total, trained = accumulate(engine, parts)
    watchdog.phase("update")
    update = engine.step(lr)
    watchdog.phase("exchange of the row")
    read = sum(int(batch["attention_mask"].sum()) for batch in parts)
    wish = asks()  # here, so that a signal is answered at the end of the step that it met
    # Bytes in KiB, because float32 counts in ones up to 2**24 only, and float64 does not exist on an NPU.
    values = (read, peak_bytes / 1024, wish.stop, wish.save, wish.failed)
    own = torch.tensor(values, dtype=torch.float32, device=engine.device)
    table = engine.gather(torch.cat([total.view(1), trained.view(1), own]))
    return read_step_row(table, update, spec, step=step, lr=lr)


def accumulate(engine: Engine, parts: tuple[dict[str, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Forward and backward of a step. Returns this rank's summed loss and the trained tokens of all ranks, float32, scalars."""
    trained = engine.add(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in parts))
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for place, batch in enumerate(parts, start=1):
        engine.begin_micro(last=place == len(parts))
        loss = engine.loss_sum(batch)
        engine.backward(loss * (engine.world_size / trained))
        total += loss.detach()
        if place < len(parts):
            engine.micro_step()
    return total, trained


def read_step_row(table: Tensor, update: Update, spec: TrainSpec, *, step: int, lr: float) -> tuple[StepRow, StepRequests]:
    """`table`: (ranks, 7) float32, what each rank says of the step."""
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
    """Whether no further step makes sense. Skipping is part of dynamic loss scaling, where a gradient alone overflows: a lower scale helps
    it, and does nothing for a loss that is no number."""
    if not math.isfinite(row.loss):
        return True
    if row.skipped:
        return spec.precision.loss_scaling != "dynamic" or skips > SKIPS_ALLOWED
    return not math.isfinite(row.grad_norm)


def find_nonfinite_layer(engine: Engine, parts: tuple[dict[str, Tensor], ...], noted: StepSnapshot, rescue: Callable[[], str]) -> tuple[str, str]:
    """After a step that has changed no weight: have a checkpoint of the one before it, then do its forward and backward passes again, with the
    same random numbers and every layer under watch. Every rank must call it. Returns what was seen first, and where the checkpoint is."""
    restore_rng(engine, noted)
    try:
        kept = rescue()
    except RunFailed as error:  # on every rank, as a full disk is: the cause of it all is to be told too
        kept = str(error)
    restore_rng(engine, noted)
    with watch_modules(engine.model) as watch:
        accumulate(engine, parts)
    return gather_first_finding(engine, watch), kept


def nonfinite_message(row: StepRow, skips: int, first: str, samples: str, kept: str) -> str:
    again = f" for the {skips}th time in a row, at a loss scale of {row.loss_scale:g}" if skips > 1 else ""
    return (
        f"step {row.step}: the loss is {row.loss:g} and the gradient norm {row.grad_norm:g}{again}, so that this step is of no use and has "
        f"changed no weight. {first} Its samples: {samples}. {kept} Look at the samples first; then begin a new run from there with a lower "
        "stage.optimizer.lr or a longer warmup, or in bf16 or fp32."
    )
