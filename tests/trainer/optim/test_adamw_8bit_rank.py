"""Runs whose moments are in 8 bits: on one rank and two, with every ZeRO stage, killed, and gone on with by other ranks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.conftest import make_spec
from tests.trainer.mortal import Death, run_ranks
from trainer.contract import ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, EnvReport, TrainResult, TrainSpec, read

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]  # a dozen runs of two ranks
STEPS = 6


@pytest.fixture
def make(tmp_path: Path, digits: Path) -> Callable[..., TrainSpec]:
    """A width whose matrices are large enough for codes, and which 3 ranks do not divide evenly."""

    def spec_of(name: str, ranks: int, zero: int, precision: str = "fp32", bits: int = 8, save_every: int = 0) -> TrainSpec:
        (tmp_path / name).mkdir(exist_ok=True)
        made = make_spec(tmp_path / name, digits, width=64, ranks=ranks, zero=zero, precision=precision, micro=12 // ranks)
        deepspeed = {**made.deepspeed, **({"zero_allow_untested_optimizer": True} if bits else {})}
        optimizer = replace(made.optimizer, state_bits=bits)
        return replace(made, steps=STEPS, save_every=save_every, optimizer=optimizer, deepspeed=deepspeed)

    return spec_of


def finish(spec: TrainSpec) -> tuple[str, list[float]]:
    """Run to the end: the hash of the weights, and the loss of each step."""
    gone = run_ranks(spec)
    assert gone.codes == (0,) * spec.device.world_size, gone.text
    rows = (Path(spec.output) / METRICS_FILE).read_text().splitlines()
    result: TrainResult = read(TrainResult, Path(spec.output) / RESULT_FILE)
    return result.weights_sha256, [json.loads(row)["loss"] for row in rows]


def test_every_zero_stage_and_number_of_ranks_learns_alike(make: Callable[..., TrainSpec]) -> None:
    """Only the blocks that a partition cuts have other scales than without; the float32 run shows what a code's error costs."""
    cells = {f"{ranks} ranks, ZeRO {zero}": (ranks, zero) for ranks, zero in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3))}
    losses = {name: finish(make(name, *cell))[1] for name, cell in cells.items()}
    exact = finish(make("exact", 1, 0, bits=0))[1]
    print({name: [f"{loss:.5f}" for loss in found] for name, found in {**losses, "float32": exact}.items()})
    reference = losses.pop("1 ranks, ZeRO 0")
    for name, found in losses.items():
        assert found == pytest.approx(reference, abs=1e-4), name
    assert reference != exact and reference == pytest.approx(exact, abs=0.02)
    assert reference[-1] < reference[0] - 0.2


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("bf16", 2), ("bf16", 3)])
def test_a_run_that_was_killed_ends_with_the_very_same_weights(precision: str, zero: int, make: Callable[..., TrainSpec]) -> None:
    quiet, killed = make("quiet", 2, zero, precision), make("killed", 2, zero, precision, save_every=2)
    expected = finish(quiet)
    for death in (Death(place="backward", call=4, rank=1), Death(place="state", call=9), Death(place="update", call=2)):
        gone = run_ranks(killed, death)
        assert gone.codes[death.rank] == -9, gone.text
    assert finish(killed) == expected
    environment: EnvReport = read(EnvReport, Path(killed.output) / ENVIRONMENT_FILE)
    assert environment.deepspeed["taken"]["state_bits"] == 8


@pytest.mark.parametrize(("saved", "goes_on"), [((2, 3), (1, 0)), ((2, 2), (3, 3))])
def test_another_number_of_ranks_goes_on_within_a_codes_error(
    saved: tuple[int, int], goes_on: tuple[int, int], make: Callable[..., TrainSpec]
) -> None:
    _, expected = finish(make("quiet", *saved))
    run_ranks(make("killed", *saved, save_every=3), Death(place="backward", call=4))
    assert (Path(make("killed", *saved).output) / "checkpoints" / "step-000003").is_dir()
    _, found = finish(make("killed", *goes_on, save_every=3))
    assert found[:3] == expected[:3]
    assert found == pytest.approx(expected, abs=1e-4)
