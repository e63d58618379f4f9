"""What a start refuses, and what it takes from an earlier attempt."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.contract
import trainer.programs.inputs
from tests.trainer.mortal import Death, expect, run_ranks
from trainer.checkpoint.resume import choose_checkpoint
from trainer.contract import (
    CHECKPOINTS,
    METRICS_FILE,
    RESULT_FILE,
    Exit,
    FailureReport,
    InputRefused,
    Lora,
    StageSpec,
    TrainResult,
    TrainSpec,
    read,
    write,
)
from trainer.contract.checkpoint_files import STATE_FILE, CheckpointState, fixed_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def half_done(tiny_spec: Any) -> TrainSpec:
    """Killed in step 4 of 6, with checkpoints of steps 1, 2 and 3."""
    spec: TrainSpec = tiny_spec(changes={"steps": 6, "save_every": 1, "keep_checkpoints": 3})
    run_ranks(spec, Death(place="backward", call=4))
    return spec


def test_steps_whose_rows_are_lost_do_not_make_a_run_faster(half_done: TrainSpec) -> None:
    run = Path(half_done.output)
    (run / METRICS_FILE).unlink()
    gone = expect(run_ranks(half_done), 0)
    assert f"{METRICS_FILE} has rows of 0 of these steps only" in gone.text
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5, 6]
    measured = sum(row["samples"] for row in rows) / sum(row["seconds"] for row in rows)
    assert read(TrainResult, run / RESULT_FILE).samples_per_s == pytest.approx(measured)


def test_a_newer_version_s_checkpoint_is_not_passed_over_for_an_older_one(half_done: TrainSpec) -> None:
    """The run would do its step again, and write over it."""
    run = Path(half_done.output)
    path = run / CHECKPOINTS / "step-000003" / "omnilaunch_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": trainer.contract.SCHEMA + 1, "what": "is new"}))
    before = path.read_bytes()
    gone = expect(run_ranks(half_done), Exit.USAGE)
    assert f"written with schema {trainer.contract.SCHEMA + 1}, this version reads {trainer.contract.SCHEMA}" in gone.text
    assert read(FailureReport, run / "failure-rank0.json").kind == "InputRefused"
    assert path.read_bytes() == before and (run / METRICS_FILE).read_text().count("\n") == 3


def test_a_rank_with_other_rows_says_so_before_the_first_step(tiny_spec: Any) -> None:
    """It would train on other samples than it is dealt."""
    spec = tiny_spec(ranks=2, micro=4)
    gone = run_ranks(spec, meddle=change_rows_of_rank_1)
    report = read(FailureReport, Path(spec.output) / "failure-rank1.json")
    assert gone.codes[1] == Exit.USAGE and report.kind == "InputRefused"
    assert "rank 1 on" in report.message and "has other training rows than rank 0" in report.message
    assert not (Path(spec.output) / METRICS_FILE).exists()


def change_rows_of_rank_1() -> None:
    """As on a node with an older copy of the file."""
    if os.environ["RANK"] == "1":
        trainer.programs.inputs.hash_sources = lambda *_: "0" * 64


# ------------------------------------------------------------------------------------------------- changes that were accepted


@pytest.mark.slow
def test_a_finished_run_that_gets_more_steps_continues_from_the_checkpoint_that_has_its_state(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"steps": 4, "save_every": 3, "keep_checkpoints": 3})
    expect(run_ranks(spec), 0)
    run = Path(spec.output)
    before = (run / METRICS_FILE).read_text().splitlines()
    (run / RESULT_FILE).unlink()  # as the launcher archives it
    longer = replace(spec, steps=6)
    assert "steps was 4 and is 6" in expect(run_ranks(longer), Exit.USAGE).text
    gone = expect(run_ranks(replace(longer, accepted_changes=("steps",))), 0)
    assert "resuming from checkpoints/step-000003" in gone.text and "kept in checkpoints/ended-at-step-000004" in gone.text
    after = (run / METRICS_FILE).read_text().splitlines()
    assert [json.loads(row)["step"] for row in after] == [1, 2, 3, 4, 5, 6] and after[:3] == before[:3]
    assert (run / CHECKPOINTS / "ended-at-step-000004" / "model.safetensors").is_file()
    assert read(TrainResult, run / RESULT_FILE).steps == 6


def test_the_windows_of_a_run_that_gets_more_steps_still_end_where_it_ended(tiny_spec: Any) -> None:
    spec = tiny_spec(changes={"steps": 2, "save_every": 1, "keep_checkpoints": 9})
    spec = replace(spec, data=replace(spec.data, length_aware="window"))
    expect(run_ranks(spec), 0)
    run = Path(spec.output)
    (run / RESULT_FILE).unlink()
    expect(run_ranks(replace(spec, steps=3, accepted_changes=("steps",))), 0)
    ends = {step: read(CheckpointState, run / CHECKPOINTS / f"step-{step:06d}" / STATE_FILE).window_ends for step in (1, 2, 3)}
    assert ends == {1: (2,), 2: (2, 3), 3: (2, 3)}


def checkpoint_of(run: Path, spec: TrainSpec, step: int, **changes: Any) -> CheckpointState:
    values = {"schema": trainer.contract.SCHEMA, "step": step, "weights_sha256": "", "data_sha256": "rows", "world_size": 1, "files": {}}
    state = CheckpointState(**{**values, "spec": fixed_settings(spec), **changes})
    write(state, run / state.path / STATE_FILE)
    return state


@pytest.fixture
def saved(tiny_spec: Any) -> TrainSpec:
    """A run of 6 steps with a checkpoint of step 3."""
    spec: TrainSpec = tiny_spec(changes={"steps": 6})
    (Path(spec.output) / CHECKPOINTS / "step-000003").mkdir(parents=True)
    checkpoint_of(Path(spec.output), spec, 3)
    return spec


@pytest.mark.parametrize(
    ("changes", "accepted", "said"),
    [
        ({"steps": 9}, (), "steps was 6 and is 9"),
        ({"steps": 9}, ("data",), "steps was 6 and is 9"),
        ({"steps": 9}, ("steps",), ""),
        ({"steps": 2}, ("steps",), "run.steps=2, but the run has a checkpoint of step 3"),
        ({"seed": 9}, ("steps", "data"), "seed was 0 and is 9"),
        ({"data": {"train": "/more.json"}}, ("steps",), "data.train was"),
        ({"data": {"train": "/more.json"}}, ("data",), ""),
        ({"data": {"max_length": 7}}, ("data",), "data.max_length was"),
    ],
)
def test_only_what_was_accepted_may_differ_from_the_checkpoint(
    saved: TrainSpec, changes: dict[str, Any], accepted: tuple[Any, ...], said: str
) -> None:
    values = {key: replace(saved.data, **value) if key == "data" else value for key, value in changes.items()}
    spec = replace(saved, accepted_changes=accepted, **values)
    if not said:
        found = choose_checkpoint(spec, "rows")
        assert found is not None and found.step == 3
        return
    with pytest.raises(InputRefused) as caught:
        choose_checkpoint(spec, "rows")
    assert said in str(caught.value)


def test_changed_rows_must_be_accepted(saved: TrainSpec) -> None:
    with pytest.raises(InputRefused, match="the training rows have changed since"):
        choose_checkpoint(replace(saved, accepted_changes=("steps",)), "other rows")
    assert choose_checkpoint(replace(saved, accepted_changes=("data",)), "other rows") is not None


def test_weights_without_their_state_are_not_resumed(saved: TrainSpec) -> None:
    run = Path(saved.output)
    checkpoint_of(run, saved, 3, world_size=0)
    with pytest.raises(InputRefused, match="the checkpoint of step 3 has weights only"):
        choose_checkpoint(saved, "rows")
    assert (found := choose_checkpoint(replace(saved, steps=3, accepted_changes=("steps",)), "rows")) and found.step == 3
    (run / CHECKPOINTS / "step-000002").mkdir()
    checkpoint_of(run, saved, 2)
    assert (found := choose_checkpoint(saved, "rows")) and found.step == 2


@pytest.mark.slow
def test_rows_of_new_tokens_go_on_bit_by_bit(tiny_spec: Any) -> None:
    """Beside LoRA, killed in step 3 of 4, against a run that was not."""
    stage = StageSpec(name="lora", kind="train", trainable=(), lora=Lora(r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")))
    found = []
    for name, death in (("whole", None), ("killed", Death(place="backward", call=3))):
        spec: TrainSpec = tiny_spec(name, changes={"steps": 4, "save_every": 2, "stage": stage})
        spec = replace(spec, model=replace(spec.model, add_tokens=tuple(f"<l{number}>" for number in range(80))))
        if death:
            run_ranks(spec, death)
        expect(run_ranks(spec), 0)
        found.append(load_file(Path(spec.output) / CHECKPOINTS / "step-000004" / "adapter_model.safetensors"))
    whole, again = found
    assert whole.keys() == again.keys() and sum("trainable_tokens_delta" in key for key in whole) == 2
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
