"""What changes how a run learns, in real runs of the tiny model: noise, smoothing, averages of the weights, and early stopping."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.mortal import Death, expect, result_of, rows_of, run_ranks
from trainer.contract import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    Augmentation,
    EarlyStop,
    Evaluation,
    EvaluationRow,
    Lora,
    StageSpec,
    TrainSpec,
)
from trainer.tensor.stream import find_stored_tensors
from trainer.train.early_stop import find_reason_to_stop
from trainer.train.step_hooks import samples_file

pytestmark = pytest.mark.usefixtures("one_thread")
EVALUATION = Evaluation(batch=16, max_new_tokens=4, limit=24, every=2, loss=True)
LORA = StageSpec(name="lora", kind="train", trainable=("projector",), lora=Lora(r=4, alpha=8, dropout=0.3, targets=("q_proj", "v_proj")))


def losses_of(spec: TrainSpec, name: str = METRICS_FILE) -> list[float]:
    return [row["loss"] for row in rows_of(spec, name)]


def standing(spec: TrainSpec, **stage: Any) -> TrainSpec:
    """The spec with a rate of zero, so that the weights stay, and options of the stage."""
    return replace(spec, optimizer=replace(spec.optimizer, lr=0.0), stage=replace(spec.stage, **stage))


# ------------------------------------------------------------------------------------------------------ noise and smoothing


@pytest.mark.parametrize("option", [{"neftune_alpha": 20.0}, {"label_smoothing": 0.2}], ids=lambda option: next(iter(option)))
def test_training_alone_is_changed(option: dict[str, float], tiny_spec: Any) -> None:
    """With weights that stay, the loss of each step is another one, and that of the held-out rows is the same to the last bit."""
    plain, changed = (tiny_spec(name, changes={"steps": 3, "evaluation": EVALUATION}) for name in ("plain", "changed"))
    plain, changed = standing(plain), standing(changed, **option)
    for spec in (plain, changed):
        expect(run_ranks(spec), 0)
    assert all(one != other for one, other in zip(losses_of(plain), losses_of(changed), strict=True))
    assert rows_of(plain, EVALUATIONS_FILE) == rows_of(changed, EVALUATIONS_FILE)


def test_smoothed_loss_is_computed_in_chunks_too(tiny_spec: Any) -> None:
    whole, chunked = (tiny_spec(name, changes={"steps": 2, "loss_chunk": chunk}) for name, chunk in (("whole", 0), ("chunked", 5)))
    specs = [replace(spec, stage=replace(spec.stage, label_smoothing=0.1)) for spec in (whole, chunked)]
    for spec in specs:
        expect(run_ranks(spec), 0)
    assert losses_of(specs[0]) == pytest.approx(losses_of(specs[1]), rel=1e-5)


NOISY_LAYOUTS = [
    pytest.param({"ranks": 2, "micro": 4}, {}, id="two ranks"),
    pytest.param({"micro": 4, "accumulation": 2}, {"padding_free": True}, id="no padding"),
    pytest.param({"ranks": 2, "micro": 4, "zero": 3}, {}, marks=pytest.mark.slow, id="ZeRO 3"),
]


@pytest.mark.parametrize(("arguments", "data"), NOISY_LAYOUTS)
def test_noise_and_images_do_not_depend_on_how_a_batch_is_divided(arguments: dict[str, Any], data: dict[str, Any], tiny_spec: Any) -> None:
    changes = {"steps": 3}
    augmentation = Augmentation(crop=0.5, colour=0.4, jpeg=75)
    alone, divided, quiet = tiny_spec("alone", changes=changes), tiny_spec("divided", changes=changes, **arguments), tiny_spec("quiet")
    noisy = [replace(spec, stage=replace(spec.stage, neftune_alpha=20.0)) for spec in (alone, divided)]
    noisy = [replace(spec, data=replace(spec.data, augmentation=augmentation)) for spec in noisy]
    noisy[1] = replace(noisy[1], data=replace(noisy[1].data, **data))
    for spec in (*noisy, quiet):
        expect(run_ranks(spec), *[0] * spec.device.world_size)
    assert losses_of(noisy[0]) == pytest.approx(losses_of(noisy[1]), rel=2e-5)
    assert losses_of(noisy[0]) != pytest.approx(losses_of(quiet)[:3], rel=1e-3)


def test_noise_of_a_resumed_lora_run_is_bitwise_identical(tiny_spec: Any) -> None:
    changes = {"steps": 5, "save_every": 2, "stage": replace(LORA, neftune_alpha=5.0)}
    quiet, killed = (tiny_spec(name, changes=changes) for name in ("quiet", "killed"))
    expect(run_ranks(quiet), 0)
    assert run_ranks(killed, Death(place="backward", call=4)).codes == (-9,)
    expect(run_ranks(killed), 0)
    assert rows_of(killed) == rows_of(quiet) and result_of(killed).weights_sha256 == result_of(quiet).weights_sha256


# ---------------------------------------------------------------------------------------------------- average of the weights

SHARDINGS = [
    pytest.param({}, id="no ZeRO"),
    pytest.param({"precision": "bf16", "zero": 2, "ranks": 2, "micro": 4}, id="ZeRO 2, bf16"),
    pytest.param({"zero": 3, "ranks": 2, "micro": 4}, id="ZeRO 3"),
    pytest.param({"precision": "bf16", "zero": 1, "ranks": 2, "micro": 4}, marks=pytest.mark.slow, id="ZeRO 1, bf16"),
    pytest.param({"precision": "pure_bf16", "zero": 1}, marks=pytest.mark.slow, id="pure_bf16"),
]


def averaging(spec: TrainSpec, weights: str, decay: float = 0.25) -> TrainSpec:
    return replace(spec, optimizer=replace(spec.optimizer, ema_decay=decay, ema_weights=weights))  # type: ignore[arg-type]


def state_of(spec: TrainSpec, step: int, kind: str) -> dict[str, torch.Tensor]:
    """Name -> master weights or averages, whole, of a checkpoint that a run can resume from."""
    found = find_stored_tensors(Path(spec.output) / f"checkpoints/step-{step:06d}/resume")
    return {name.partition("/")[2]: tensor.read_whole().float() for name, tensor in found.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("arguments", SHARDINGS)
def test_the_average_is_the_one_computed_by_hand(arguments: dict[str, Any], tiny_spec: Any) -> None:
    """From the master weights of every step; in the checkpoint beside the trained weights, or in their place."""
    changes = {"steps": 5, "save_every": 1, "keep_checkpoints": 9}
    start = standing(tiny_spec("start", changes={**changes, "steps": 2}, **arguments))
    plain = tiny_spec("plain", changes=changes, **arguments)
    beside, instead = (averaging(tiny_spec(use, changes=changes, **arguments), use) for use in ("trained", "average"))
    for spec in (start, plain, beside, instead):
        expect(run_ranks(spec), *[0] * spec.device.world_size)
    assert rows_of(plain) == rows_of(beside) == rows_of(instead), "an average changes no step"
    expected = state_of(start, 1, "master")
    for step in range(1, 5):
        decay = min(0.25, (1 + step) / (10 + step))
        masters = state_of(plain, step, "master")
        expected = {name: decay * value + (1 - decay) * masters[name] for name, value in expected.items()}
        for spec in (beside, instead):
            found = state_of(spec, step, "average")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.allclose(found[name].view(-1), value.view(-1), rtol=1e-5, atol=1e-7), f"{name} of step {step}"
    for step in range(1, 6):
        folders = [Path(spec.output) / f"checkpoints/step-{step:06d}" for spec in (plain, beside, instead)]
        files = [load_file(path / "model.safetensors") for path in (*folders, folders[1] / "average")]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0]), "the trained weights"
        assert all(torch.equal(files[2][name], files[3][name]) for name in files[0]), "the averages"
        assert any(not torch.equal(files[0][name], files[2][name]) for name in files[0])
        assert not (folders[2] / "average").exists()
    averages = state_of(instead, 4, "average")
    saved = load_file(Path(instead.output) / "checkpoints/step-000004/model.safetensors")
    dtype = next(iter(saved.values())).dtype  # transformers saves some parameters under other names
    assert all(any(torch.equal(value.to(dtype), one) for one in saved.values()) for value in averages.values())


@pytest.mark.parametrize("arguments", SHARDINGS)
def test_averages_survive_a_resume_and_are_what_is_evaluated(arguments: dict[str, Any], tiny_spec: Any) -> None:
    changes = {"steps": 6, "save_every": 2, "evaluation": EVALUATION}
    ranks = arguments.get("ranks", 1)
    quiet, killed = (averaging(tiny_spec(name, changes=changes, **arguments), "average", 0.9) for name in ("quiet", "killed"))
    trained = averaging(tiny_spec("trained", changes=changes, **arguments), "trained", 0.9)
    for spec in (quiet, trained):
        expect(run_ranks(spec), *[0] * ranks)
    assert -9 in run_ranks(killed, Death(place="backward", call=5 if ranks == 1 else 4)).codes
    expect(run_ranks(killed), *[0] * ranks)
    assert rows_of(killed) == rows_of(quiet) == rows_of(trained)
    assert rows_of(killed, EVALUATIONS_FILE) == rows_of(quiet, EVALUATIONS_FILE)
    assert result_of(killed).weights_sha256 == result_of(quiet).weights_sha256 != result_of(trained).weights_sha256
    assert losses_of(quiet, EVALUATIONS_FILE) != losses_of(trained, EVALUATIONS_FILE)


def test_averages_are_copied_for_a_background_checkpoint_and_of_an_adapter(tiny_spec: Any) -> None:
    changes = {"steps": 4, "save_every": 2, "keep_checkpoints": 9, "stage": LORA}
    waiting, behind = (tiny_spec(name, changes={**changes, "checkpoint_background": name == "behind"}) for name in ("waiting", "behind"))
    for use in ("trained", "average"):
        specs = [averaging(replace(spec, output=f"{spec.output}-{use}"), use) for spec in (waiting, behind)]
        for spec in specs:
            Path(spec.output).mkdir()
            expect(run_ranks(spec), 0)
        folders = [Path(spec.output) / "checkpoints/step-000002" for spec in specs]
        places = [""] if use == "average" else ["", "average/"]
        for place in places:
            one, other = (load_file(folder / f"{place}adapter_model.safetensors") for folder in folders)
            assert one and all(torch.equal(one[name], other[name]) for name in one)
        assert (folders[0] / "average").exists() == (use == "trained")


# ------------------------------------------------------------------------------------------------------------ early stopping


@pytest.mark.parametrize(
    ("values", "options", "stops_at"),
    [
        ([0.1, 0.2, 0.2, 0.2], {"patience": 2}, 4),
        ([0.1, 0.2, 0.2, 0.3], {"patience": 2}, 0),
        ([0.5], {"patience": 1}, 0),
        ([0.5, 0.5], {"patience": 1}, 2),
        ([0.1, 0.11, 0.12, 0.13], {"patience": 2, "min_delta": 0.05}, 3),
        ([3.0, 2.0, 2.5, 1.9], {"patience": 2, "metric": "loss"}, 0),
        ([3.0, 2.0, 2.5, 2.0], {"patience": 2, "metric": "loss"}, 4),
        ([3.0, 2.99, 2.98], {"patience": 2, "metric": "loss", "min_delta": 0.1}, 3),
        ([float("nan"), float("nan")], {"patience": 2, "metric": "loss"}, 2),
        ([0.5] * 9, {"patience": 0}, 0),
    ],
)
def test_when_a_run_stops(values: list[float], options: dict[str, Any], stops_at: int) -> None:
    stop = EarlyStop(**options)
    rows = [EvaluationRow(step=step, exact_match=value, loss=value, count=1, seconds=0.0) for step, value in enumerate(values, start=1)]
    reasons = [find_reason_to_stop(rows[:count], stop) for count in range(len(rows) + 1)]
    assert next((step for step, reason in enumerate(reasons) if reason), 0) == stops_at
    if stops_at:
        word = "evaluation" if stop.patience == 1 else "evaluations"
        assert reasons[stops_at] == f"stopped early at step {stops_at}: {stop.metric} did not improve over {stop.patience} {word}"


def test_a_run_that_learns_nothing_stops_early_also_after_a_death(tiny_spec: Any) -> None:
    """On both ranks, at the same step, with the best checkpoint kept; a later start finds a finished run."""
    changes = {
        "steps": 20,
        "save_every": 1,
        "keep_best": "loss",
        "evaluation": replace(EVALUATION, every=1),
        "early_stop": EarlyStop(patience=3, metric="loss"),
    }
    quiet, killed = (standing(tiny_spec(name, changes=changes, ranks=2, micro=4)) for name in ("quiet", "killed"))
    expect(run_ranks(quiet, Death(place="evaluate", call=5)), 0, 0)  # the last step is evaluated once: there is no fifth evaluation
    for death in (Death(place="evaluate", call=3), Death(place="complete", call=2)):  # the second one: as the last step is saved
        assert run_ranks(killed, death).codes[0] == -9
    expect(run_ranks(killed), 0, 0)
    for spec in (quiet, killed):
        result = result_of(spec)
        assert (result.status, result.steps, result.checkpoint) == ("finished", 4, "checkpoints/step-000004")
        assert result.ended == "stopped early at step 4: loss did not improve over 3 evaluations"
        assert [row["step"] for row in rows_of(spec, EVALUATIONS_FILE)] == [1, 2, 3, 4]
        assert result.best is not None and result.best.step == 1 and (Path(spec.output) / result.best.path).is_dir()
        assert result.evaluation["loss"] == losses_of(spec, EVALUATIONS_FILE)[-1]
        assert [row["step"] for row in rows_of(spec)] == [1, 2, 3, 4]
        answers = (Path(spec.output) / SAMPLES_FILE).read_text()
        assert answers == (Path(spec.output) / samples_file(4)).read_text() and answers.count("\n") == EVALUATION.limit
    again = expect(run_ranks(quiet), 0, 0)
    assert "is finished" in again.text and len(rows_of(quiet)) == 4
