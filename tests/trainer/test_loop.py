"""The loop without DeepSpeed: an engine that is a list of what happened."""

import math
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.contract import Precision, RunFailed, StepRow, TrainSpec
from trainer.engine import Update
from trainer.loop import SKIPS_ALLOWED, Progress, StopFlag, stop_on_signals, train
from trainer.watchdog import Watchdog


class ScriptedEngine:
    """Answers with the losses and updates that a test wrote down, and keeps the calls."""

    def __init__(self, losses: list[float], skipped: bool = False, norm: float = 1.0) -> None:
        self.losses, self.skipped, self.norm = losses, skipped, norm
        self.device, self.world_size, self.model = torch.device("cpu"), 1, torch.nn.Linear(1, 1)
        self.calls: list[str] = []

    def add(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0)

    def loss_sum(self, _batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(self.losses.pop(0))

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append(f"backward {float(loss):.3f}")

    def micro_step(self) -> None:
        self.calls.append("micro_step")

    def step(self, lr: float) -> Update:
        self.calls.append(f"step {lr:g}")
        return Update(grad_norm=self.norm, loss_scale=8.0, skipped=self.skipped)


def batch(trained: int) -> dict[str, torch.Tensor]:
    labels = torch.full((1, 6), -100)
    labels[0, 6 - trained :] = 1
    return {"labels": labels, "attention_mask": torch.ones(1, 6)}


def run(
    spec: TrainSpec, engine: ScriptedEngine, steps: list[tuple[dict[str, torch.Tensor], ...]], **changes: Any
) -> tuple[Progress, list[StepRow]]:
    rows: list[StepRow] = []
    arguments: dict[str, Any] = {
        "done": Progress(),
        "stop": StopFlag(),
        "watchdog": Watchdog(timeout_s=0, rank=0, stream=sys.stderr, end=pytest.fail),
        "write": rows.append,
        "save": lambda _: None,
        "peak_bytes": lambda: 2048,
        "name_samples": lambda step: f"rows of {step}",
    }
    return train(engine, steps, spec, **{**arguments, **changes}), rows  # type: ignore[arg-type]


@pytest.fixture
def spec(tiny_spec: Any) -> TrainSpec:
    made = tiny_spec()
    return replace(made, steps=3, optimizer=replace(made.optimizer, lr=1.0, schedule="constant", warmup=0))


def test_a_step_divides_by_the_trained_tokens_of_all_its_parts(spec: TrainSpec) -> None:
    engine = ScriptedEngine([2.0, 6.0] * 3)
    progress, rows = run(spec, engine, [(batch(1), batch(3))] * 3)
    assert engine.calls[:4] == ["backward 0.500", "micro_step", "backward 1.500", "step 1"]
    assert [row.loss for row in rows] == [2.0, 2.0, 2.0]
    assert [(row.step, row.steps, row.tokens, row.samples, row.peak_bytes) for row in rows] == [(n, 3, 12, 8, 2048) for n in (1, 2, 3)]
    assert (progress.step, progress.stopped, progress.loss) == (3, False, 2.0)
    assert progress.seconds == pytest.approx(sum(row.seconds for row in rows))


def test_saving_every_few_steps_leaves_out_the_last(spec: TrainSpec) -> None:
    saved: list[int] = []
    run(replace(spec, steps=6, save_every=2), ScriptedEngine([1.0] * 6), [(batch(1),)] * 6, save=saved.append)
    assert saved == [2, 4]


def test_the_row_is_written_under_watch_and_a_save_is_told_but_not_ended(spec: TrainSpec) -> None:
    watchdog = Watchdog(timeout_s=1000, rank=0, stream=sys.stderr, end=pytest.fail)
    seen: list[tuple[int, str, bool]] = []

    def note(*_: Any) -> None:
        assert watchdog.current is not None
        step, phase, _, ends = watchdog.current
        seen.append((step, phase, ends))

    run(replace(spec, save_every=2), ScriptedEngine([1.0] * 3), [(batch(1),)] * 3, watchdog=watchdog, write=note, save=note)
    row = "exchange of the row"
    assert seen == [(1, row, True), (2, row, True), (2, "saving", False), (3, row, True)]
    assert watchdog.current is None


def test_a_signal_ends_the_loop_after_the_step_that_it_met(spec: TrainSpec) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        progress, rows = run(
            replace(spec, save_every=1), ScriptedEngine([1.0] * 3), [(batch(1),)] * 3, stop=stop, save=lambda _: pytest.fail("saved")
        )
    assert (progress.step, progress.stopped, len(rows)) == (1, True, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_middle_of_a_step_ends_the_loop_with_that_step(spec: TrainSpec) -> None:
    class Interrupted(ScriptedEngine):
        def step(self, lr: float) -> Update:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step(lr)

    with stop_on_signals() as stop:
        progress, rows = run(spec, Interrupted([1.0] * 3), [(batch(1),)] * 3, stop=stop)
    assert (progress.step, progress.stopped, len(rows)) == (1, True, 1)


def test_steps_that_are_done_are_counted_and_not_done_again(spec: TrainSpec) -> None:
    engine = ScriptedEngine([1.0])
    progress, rows = run(spec, engine, [(batch(1),)], done=Progress(step=2, seconds=100.0, loss=5.0))
    assert [row.step for row in rows] == [3]
    assert (progress.step, progress.loss) == (3, 1.0)
    assert progress.seconds == pytest.approx(100.0 + rows[0].seconds)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_step_and_samples(loss: float, spec: TrainSpec) -> None:
    with pytest.raises(RunFailed, match=r"step 2: the loss is (nan|inf).*Its samples: rows of 2\..*Checkpoints of earlier steps are whole"):
        run(spec, ScriptedEngine([1.0, loss, 1.0]), [(batch(1),)] * 3)


def test_a_gradient_that_is_no_number_fails_too(spec: TrainSpec) -> None:
    with pytest.raises(RunFailed, match="step 1: the loss is 1 and the gradient norm nan"):
        run(spec, ScriptedEngine([1.0] * 3, norm=math.nan), [(batch(1),)] * 3)


def test_skipped_steps_are_part_of_dynamic_scaling_until_they_do_not_end(spec: TrainSpec) -> None:
    scaling = replace(
        spec,
        steps=SKIPS_ALLOWED + 1,
        precision=Precision(
            name="fp16", weights="float16", compute="float16", optimizer="float32", gradients="float32", loss_scaling="dynamic"
        ),
    )
    few = replace(scaling, steps=SKIPS_ALLOWED)
    _, rows = run(few, ScriptedEngine([1.0] * few.steps, skipped=True, norm=math.inf), [(batch(1),)] * few.steps)
    assert all(row.skipped and row.loss_scale == 8.0 for row in rows)
    with pytest.raises(RunFailed, match=rf"for the {SKIPS_ALLOWED + 1}th time in a row, at a loss scale of 8"):
        run(scaling, ScriptedEngine([1.0] * scaling.steps, skipped=True, norm=math.inf), [(batch(1),)] * scaling.steps)


def test_a_skipped_step_without_scaling_is_a_failure(spec: TrainSpec) -> None:
    with pytest.raises(RunFailed, match="step 1"):
        run(spec, ScriptedEngine([1.0] * 3, skipped=True, norm=math.inf), [(batch(1),)] * 3)
