"""What happens between two steps: the profiler's window, an evaluation, a checkpoint."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from trainer.checkpoint.best import is_better, read_evaluations
from trainer.checkpoint.state import keep_rng_state
from trainer.checkpoint.writer import CheckpointWriter
from trainer.contract import CHECKPOINTS, EVALUATIONS_FILE, SAMPLES_FOLDER, EvaluationRow, TrainSpec
from trainer.contract.checkpoint_files import CHECKPOINT_NAME
from trainer.device.device import Device
from trainer.evaluation.evaluate import StopCheck
from trainer.observe.memory import MemoryPeaks
from trainer.observe.profile import ProfilerWindow
from trainer.observe.tracker import Trackers
from trainer.train.loop import StepRequests, StopFlag
from trainer.train.watchdog import Watchdog

# Evaluates into a file of the run's folder; metric -> value. {} without held-out rows, and when it was halted, which it asks between batches.
Score = Callable[[str, StopCheck | None], dict[str, float]]


class StepHooks:
    """`reach` the first step, then `cross` from each step to the next; every rank alike. `best`: the value to beat, of what stands. What a
    rank `asks` for reaches all of them with the row of the step; by rank 0's clock, since no two agree. Only a stop does not wait for the
    next row: an evaluation may be longer than the time that a launcher gives, so it asks whether it is `halted`."""

    def __init__(
        self,
        spec: TrainSpec,
        *,
        writer: CheckpointWriter,
        score: Score,
        device: Device,
        gauge: MemoryPeaks,
        watchdog: Watchdog,
        audience: Trackers,
        rank: int,
        best: float | None,
        halted: StopCheck,
    ) -> None:
        self.spec, self.writer, self.score, self.gauge, self.rank, self.best = spec, writer, score, gauge, rank, best
        self.device, self.watchdog, self.audience, self.halted = device, watchdog, audience, halted
        self.window = ProfilerWindow(spec, device, rank)
        self.saved_at = time.monotonic()
        self.kept = 0  # the step of the newest checkpoint, 0 for none

    def reach(self, step: int, *, evaluated: bool) -> bool:
        """`step` is done, by an earlier attempt or none. `evaluated`: that one also did what comes after it. Returns whether to stop here."""
        late = step > 0 and not evaluated and self._evaluates(step)
        if late:
            self._evaluate(step)
        self.kept = step
        self.gauge.enter("first step")
        self.window.reach(step + 1)
        return late and self.halted()

    def asks(self, stop: StopFlag) -> StepRequests:
        """What this rank wishes at the end of a step."""
        due = self.spec.save_every_s and time.monotonic() - self.saved_at >= self.spec.save_every_s
        return StepRequests(stop=stop.up, save=bool(due and self.rank == 0), failed=self.writer.failed)

    def cross(self, step: int, wish: StepRequests) -> bool:
        """Returns whether to stop here, which `wish` did not say. Raises RunFailed on every rank where a checkpoint could not be written."""
        if self.gauge.phase == "first step":
            self.gauge.enter("steps")
        self.window.reach(step + 1)
        if wish.failed:
            self.writer.settle()
        if wish.stop or step == self.spec.steps:  # the run saves then, and evaluates
            return False
        due = self._evaluates(step)
        record = due and self._evaluate(step)
        if due and self.halted():  # the run saves then, too
            return True
        if record or wish.save or (self.spec.save_every and step % self.spec.save_every == 0):
            self._save(step)
        return False

    def close(self) -> None:
        self.window.close()

    def _evaluates(self, step: int) -> bool:
        every = self.spec.evaluation.every
        return bool(every) and step % every == 0 and step < self.spec.steps

    def _evaluate(self, step: int) -> bool:
        """Leaves the random numbers as they were. Returns whether the weights of this step are the best so far, and to be kept."""
        self.watchdog.begin(step, "evaluation", ends=False)  # as long as it takes
        self.gauge.enter("evaluation")
        began = time.perf_counter()
        file = f"{SAMPLES_FOLDER}/step-{step:06d}.jsonl"
        with keep_rng_state(self.device.name):
            scores = self.score(file, self.halted)
        self.gauge.enter("steps")
        self.watchdog.rest()
        if not scores:
            return False
        row = make_evaluation_row(step, scores, seconds=time.perf_counter() - began)
        if self.rank == 0:
            record_evaluation(self.spec, row, self.audience, file)
        better = bool(self.spec.keep_best) and is_better(self.spec.keep_best, getattr(row, self.spec.keep_best), self.best)
        if better:
            self.best = getattr(row, self.spec.keep_best)
        return better

    def _save(self, step: int) -> None:
        self.watchdog.begin(step, "saving", ends=False)  # a slow disk is no hang: told, and left alone
        self.gauge.enter("saving")
        self.writer.begin(step)
        self.gauge.enter("steps")
        self.watchdog.rest()
        self.saved_at, self.kept = time.monotonic(), step

    def rescue(self, step: int) -> str:
        """Have a checkpoint of `step`, the last one that is of use, before the run ends in failure. Returns a sentence that says where.
        Raises RunFailed on every rank where it could not be written."""
        if step == 0:
            return "No step before it was done, and so there is no checkpoint."
        if step != self.kept:
            self._save(step)
        self.writer.settle()
        return f"The weights are those of step {step}, in {CHECKPOINTS}/{CHECKPOINT_NAME.format(step=step)}."


def make_evaluation_row(step: int, scores: dict[str, float], *, seconds: float) -> EvaluationRow:
    return EvaluationRow(step=step, exact_match=scores["exact_match"], count=int(scores["count"]), seconds=seconds, loss=scores.get("loss"))


def record_evaluation(spec: TrainSpec, row: EvaluationRow, audience: Trackers, file: str) -> None:
    """Append the row, unless an earlier attempt has. Rank 0 alone."""
    run = Path(spec.output)
    if row.step not in read_evaluations(run):
        with (run / EVALUATIONS_FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(row)) + "\n")
    values = {"exact_match": row.exact_match} | ({} if row.loss is None else {"loss": row.loss})
    audience.log(row.step, {f"evaluation/{name}": value for name, value in values.items()})
    audience.samples(row.step, (run / file).read_text(encoding="utf-8"))
