"""What runs between two steps: the profiler, an evaluation, a checkpoint."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint.best import is_better, read_evaluations
from trainer.checkpoint.resume import ResumePoint
from trainer.checkpoint.writer import CheckpointWriter
from trainer.contract import CHECKPOINTS, EVALUATIONS_FILE, SAMPLES_FOLDER, EvaluationRow, TrainSpec, WeightsLineage
from trainer.contract.checkpoint_files import CHECKPOINT_NAME
from trainer.data.rows.sample import Samples
from trainer.device.device import Device
from trainer.device.rng import keep_rng_state
from trainer.distributed.engine import Engine
from trainer.evaluation.evaluate import StopCheck
from trainer.models.family import Processor
from trainer.observe.memory import MemoryPeaks
from trainer.observe.profile import ProfilerWindow
from trainer.observe.tracker import Trackers
from trainer.train.early_stop import find_reason_to_stop
from trainer.train.loop import StepRequests, StopFlag
from trainer.train.watchdog import Watchdog

# Evaluates into a file of the run's folder: metric -> value. {} without held-out rows, and if a stop was requested between two batches.
Score = Callable[[str, StopCheck | None], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the steps need. `start`: where the run continues; `lineage`: the weights that the stage began with, and
    how its rows show images."""

    spec: TrainSpec
    engine: Engine
    processor: Processor
    samples: Samples
    device: Device
    memory: MemoryPeaks
    start: ResumePoint
    lineage: WeightsLineage
    trackers: Trackers
    score: Score


class StepHooks:
    """Call `before_first_step`, then `after_step` after each step, on every rank. A rank's `requests` reach all ranks with the step's metrics;
    saving by time follows rank 0's clock, since no two clocks agree. An evaluation may be longer than the launcher waits after a stop, so it
    checks `stop_requested` between batches."""

    def __init__(self, job: Job, writer: CheckpointWriter, watchdog: Watchdog, stop: StopFlag) -> None:
        self.spec, self.engine, self.score, self.memory, self.trackers = job.spec, job.engine, job.score, job.memory, job.trackers
        self.rank, self.device, self.best = job.engine.rank, job.device, job.start.best
        self.writer, self.watchdog, self.stop = writer, watchdog, stop
        self.profiler = ProfilerWindow(job.spec, job.device, self.rank)
        self.saved_at = time.monotonic()
        self.saved_step = 0  # of the newest checkpoint, 0 for none
        self.evaluations = list(job.start.evaluations)
        self.scores: dict[str, float] = {}  # all metrics of the newest evaluation of this attempt

    @property
    def ended(self) -> str:
        """Why the run ends before its last step, '' if it does not."""
        return find_reason_to_stop(self.evaluations, self.spec.early_stop)

    def before_first_step(self, step: int, *, evaluated: bool) -> bool:
        """`step`: the last finished step of an earlier attempt, or 0. `evaluated`: whether its evaluation is done. Returns whether to stop."""
        late = step > 0 and not evaluated and self._evaluates(step)
        if late:
            self._evaluate(step)
        self.saved_step = step
        self.memory.enter("first step")
        self.profiler.before_step(step + 1)
        return bool(step and self.ended) or (late and self.stop_requested())

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop: a collective."""
        return float(self.engine.sum_over_ranks(float(self.stop.up))) > 0

    def requests(self) -> StepRequests:
        """What this rank requests at the end of a step."""
        due = self.spec.save_every_s and time.monotonic() - self.saved_at >= self.spec.save_every_s
        return StepRequests(stop=self.stop.up, save=bool(due and self.rank == 0), failed=self.writer.failed)

    def after_step(self, step: int, requests: StepRequests) -> bool:
        """Returns whether to stop, apart from `requests`. Raises RunFailed on every rank if a checkpoint could not be written."""
        if self.memory.phase == "first step":
            self.memory.enter("steps")
        self.profiler.before_step(step + 1)
        if requests.failed:
            self.writer.settle()
        if requests.stop or step == self.spec.steps:  # the run then saves, and evaluates at the last step
            return False
        due = self._evaluates(step)
        record = due and self._evaluate(step)
        if due and (self.ended or self.stop_requested()):  # the run then saves, too
            return True
        if record or requests.save or (self.spec.save_every and step % self.spec.save_every == 0):
            self._save(step)
        return False

    def close(self) -> None:
        self.profiler.close()

    def _evaluates(self, step: int) -> bool:
        every = self.spec.evaluation.every
        return bool(every) and step % every == 0 and step < self.spec.steps

    def _evaluate(self, step: int) -> bool:
        """Keeps the state of the random numbers. Returns whether the weights of this step are the best so far, and must be saved."""
        self.watchdog.begin(step, "evaluation", ends=False)  # no time limit
        self.memory.enter("evaluation")
        began = time.perf_counter()
        file = samples_file(step)
        with keep_rng_state(self.device.name):
            scores = self.score(file, self.stop_requested)
        self.memory.enter("steps")
        self.watchdog.pause()
        if not scores:
            return False
        row = make_evaluation_row(step, scores, seconds=time.perf_counter() - began)
        if self.rank == 0:
            record_evaluation(self.spec, row, self.trackers, file)
        self.evaluations.append(row)
        self.scores = scores
        better = bool(self.spec.keep_best) and is_better(self.spec.keep_best, getattr(row, self.spec.keep_best), self.best)
        if better:
            self.best = getattr(row, self.spec.keep_best)
        return better

    def _save(self, step: int) -> None:
        self.watchdog.begin(step, "saving", ends=False)  # a slow disk is not a hang: it is reported, and nothing ends
        self.memory.enter("saving")
        self.writer.begin(step)
        self.memory.enter("steps")
        self.watchdog.pause()
        self.saved_at, self.saved_step = time.monotonic(), step

    def save_last_good(self, step: int) -> str:
        """Save a checkpoint of `step`, if there is none, before the run ends in failure. Returns a sentence that says where it is. Raises
        RunFailed on every rank if it could not be written."""
        if step == 0:
            return "It is the first step, so there is no checkpoint."
        if step != self.saved_step:
            self._save(step)
        self.writer.settle()
        return f"The weights of step {step} are in {CHECKPOINTS}/{CHECKPOINT_NAME.format(step=step)}."


def samples_file(step: int) -> str:
    """In the run's folder: the answers of the evaluation after this step."""
    return f"{SAMPLES_FOLDER}/step-{step:06d}.jsonl"


def make_evaluation_row(step: int, scores: dict[str, float], *, seconds: float) -> EvaluationRow:
    return EvaluationRow(step=step, exact_match=scores["exact_match"], count=int(scores["count"]), seconds=seconds, loss=scores.get("loss"))


def record_evaluation(spec: TrainSpec, row: EvaluationRow, trackers: Trackers, file: str) -> None:
    """Append the row, unless an earlier attempt did. On rank 0 only."""
    run = Path(spec.output)
    if row.step not in read_evaluations(run):
        with (run / EVALUATIONS_FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(row)) + "\n")
    values = {"exact_match": row.exact_match} | ({} if row.loss is None else {"loss": row.loss})
    trackers.log(row.step, {f"evaluation/{name}": value for name, value in values.items()})
    trackers.samples(row.step, (run / file).read_text(encoding="utf-8"))
