"""The loop without DeepSpeed: an engine that is a list of what happened."""

import math
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.contract import Precision, RunFailed, StepRow, TrainSpec
from trainer.distributed.engine import Update
from trainer.train.loop import SKIPS_ALLOWED, Progress, StepRequests, stop_on_signals, train
from trainer.train.watchdog import Watchdog


class ScriptedEngine:
    """Answers with the losses and updates that a test wrote down, and keeps the calls."""

    def __init__(self, losses: list[float], skipped: bool = False, norm: float = 1.0) -> None:
        self.losses, self.skipped, self.norm, self.average = losses, skipped, norm, None
        self.device, self.rank, self.world_size, self.model = torch.device("cpu"), 0, 1, torch.nn.Linear(1, 1)
        self.handle = SimpleNamespace(optimizer=SimpleNamespace())
        self.calls: list[str] = []

    def sum_over_ranks(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def gather_vectors(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0)

    def begin_micro(self, *, last: bool) -> None:
        self.calls.append("last micro-batch" if last else "micro-batch")

    def loss_sum(self, _batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(self.losses.pop(0) if len(self.losses) > 1 else self.losses[0])  # a failed step is done once more

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
        "watchdog": Watchdog(timeout_s=0, rank=0, stream=sys.stderr, end=pytest.fail),
        "write": rows.append,
        "own_requests": StepRequests,
        "after_step": lambda *_: None,
        "peak_bytes": lambda: 2048,
        "name_samples": lambda step: f"rows of {step}",
        "save_last_good": lambda step: f"Kept: {step}.",
    }
    return train(engine, steps, spec, **{**arguments, **changes}), rows  # type: ignore[arg-type]


@pytest.fixture
def spec(tiny_spec: Any) -> TrainSpec:
    made = tiny_spec()
    return replace(made, steps=3, optimizer=replace(made.optimizer, lr=1.0, schedule="constant", warmup=0))


def test_a_step_divides_by_the_trained_tokens_of_all_its_parts(spec: TrainSpec) -> None:
    engine = ScriptedEngine([2.0, 6.0] * 3)
    progress, rows = run(spec, engine, [(batch(1), batch(3))] * 3)
    assert engine.calls[:6] == ["micro-batch", "backward 0.500", "micro_step", "last micro-batch", "backward 1.500", "step 1"]
    assert [row.loss for row in rows] == [2.0, 2.0, 2.0]
    assert [(row.step, row.steps, row.tokens, row.samples, row.peak_bytes) for row in rows] == [(n, 3, 12, 8, 2048) for n in (1, 2, 3)]
    assert (progress.step, progress.stopped, progress.loss) == (3, False, 2.0)
    assert progress.seconds == pytest.approx(sum(row.seconds for row in rows))


def test_what_a_rank_asks_for_comes_back_with_the_step(spec: TrainSpec) -> None:
    wishes = [StepRequests(save=True), StepRequests(failed=True), StepRequests()]
    asked, seen = list(wishes), []
    run(spec, ScriptedEngine([1.0] * 3), [(batch(1),)] * 3, own_requests=lambda: asked.pop(0), after_step=lambda *pair: seen.append(pair))
    assert seen == list(enumerate(wishes, start=1))


def test_the_row_is_written_under_watch_and_nothing_is_between_two_steps(spec: TrainSpec) -> None:
    watchdog = Watchdog(timeout_s=1000, rank=0, stream=sys.stderr, end=pytest.fail)
    seen: list[tuple[int, str, bool]] = []

    def note(*_: Any) -> None:
        assert watchdog.current is not None
        step, phase, _, ends = watchdog.current
        seen.append((step, phase, ends))

    after_step: list[Any] = []
    run(
        spec,
        ScriptedEngine([1.0] * 3),
        [(batch(1),)] * 3,
        watchdog=watchdog,
        write=note,
        after_step=lambda *_: after_step.append(watchdog.current),
    )
    row = "exchange of the row"
    assert seen == [(1, row, True), (2, row, True), (3, row, True)]
    assert after_step == [None] * 3
    assert watchdog.current is None


def test_a_signal_ends_the_loop_after_the_step_that_it_met(spec: TrainSpec) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        progress, rows = run(
            replace(spec, save_every=1), ScriptedEngine([1.0] * 3), [(batch(1),)] * 3, own_requests=lambda: StepRequests(stop=stop.up)
        )
    assert (progress.step, progress.stopped, len(rows)) == (1, True, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_middle_of_a_step_ends_the_loop_with_that_step(spec: TrainSpec) -> None:
    class InterruptedEngine(ScriptedEngine):
        def step(self, lr: float) -> Update:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step(lr)

    with stop_on_signals() as stop:
        progress, rows = run(spec, InterruptedEngine([1.0] * 3), [(batch(1),)] * 3, own_requests=lambda: StepRequests(stop=stop.up))
    assert (progress.step, progress.stopped, len(rows)) == (1, True, 1)


def test_steps_that_are_done_are_counted_and_not_done_again(spec: TrainSpec) -> None:
    engine = ScriptedEngine([1.0])
    progress, rows = run(spec, engine, [(batch(1),)], done=Progress(step=2, seconds=100.0, loss=5.0))
    assert [row.step for row in rows] == [3]
    assert (progress.step, progress.loss) == (3, 1.0)
    assert progress.seconds == pytest.approx(100.0 + rows[0].seconds)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_step_and_samples_after_a_rescue(loss: float, spec: TrainSpec) -> None:
    rescued: list[int] = []

    def save_last_good(step: int) -> str:
        rescued.append(step)
        return f"Kept: {step}."

    said = r"step 2: the loss is (nan|inf).*every layer's output and gradient was finite.*Its samples: rows of 2\. Kept: 1\."
    with pytest.raises(RunFailed, match=said):
        run(spec, ScriptedEngine([1.0, loss]), [(batch(1),)] * 3, save_last_good=save_last_good)
    assert rescued == [1]


def test_a_rescue_that_fails_is_told_with_its_cause(spec: TrainSpec) -> None:
    def save_last_good(_: int) -> str:
        raise RunFailed("the disk is full.")

    with pytest.raises(RunFailed, match=r"step 1: the loss is nan.*rows of 1\. the disk is full\."):
        run(spec, ScriptedEngine([math.nan]), [(batch(1),)] * 3, save_last_good=save_last_good)


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


def test_a_lower_scale_does_not_help_a_loss_that_is_no_number(spec: TrainSpec) -> None:
    half = Precision(name="fp16", weights="float16", compute="float16", optimizer="float32", gradients="float32", loss_scaling="dynamic")
    with pytest.raises(RunFailed, match="step 1: the loss is inf"):
        run(replace(spec, precision=half), ScriptedEngine([math.inf], skipped=True, norm=math.inf), [(batch(1),)] * 3)
