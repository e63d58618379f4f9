"""Runs that are killed and started again, compared with uninterrupted runs."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

import trainer.__main__
import trainer.contract
import trainer.distributed.engine
import trainer.tensor.shard
from tests.trainer.conftest import make_spec
from tests.trainer.mortal import Death, expect, fill_the_disk_of_rank_1, result_of, rows_of, run_ranks
from trainer.contract import (
    CHECKPOINTS,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    EnvReport,
    Exit,
    FailureReport,
    InputRefused,
    Lora,
    StageSpec,
    TrainSpec,
    read,
)
from trainer.contract.checkpoint_files import (
    CheckpointState,
    cut_rows,
    default_of,
    fixed_settings,
    newest_checkpoint,
    refuse_other_run,
    whole_checkpoints,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.05, targets=("q_proj", "v_proj")))


def environment_of(spec: TrainSpec) -> EnvReport:
    return read(EnvReport, Path(spec.output) / ENVIRONMENT_FILE)


def assert_same_run(one: TrainSpec, other: TrainSpec) -> None:
    assert rows_of(one) == rows_of(other)
    assert [row["step"] for row in rows_of(one)] == list(range(1, one.steps + 1))
    first, second = result_of(one), result_of(other)
    assert (first.status, first.weights_sha256, first.evaluation) == (second.status, second.weights_sha256, second.evaluation)
    assert (first.steps, first.final_loss, first.checkpoint) == (second.steps, second.final_loss, second.checkpoint)
    assert (Path(one.output) / SAMPLES_FILE).read_text() == (Path(other.output) / SAMPLES_FILE).read_text()


# Every way to hold masters and moments, one rank and two, with deaths at every place where the disk is half-way.
LIVES: dict[str, tuple[dict[str, Any], StageSpec | None, tuple[Death, ...]]] = {
    "fp32, no ZeRO": (
        {"precision": "fp32", "zero": 0},
        None,
        (Death(place="backward", call=2), Death(place="weights"), Death(place="update", call=4), Death(place="evaluate")),
    ),
    "fp32, no ZeRO, LoRA": (
        {"precision": "fp32", "zero": 0, "ranks": 2, "accumulation": 2},
        LORA,
        (Death(place="state", call=9, rank=1), Death(place="complete", call=2), Death(place="evaluate", rank=1)),
    ),
    "bf16, ZeRO 1": (
        {"precision": "bf16", "zero": 1, "ranks": 2},
        None,
        (Death(place="backward", call=3, rank=1), Death(place="sync"), Death(place="restore")),
    ),
    "bf16, ZeRO 2, LoRA": (
        {"precision": "bf16", "zero": 2, "ranks": 2},
        LORA,
        (Death(place="random numbers", call=2, rank=1), Death(place="cut rows"), Death(place="remove")),
    ),
    "fp32, ZeRO 3": (
        {"precision": "fp32", "zero": 3, "ranks": 2},
        None,
        (Death(place="state", call=40), Death(place="update", call=4, rank=1), Death(place="weights", call=2), Death(place="evaluate")),
    ),
    "bf16, ZeRO 3, LoRA": (
        {"precision": "bf16", "zero": 3, "ranks": 2},
        LORA,
        (Death(place="backward", call=4), Death(place="evaluate", rank=1)),
    ),
    "pure_bf16, ZeRO 3": (
        {"precision": "pure_bf16", "zero": 3, "ranks": 2},
        None,
        (Death(place="complete", call=2), Death(place="backward", call=3)),
    ),
}
QUICK = ("fp32, no ZeRO", "bf16, ZeRO 3, LoRA")


# One life of a single rank and one of two ranks without a mark; all of them are more than a minute.
@pytest.mark.parametrize("life", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LIVES])
def test_a_run_that_was_killed_again_and_again_ends_as_if_nothing_had_happened(life: str, tiny_spec: Any) -> None:
    arguments, stage, deaths = LIVES[life]
    changes = {"steps": 6} | ({"stage": stage} if stage else {})
    quiet, killed = (
        tiny_spec(name, changes={**changes, "save_every": every}, **{"micro": 4, **arguments})
        for name, every in (("quiet", 0), ("killed", 2))
    )
    expect(run_ranks(quiet), *[0] * quiet.device.world_size)
    for death in deaths:
        gone = run_ranks(killed, death)
        assert gone.codes[death.rank] == -9, f"{death} did not come about:\n{gone.text}"
        assert not list((Path(killed.output) / CHECKPOINTS).glob("step-*/.*"))
        (Path(killed.output) / ENVIRONMENT_FILE).unlink(missing_ok=True)
    expect(run_ranks(killed), *[0] * killed.device.world_size)
    assert_same_run(quiet, killed)
    # every attempt says that its model is ready, one that has only to evaluate too
    assert environment_of(killed).deepspeed["taken"] == environment_of(quiet).deepspeed["taken"]
    assert {path.name for path in (Path(killed.output) / CHECKPOINTS).iterdir()} == {"step-000004", "step-000006"}
    assert not list(Path(killed.output).glob("failure*"))
    again = expect(run_ranks(killed), *[0] * killed.device.world_size)
    assert "is finished" in again.text and "nothing is left to do" in again.text
    assert_same_run(quiet, killed)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deaths_at_random_moments(ranks: int, tiny_spec: Any) -> None:
    """A few steps after the start of each attempt and then at any time: in a step, in a save, as the last save makes room."""
    arguments = {"precision": "bf16", "zero": 2, "micro": 2, "ranks": ranks, "accumulation": 4 // ranks}
    changes = {"steps": 40, "stage": LORA}
    quiet, killed = (
        tiny_spec(name, changes={**changes, "save_every": every}, **arguments) for name, every in (("quiet", 0), ("killed", 1))
    )
    expect(run_ranks(quiet), *[0] * ranks)
    draw, deaths = random.Random(ranks), 0
    while not (Path(killed.output) / RESULT_FILE).exists() or result_of(killed).status != "finished":
        deaths += any(run_ranks(killed, kill_when=at_random(killed, draw)).codes)
        assert deaths < 200
    assert deaths >= 5
    print(f"{deaths} deaths of {ranks} ranks")
    assert_same_run(quiet, killed)


def at_random(spec: TrainSpec, draw: random.Random) -> Callable[[], bool]:
    """True up to a tenth of a second after the run has come some steps further than it is."""
    path = Path(spec.output) / METRICS_FILE

    def count_rows() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wanted, delay_s = count_rows() + draw.randint(1, 4), draw.uniform(0, 0.1)
    reached: list[float] = []

    def look() -> bool:
        if not reached and count_rows() >= wanted:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + delay_s

    return look


@pytest.mark.parametrize(
    ("saved", "goes_on"),
    [pytest.param((2, 3), (1, 0), marks=pytest.mark.slow), ((2, 2), (3, 3))],
    ids=["ZeRO 3, 2 ranks to 1 without", "ZeRO 2, 2 ranks to 3 with ZeRO 3"],
)
def test_another_number_of_ranks_and_another_stage_go_on_within_rounding(
    saved: tuple[int, int], goes_on: tuple[int, int], tmp_path: Path, digits: Path
) -> None:
    """A width that 3 ranks do not divide evenly: ZeRO pads what they hold."""

    def make(name: str, ranks: int, zero: int) -> TrainSpec:
        (tmp_path / name).mkdir(exist_ok=True)
        made = make_spec(tmp_path / name, digits, width=40, ranks=ranks, zero=zero, micro=12 // ranks)
        return replace(made, steps=5, save_every=3)

    quiet, killed, other = make("quiet", *saved), make("killed", *saved), make("killed", *goes_on)
    expect(run_ranks(quiet), 0, 0)
    run_ranks(killed, Death(place="backward", call=4))
    gone = expect(run_ranks(other), *[0] * goes_on[0])
    assert f"the checkpoint was saved by {saved[0]} ranks, now there are {goes_on[0]}: equal up to rounding" in gone.text
    assert rows_of(other)[:3] == rows_of(quiet)[:3]
    for one, two in zip(rows_of(quiet), rows_of(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    first, second = (LlavaForConditionalGeneration.from_pretrained(Path(s.output) / result_of(s).checkpoint) for s in (quiet, other))
    assert max(float((p - q).detach().abs().max()) for p, q in zip(first.parameters(), second.parameters(), strict=True)) < 1e-5


def test_a_run_that_was_stopped_by_a_signal_goes_on(tiny_spec: Any) -> None:
    quiet, stopped = (tiny_spec(name, ranks=2, micro=4, changes={"steps": 6}) for name in ("quiet", "stopped"))
    expect(run_ranks(quiet), 0, 0)
    expect(run_ranks(stopped, meddle=stop_in_the_third_update), 0, 0)
    assert (result_of(stopped).status, result_of(stopped).steps) == ("stopped", 3)  # the step that the signal met, and no other
    gone = expect(run_ranks(stopped), 0, 0)
    assert f"resuming from {CHECKPOINTS}/step-000003" in gone.text
    assert_same_run(quiet, stopped)
    seconds = [json.loads(line)["seconds"] for line in (Path(stopped.output) / METRICS_FILE).read_text().splitlines()]
    assert result_of(stopped).seconds == pytest.approx(sum(seconds))


def stop_in_the_third_update() -> None:
    """SIGTERM, to one rank of two."""
    before, updates = trainer.distributed.engine.Engine.step, itertools.count(1)

    def step(engine: Any, lr: float) -> Any:
        if next(updates) == 3 and engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(engine, lr)

    trainer.distributed.engine.Engine.step = step  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------- which checkpoint, if any


@pytest.fixture
def half_done(tiny_spec: Any) -> TrainSpec:
    """Killed in step 4 of 6, with checkpoints of steps 1, 2 and 3."""
    spec: TrainSpec = tiny_spec(changes={"steps": 6, "save_every": 1, "keep_checkpoints": 3})
    run_ranks(spec, Death(place="backward", call=4))
    assert [state.step for state in sorted(whole_checkpoints(Path(spec.output)), key=lambda state: state.step)] == [1, 2, 3]
    return spec


def test_only_a_whole_checkpoint_of_this_very_run_counts(half_done: TrainSpec) -> None:
    run = Path(half_done.output)
    newest = newest_checkpoint(run)
    assert newest is not None and (newest.step, newest.world_size, newest.path) == (3, 1, f"{CHECKPOINTS}/step-000003")
    assert any(name.startswith("resume/") for name in newest.files)
    (run / newest.path / "resume" / "rest.json").write_text("cut")
    assert (newest_checkpoint(run) or newest).step == 2
    (run / CHECKPOINTS / "step-000002").rename(run / CHECKPOINTS / "step-000200")  # not its name
    (run / CHECKPOINTS / ".step-000009.partial").mkdir()
    assert (newest_checkpoint(run) or newest).step == 1
    assert newest_checkpoint(run / "nowhere") is None
    # the broken one of step 3 is ignored
    gone = expect(run_ranks(half_done), 0)
    assert "step-000003: resume/rest.json missing or not of the size that omnilaunch_state.json says" in gone.text
    assert "step-000200: its omnilaunch_state.json is of step 2" in gone.text
    assert [row["step"] for row in rows_of(half_done)] == [1, 2, 3, 4, 5, 6]


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_again(half_done: TrainSpec) -> None:
    folder = Path(half_done.output) / CHECKPOINTS
    (folder / "step-000001" / "omnilaunch_state.json").unlink()
    for name in ("step-000002", "step-000003"):
        (folder / name / "config.json").unlink()
    gone = expect(run_ranks(half_done), Exit.USAGE)
    report = read(FailureReport, Path(half_done.output) / "failure-rank0.json")
    assert report.message.startswith("no checkpoint of this run is complete. ") and report.kind == "InputRefused"
    assert all(name in report.message for name in ("step-000001: ", "step-000002: config.json missing", "step-000003: config.json missing"))
    assert "remove the folder to start at step 1" in gone.text
    assert len(rows_of(half_done)) == 3  # nothing was cut


def test_another_spec_or_other_data_is_refused_by_name(half_done: TrainSpec, digits: Path) -> None:
    other = replace(half_done, optimizer=replace(half_done.optimizer, lr=0.5), seed=7)
    gone = expect(run_ranks(other), Exit.USAGE)
    assert "step-000003 belongs to another run: optimizer.lr was 0.002 and is 0.5; seed was 0 and is 7." in gone.text
    assert read(FailureReport, Path(other.output) / "failure-rank0.json").kind == "InputRefused"
    assert len(rows_of(half_done)) == 3  # nothing was cut
    state = newest_checkpoint(Path(half_done.output))
    assert state is not None
    refuse_other_run(state, replace(half_done, save_every=50, device=replace(half_done.device, threads=2)), state.data_sha256)
    with pytest.raises(InputRefused, match="the training rows have changed since"):
        refuse_other_run(state, half_done, "0" * 64)


def test_a_checkpoint_from_a_newer_version_or_of_another_family_is_refused_and_stays(half_done: TrainSpec) -> None:
    run = Path(half_done.output)
    other = replace(half_done, model=replace(half_done.model, family="qwen2_5_vl"))
    state = newest_checkpoint(run)
    assert state is not None
    with pytest.raises(InputRefused, match=r"model.family was 'llava' and is 'qwen2_5_vl'"):
        refuse_other_run(state, other, state.data_sha256)
    for path in (run / CHECKPOINTS).glob("step-*/omnilaunch_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": trainer.contract.SCHEMA + 1}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("log.txt", "spec.json")}
    gone = expect(run_ranks(half_done), Exit.USAGE)
    assert f"written with schema {trainer.contract.SCHEMA + 1}, this version reads {trainer.contract.SCHEMA}" in gone.text
    assert all(path.read_bytes() == content for path, content in before.items())


def test_every_rank_of_a_node_writes_and_one_that_cannot_ends_all(tiny_spec: Any) -> None:
    spec = tiny_spec(ranks=2, micro=4, changes={"save_every": 1})
    gone = expect(run_ranks(spec, meddle=fill_the_disk_of_rank_1), Exit.RUN, Exit.RUN)
    assert gone.text.count("checkpoint of step 2 could not be written") == 2
    assert "No space left on device. The incomplete folder was removed. The checkpoint " in gone.text
    assert [path.name for path in (Path(spec.output) / CHECKPOINTS).iterdir()] == ["step-000001"]
    state = newest_checkpoint(Path(spec.output))
    assert state is not None
    assert {"resume/state-000-00000.safetensors", "resume/state-001-00000.safetensors", "resume/rest.json"} <= set(state.files)


def test_a_rank_without_the_checkpoint_says_so(tiny_spec: Any) -> None:
    spec = tiny_spec(ranks=2, micro=4, changes={"steps": 4, "save_every": 2})
    run_ranks(spec, Death(place="backward", call=3))
    gone = run_ranks(spec, meddle=move_output_of_rank_1)
    assert "rank 1 on" in gone.text and "has no complete" in gone.text and "from which rank 0 resumes" in gone.text
    assert gone.codes[1] == Exit.RUN


def move_output_of_rank_1() -> None:
    """As on a node that shares nothing with the first."""

    def elsewhere(cls: Any, path: Path) -> Any:
        spec = trainer.contract.read(cls, path)
        output = Path(spec.output) / "elsewhere"
        output.mkdir(exist_ok=True)
        return replace(spec, output=str(output))

    if os.environ["RANK"] == "1":
        trainer.__main__.read = elsewhere


def test_rows_after_the_checkpoint_are_cut_and_a_half_one_too(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "seconds": 0.5, "loss": 1.0 / step}) + "\n" for step in range(1, 5)]
    path = tmp_path / METRICS_FILE
    path.write_text("".join(rows) + '{"step": 5, "sec')
    kept = cut_rows(tmp_path, 4)
    assert (kept.count, kept.seconds, kept.loss) == (4, 2.0, 0.25)
    assert path.read_text() == "".join(rows)
    assert cut_rows(tmp_path, 2).count == 2
    assert path.read_text() == "".join(rows[:2])
    assert cut_rows(tmp_path, 0).loss is None and path.read_text() == ""
    assert cut_rows(tmp_path / "nowhere", 3).count == 0


def test_rows_after_a_gap_stand(tmp_path: Path) -> None:
    rows = {step: json.dumps({"step": step, "seconds": 0.5, "loss": 1.0 / step}) + "\n" for step in (1, 2, 4, 5, 6)}
    path = tmp_path / METRICS_FILE
    path.write_text(rows[1] + rows[2] + '{"st\n' + "7\n" + rows[4] + rows[2] + rows[5] + rows[6])
    kept = cut_rows(tmp_path, 5)
    assert (kept.count, kept.seconds, kept.loss) == (4, 2.0, 0.2)
    assert path.read_text() == rows[1] + rows[2] + rows[4] + rows[5]


def test_what_may_differ_between_attempts_is_where_and_how_fast(tiny_spec: Any) -> None:
    spec = tiny_spec()
    parts = fixed_settings(spec)
    assert {"seed", "steps", "batch.global_batch", "precision.name", "model.architecture.text.hidden_size", "stage.lora"} <= set(parts)
    assert not {key for key in parts if key.startswith(("device.", "deepspeed.", "evaluation."))}
    assert fixed_settings(replace(spec, output="/elsewhere", deepspeed={})) == parts
    assert json.loads(json.dumps(parts)) == parts


def test_a_checkpoint_of_a_version_with_a_fixed_number_of_rows_resumes(tiny_spec: Any) -> None:
    """The steps may be given in place of the epochs that they were counted for."""
    spec = tiny_spec()
    older = fixed_settings(spec) | {"data.rows": 40}
    state = CheckpointState(schema=1, step=3, weights_sha256="", data_sha256="a", world_size=1, spec=older, files={})
    refuse_other_run(state, spec, "a")


def test_a_checkpoint_of_a_version_without_a_setting_is_one_with_its_default(half_done: TrainSpec) -> None:
    state = newest_checkpoint(Path(half_done.output))
    assert state is not None
    new = ("optimizer.ema_decay", "stage.neftune_alpha", "data.augmentation.crop", "optimizer.decay")
    older = replace(state, spec={key: value for key, value in state.spec.items() if key not in new})
    refuse_other_run(older, half_done, state.data_sha256)
    other = replace(half_done, stage=replace(half_done.stage, neftune_alpha=5.0))
    with pytest.raises(InputRefused, match=r"stage.neftune_alpha was 0.0 and is 5.0"):
        refuse_other_run(older, other, state.data_sha256)
    assert [default_of(key) for key in (*new, "data.max_length", "no.such.key")] == [0.0, 0.0, 0.0, 0.1, None, None]
