"""The training loop: from micro-batches to steps, a row each."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trainer.contract import RunFailed, StepRow, TrainSpec
from trainer.engine import IGNORED, Engine
from trainer.schedule import lr_at
from trainer.watchdog import Watchdog

Batches = Iterable[tuple[dict[str, Tensor], ...]]
SKIPS_ALLOWED = 30  # a scale that starts at 2**16 is at 1 after 17


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step`: the last one done. `seconds`: of the steps alone, those before a resume too, saving left out. `loss`: of the last step."""

    step: int = 0
    stopped: bool = False
    seconds: float = 0.0
    loss: float | None = None


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
    stop: StopFlag,
    watchdog: Watchdog,
    write: Callable[[StepRow], None],
    save: Callable[[int], Any],
    peak_bytes: Callable[[], int],
    name_samples: Callable[[int], str],
) -> Progress:
    """Run the steps after `done`, where `batches` begin, up to spec.steps, or fewer when any rank is asked to stop; save every `save_every`
    steps, and not at the end. `name_samples(step)`: where the samples of a step lie. Raises RunFailed, naming them, for a loss or gradient
    that is no number."""
    source = iter(batches)
    step, seconds, loss, skips, stopped = done.step, done.seconds, done.loss, 0, False
    engine.model.train()
    while step < spec.steps and not stopped:
        began = time.perf_counter()  # a step is as long as its data makes it wait, too
        step += 1
        watchdog.begin(step, "data")
        row, stopped = train_step(engine, next(source), spec, step, stop=stop, watchdog=watchdog, peak_bytes=peak_bytes())
        row = replace(row, seconds=time.perf_counter() - began)
        skips = skips + 1 if row.skipped else 0
        refuse_nonsense(row, spec, skips, name_samples)
        loss, seconds = row.loss, seconds + row.seconds
        write(row)
        watchdog.rest()
        if spec.save_every and step % spec.save_every == 0 and step < spec.steps and not stopped:
            watchdog.begin(step, "saving", ends=False)  # a slow disk is no hang: told, and left alone
            save(step)
            watchdog.rest()
    return Progress(step=step, stopped=stopped, seconds=seconds, loss=loss)


def train_step(
    engine: Engine, parts: tuple[dict[str, Tensor], ...], spec: TrainSpec, step: int, *, stop: StopFlag, watchdog: Watchdog, peak_bytes: int
) -> tuple[StepRow, bool]:
    """One update from this rank's micro-batches, `parts`. Returns the row of the step over all ranks, and whether any was asked to stop.

    The loss is the mean over the trained tokens of the whole global batch, so that the gradient is the same however the batch is
    cut into ranks and micro-batches; DeepSpeed's mean over ranks is undone by the factor world_size."""
    lr = lr_at(step, spec.steps, spec.optimizer)
    watchdog.phase("forward and backward")
    trained = engine.add(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in parts))
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for place, batch in enumerate(parts, start=1):
        loss = engine.loss_sum(batch)
        engine.backward(loss * (engine.world_size / trained))
        total += loss.detach()
        if place < len(parts):
            engine.micro_step()
    watchdog.phase("update")
    update = engine.step(lr)
    watchdog.phase("exchange of the row")
    read = sum(int(batch["attention_mask"].sum()) for batch in parts)
    # The flag is read here, so that a signal is answered at the end of the step that it met. Bytes in KiB, because float32 counts in ones
    # up to 2**24 only, and float64 does not exist on an NPU.
    own = torch.tensor([read, peak_bytes / 1024, stop.up], dtype=torch.float32, device=engine.device)
    table = engine.gather(torch.cat([total.view(1), trained.view(1), own]))
    losses, denominators, tokens, peaks, stops = table.unbind(dim=1)
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
    return row, bool(stops.any())


def refuse_nonsense(row: StepRow, spec: TrainSpec, skips: int, name_samples: Callable[[int], str]) -> None:
    """Raises RunFailed when this step has spoilt the weights, or the loss scaler finds no scale at all."""
    if row.skipped and spec.precision.loss_scaling == "dynamic" and skips <= SKIPS_ALLOWED:
        return
    if not row.skipped and math.isfinite(row.loss) and math.isfinite(row.grad_norm):
        return
    again = f" for the {skips}th time in a row, at a loss scale of {row.loss_scale:g}" if skips > 1 else ""
    raise RunFailed(
        f"step {row.step}: the loss is {row.loss:g} and the gradient norm {row.grad_norm:g}{again}, so that this step is of no use. "
        f"Its samples: {name_samples(row.step)}. Look at them first; then lower stage.optimizer.lr or lengthen its warmup, "
        "or train in bf16 or fp32. Checkpoints of earlier steps are whole."
    )
