"""What a rerun with another batch, other devices or another length changes, and what it says about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.bench.rerun import Rerun, plan_rerun
from launcher.bench.worktree import Tree
from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import make_plan
from launcher.record.recorded_run import RecordedRun, load_recorded_run
from tests.launcher.conftest import PLACE, PROJECT

FILES = ("data=files", "data.train=/d/a.json", "stage.global_batch=24", "run.epochs=2", "stage.optimizer.warmup=0.03")


def record(*overrides: str, rows: int = 0, steps: int = 0) -> RecordedRun:
    """The golden record, with a plan of these overrides."""
    config = compose(overrides, PROJECT / "conf")
    config = replace(config, data=replace(config.data, rows=rows), run=replace(config.run, steps=steps or config.run.steps))
    plan = make_plan(config, load_stacks(PROJECT / "images"), PLACE, run_id="golden", overrides=overrides)
    return replace(load_recorded_run(PROJECT / "tests/golden/record/1"), plan=plan)


def rerun(recorded: RecordedRun, *overrides: str) -> Rerun:
    return plan_rerun(recorded, overrides, (), Tree(project=PROJECT), PLACE, {}, conf=PROJECT / "conf", run_id="again")


@pytest.mark.parametrize(
    ("overrides", "batch", "note"),
    [
        (
            ("stage.global_batch=32",),
            (32, 32, 1),
            "batch: stage.global_batch 64 -> 32, micro-batch 64 -> 32: each step trains on other samples",
        ),
        (
            ("stage.global_batch=96",),
            (96, 48, 2),
            "batch: stage.global_batch 64 -> 96, micro-batch 64 -> 48, accumulation 1 -> 2: each step",
        ),
        (
            ("cluster.devices_per_node=4",),
            (64, 16, 1),
            "batch: micro-batch 64 -> 16, ranks 1 -> 4; stage.global_batch stays 64, so each step trains on the same samples",
        ),
        (("strategy.micro_batch=16",), (64, 16, 4), "batch: micro-batch 64 -> 16, accumulation 1 -> 4; stage.global_batch stays 64"),
        (("run.seed=2",), (64, 64, 1), ""),
    ],
)
def test_what_was_chosen_is_chosen_again_and_reported(overrides: tuple[str, ...], batch: tuple[int, ...], note: str) -> None:
    made = rerun(record(), *overrides)
    now = made.plan.spec.batch
    assert (now.global_batch, now.micro_batch, now.accumulation) == batch
    said = [line for line in made.notes if line.startswith("batch: ")]
    assert len(said) == bool(note) and "".join(said).startswith(note)


def test_what_torchrun_sets_for_another_number_of_ranks_is_not_expected_again() -> None:
    expects = rerun(record(), "cluster.devices_per_node=2").plan.spec.expects
    assert expects is not None and {"variable WORLD_SIZE", "variable LOCAL_WORLD_SIZE"} <= {*expects.free}
    expects = rerun(record(), "run.seed=2").plan.spec.expects
    assert expects is not None and not any("WORLD_SIZE" in name for name in expects.free)


def test_the_steps_stay_and_their_samples_are_named() -> None:
    made = rerun(record(), "stage.global_batch=32")
    assert made.plan.spec.steps == 300
    assert "run.steps stays 300: 9,600 samples in all, the recorded run had 19,200" in made.notes
    made = rerun(record(), "stage.global_batch=32", "run.steps=600")
    assert made.plan.spec.steps == 600 and not any(note.startswith("run.steps stays") for note in made.notes)


def test_a_shorter_rerun_has_a_shorter_warmup_unless_it_was_typed() -> None:
    assert rerun(record(), "run.steps=10").plan.spec.optimizer.warmup == 2
    with pytest.raises(ConfigRefused, match="20 warm-up steps, but the run has 10"):
        rerun(record("stage.optimizer.warmup=20"), "run.steps=10")


def test_a_typed_micro_batch_is_kept_and_the_refusal_says_what_keeps_the_batch() -> None:
    recorded = record("strategy.micro_batch=16")
    assert rerun(recorded, "stage.global_batch=32").plan.spec.batch.micro_batch == 16
    with pytest.raises(
        ConfigRefused, match=r"8 samples cannot be divided(.|\n)*would pass: strategy\.micro_batch=8  or  stage\.global_batch=16"
    ):
        rerun(recorded, "stage.global_batch=8")
    with pytest.raises(ConfigRefused, match=r"64 samples cannot be divided among 3 rank(.|\n)*stage\.global_batch=6[36]"):
        rerun(record(), "cluster.devices_per_node=3")


def test_a_rerun_keeps_the_steps_that_its_epochs_gave(tmp_path: Path) -> None:
    """No file is read: /d/a.json is not on this machine."""
    recorded = record(*FILES, rows=60, steps=5)
    plan = rerun(recorded).plan
    assert (plan.spec.steps, plan.config.run.epochs, plan.spec.data.rows) == (5, 2.0, 60)
    plan = rerun(recorded, "stage.global_batch=12").plan
    assert (plan.spec.steps, plan.config.run.epochs, plan.spec.data.rows) == (5, None, 0)
    plan = rerun(recorded, "run.steps=9").plan
    assert (plan.spec.steps, plan.config.run.epochs) == (9, None) and "run.epochs=2" not in plan.overrides
    with pytest.raises(ConfigRefused, match=r"64 samples, but data\.train has 60 rows"):
        rerun(recorded, "stage.global_batch=64")


def test_other_epochs_of_a_rerun_are_counted_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}]")
    recorded = record("data=files", f"data.train={tmp_path}/a.json", "stage.global_batch=2", *FILES[3:], rows=10, steps=10)
    plan = rerun(recorded, "run.epochs=3").plan
    assert (plan.spec.steps, plan.config.data.rows) == (15, 10)
    assert [word for word in plan.overrides if word.startswith("run.")] == ["run.epochs=3"]
    (tmp_path / "b.json").write_text("[{}, {}, {}, {}]")
    assert rerun(recorded, "run.epochs=3", f"data.train={tmp_path}/b.json").plan.spec.steps == 6


def test_the_rows_of_another_file_are_counted_against_the_recorded_batch(tmp_path: Path) -> None:
    few, more = tmp_path / "few.json", tmp_path / "more.json"
    few.write_text("[{}, {}, {}, {}]")
    more.write_text(f"[{', '.join(['{}'] * 30)}]")
    recorded = record(*FILES, rows=60, steps=5)
    with pytest.raises(
        ConfigRefused,
        match=r"24 samples, but data\.train has 4 rows(.|\n)*would pass: stage\.global_batch=1 strategy\.micro_batch=1  or  stage",
    ) as refused:
        rerun(recorded, f"data.train={few}")
    assert "stage.global_batch=4" in str(refused.value)
    assert rerun(recorded, f"data.train={few}", "stage.global_batch=4", "strategy.micro_batch=1").plan.spec.batch.global_batch == 4, (
        "as it was offered"
    )
    plan = rerun(recorded, f"data.train={more}").plan
    assert (plan.config.data.rows, plan.spec.steps, plan.spec.batch.global_batch) == (30, 5, 24)
    assert rerun(recorded, "data.train=/not/here.json").plan.config.data.rows == 0, "not known, and not those of another file"
