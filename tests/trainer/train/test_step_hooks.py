"""Between two steps: evaluations and checkpoints that leave the steps as they were, also in a run that is killed."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainer.evaluation.evaluate
import trainer.train.step_hooks
from tests.trainer.mortal import Death, expect, result_of, rows_of, run_ranks
from trainer.checkpoint.best import find_best, is_better
from trainer.contract import (
    BEST_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    Best,
    Evaluation,
    Exit,
    Lora,
    StageSpec,
    read,
)
from trainer.contract.checkpoint_files import whole_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.3, targets=("q_proj", "v_proj")))
EVALUATION = Evaluation(batch=16, max_new_tokens=4, limit=24)
OFTEN = replace(EVALUATION, every=2, loss=True)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"zero": 3, "ranks": 2, "micro": 4}, marks=pytest.mark.slow, id="ZeRO 3, 2 ranks"),
        pytest.param({"zero": 2, "precision": "bf16", "micro": 4}, id="ZeRO 2"),
    ],
)
def test_evaluations_between_steps_change_no_step(arguments: dict[str, Any], tiny_spec: Any) -> None:
    """With dropout, which draws random numbers; and with answers of every evaluation kept."""
    changes = {"stage": LORA, "steps": 5}
    quiet = tiny_spec("quiet", changes=changes, **arguments)
    asked = tiny_spec("asked", changes={**changes, "evaluation": OFTEN}, **arguments)
    for spec in (quiet, asked):
        expect(run_ranks(spec), *[0] * spec.device.world_size)
    assert rows_of(asked) == rows_of(quiet)
    first, second = result_of(quiet), result_of(asked)
    assert first.weights_sha256 == second.weights_sha256
    evaluations = rows_of(asked, EVALUATIONS_FILE)
    assert [row["step"] for row in evaluations] == [2, 4, 5]
    assert all(row["count"] == 24 and row["loss"] > 0 for row in evaluations)
    assert second.evaluation == {key: float(evaluations[-1][key]) for key in ("exact_match", "count", "loss")}
    assert second.evaluation["exact_match"] == first.evaluation["exact_match"]
    samples = sorted(path.name for path in (Path(asked.output) / "samples").iterdir())
    assert samples == ["step-000002.jsonl", "step-000004.jsonl"]
    assert len((Path(asked.output) / "samples" / samples[0]).read_text().splitlines()) == 24
    assert {peak.phase for peak in second.peaks} == {"load", "first step", "steps", "evaluation", "saving"}
    assert all(peak.allocated_bytes > 2**20 for peak in second.peaks)


def test_a_killed_run_repeats_and_loses_no_evaluation_and_keeps_the_best(tiny_spec: Any) -> None:
    changes = {"steps": 8, "evaluation": OFTEN, "keep_best": "loss", "keep_checkpoints": 1, "save_every": 3, "checkpoint_background": True}
    quiet, killed = (tiny_spec(name, ranks=2, micro=4, zero=2, changes=changes) for name in ("quiet", "killed"))
    expect(run_ranks(quiet), 0, 0)
    for death in (Death(place="backward", call=4, rank=1), Death(place="evaluate", call=2), Death(place="complete behind the steps")):
        gone = run_ranks(killed, death)
        assert gone.codes[death.rank] == -9, gone.text
    expect(run_ranks(killed), 0, 0)
    assert rows_of(killed) == rows_of(quiet)
    assert rows_of(killed, EVALUATIONS_FILE) == rows_of(quiet, EVALUATIONS_FILE)
    assert [row["step"] for row in rows_of(quiet, EVALUATIONS_FILE)] == [2, 4, 6, 8]
    assert result_of(killed).weights_sha256 == result_of(quiet).weights_sha256
    for spec in (quiet, killed):
        best = read(Best, Path(spec.output) / BEST_FILE)
        assert best == result_of(spec).best == find_best(spec)
        losses = {row["step"]: row["loss"] for row in rows_of(spec, EVALUATIONS_FILE)}
        assert best.value == min(losses.values()) == losses[best.step]
        assert (Path(spec.output) / best.path / "config.json").is_file()
        assert {state.step for state in whole_checkpoints(Path(spec.output))} == {best.step, 8}
    assert result_of(killed).best == result_of(quiet).best


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    assert not is_better("loss", math.nan, None) and not is_better("loss", math.nan, 0.5) and not is_better("loss", None, None)
    assert is_better("loss", 0.5, None) and is_better("loss", 0.4, 0.5) and not is_better("loss", 0.5, 0.5)
    assert is_better("exact_match", 0.5, 0.4) and not is_better("exact_match", 0.4, 0.5)


def stop_in_the_second_step() -> None:
    """SIGTERM, so that the run ends at a step whose evaluation is due."""
    before = trainer.train.step_hooks.StepHooks.requests

    def requests(self: Any) -> Any:
        if self.profiler.first and self.spec.steps == 5 and (Path(self.spec.output) / METRICS_FILE).read_text().count("\n") == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self)

    trainer.train.step_hooks.StepHooks.requests = requests  # type: ignore[method-assign]


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tiny_spec: Any) -> None:
    quiet, stopped = (tiny_spec(name, changes={"steps": 5, "evaluation": OFTEN}) for name in ("quiet", "stopped"))
    expect(run_ranks(quiet), 0)
    expect(run_ranks(stopped, meddle=stop_in_the_second_step), 0)
    assert (result_of(stopped).status, result_of(stopped).steps) == ("stopped", 2)
    assert not (Path(stopped.output) / EVALUATIONS_FILE).exists()
    expect(run_ranks(stopped), 0)
    assert rows_of(stopped) == rows_of(quiet)
    assert rows_of(stopped, EVALUATIONS_FILE) == rows_of(quiet, EVALUATIONS_FILE)


def stop_in_an_evaluation() -> None:
    """SIGTERM to the last rank alone, as it answers its second batch."""
    before, calls = trainer.evaluation.evaluate.generate, iter(range(1, 1000))

    def generate(*arguments: Any, **named: Any) -> Any:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments, **named)

    trainer.evaluation.evaluate.generate = generate


def test_a_stop_in_an_evaluation_ends_the_run_without_another_step(tiny_spec: Any) -> None:
    """In the second of three batches: the third is not answered. The evaluation is made up for, also when a second stop comes in that."""
    many = replace(OFTEN, batch=4)
    changes = {"steps": 4, "evaluation": many, "keep_best": "loss", "keep_checkpoints": 1}
    quiet, stopped = (tiny_spec(name, ranks=2, micro=4, zero=2, changes=changes) for name in ("quiet", "stopped"))
    expect(run_ranks(quiet), 0, 0)
    expect(run_ranks(stopped, meddle=stop_in_an_evaluation), 0, 0)
    result = result_of(stopped)
    assert (result.status, result.steps, len(rows_of(stopped))) == ("stopped", 2, 2)
    assert result.checkpoint == "checkpoints/step-000002" and [state.step for state in whole_checkpoints(Path(stopped.output))] == [2]
    assert not (Path(stopped.output) / EVALUATIONS_FILE).exists() and not (Path(stopped.output) / "samples" / "step-000002.jsonl").exists()
    expect(run_ranks(stopped, meddle=stop_in_an_evaluation), 0, 0)
    again = result_of(stopped)
    assert (again.status, again.steps, again.weights_sha256) == ("stopped", 2, result.weights_sha256), "it stops where it is made up for"
    assert not (Path(stopped.output) / EVALUATIONS_FILE).exists()
    expect(run_ranks(stopped), 0, 0)
    assert rows_of(stopped) == rows_of(quiet)
    assert rows_of(stopped, EVALUATIONS_FILE) == rows_of(quiet, EVALUATIONS_FILE)
    assert result_of(stopped).weights_sha256 == result_of(quiet).weights_sha256


def test_a_stop_in_the_last_batch_keeps_the_evaluation(tiny_spec: Any) -> None:
    """Of two batches, without a loss to tell after them."""
    spec = tiny_spec(changes={"steps": 4, "evaluation": replace(EVALUATION, batch=12, every=2), "keep_best": "exact_match"})
    expect(run_ranks(spec, meddle=stop_in_an_evaluation), 0)
    result = result_of(spec)
    assert (result.status, result.steps, len(rows_of(spec))) == ("stopped", 2, 2)
    assert [row["step"] for row in rows_of(spec, EVALUATIONS_FILE)] == [2]
    assert result.best is not None and result.best.step == 2


def test_by_the_clock_of_rank_0_all_ranks_save(tiny_spec: Any) -> None:
    spec = tiny_spec(ranks=2, micro=4, zero=2, changes={"steps": 4, "save_every_s": 1e-6, "keep_checkpoints": 9})
    expect(run_ranks(spec), 0, 0)
    assert sorted(state.step for state in whole_checkpoints(Path(spec.output))) == [1, 2, 3, 4]
    never = tiny_spec("never", changes={"steps": 3, "save_every_s": 3600.0, "keep_checkpoints": 9})
    expect(run_ranks(never), 0)
    assert [state.step for state in whole_checkpoints(Path(never.output))] == [3]


def test_keeping_the_best_without_a_measure_is_refused(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"keep_best": "loss", "evaluation": replace(EVALUATION, every=2)})
    gone = expect(run_ranks(spec), Exit.USAGE)
    assert "run.keep_best=loss: no evaluation measures it. Set run.evaluation.loss=true, or leave run.keep_best empty." in gone.text
    assert not (Path(spec.output) / "checkpoints").exists()
