"""Runs that are killed by SIGKILL at moments that chance names, and end with the same weights as an uninterrupted run.

    pytest tests/trainer/train/test_kill.py --kills 50

shares 50 kills out to 1, 2 and 4 ranks. A kill is aimed at a part of the run's life (inside a step, while a checkpoint is written, at the
end of a pass over the data, at the start of an attempt) and falls anywhere within it.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.mortal import result_of, rows_of, run_ranks
from trainer.contract import CHECKPOINTS, METRICS_FILE, SAMPLES_FILE, Evaluation, TrainSpec

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = (1, 2, 4)
ROWS = 24  # of the training file
GLOBAL_BATCH = 4
PASS_STEPS = ROWS // GLOBAL_BATCH
SPREAD_S = 0.15  # longer than a step, or a save, on a machine that is not busy

Aim = Callable[[TrainSpec], bool]


def count_rows(spec: TrainSpec) -> int:
    path = Path(spec.output) / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(spec: TrainSpec) -> bool:
    return any((Path(spec.output) / CHECKPOINTS).glob(".step-*.partial"))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """`reached(spec, rows)`: whether the run is there, when it had `rows` rows as this attempt began."""

    name: str
    reached: Callable[[TrainSpec, int], bool]


MOMENTS = (
    Moment(name="in a step", reached=lambda spec, rows: count_rows(spec) > rows),
    Moment(name="in a save", reached=lambda spec, rows: count_rows(spec) > rows and is_saving(spec)),
    Moment(name="at the end of a pass", reached=lambda spec, rows: count_rows(spec) > rows and count_rows(spec) % PASS_STEPS == 0),
    Moment(name="at the start of an attempt", reached=lambda spec, rows: (Path(spec.output) / "log.txt").stat().st_size > 0),
)


def aim_at(moment: Moment, spec: TrainSpec, draw: random.Random) -> Callable[[], bool]:
    """True from a chance moment on, up to SPREAD_S after `moment`."""
    rows, delay_s = count_rows(spec), draw.uniform(0, SPREAD_S)
    reached: list[float] = []

    def look() -> bool:
        if not reached and moment.reached(spec, rows):
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + delay_s

    return look


def share_kills(kills: int) -> Iterator[tuple[int, int]]:
    """(ranks, kills) so that all of them are shared out."""
    for place, ranks in enumerate(RANKS):
        yield ranks, kills // len(RANKS) + (place < kills % len(RANKS))


def test_kills_are_shared_out_to_the_last() -> None:
    assert dict(share_kills(50)) == {1: 17, 2: 17, 4: 16}
    assert sum(kills for _, kills in share_kills(3)) == 3


def make_runs(tiny_spec: Any, digits: Path, ranks: int, kills: int) -> tuple[TrainSpec, TrainSpec]:
    """An uninterrupted run without intermediate checkpoints; and one that saves at every other step, in the background."""
    arguments = {"precision": "bf16", "zero": 2, "micro": GLOBAL_BATCH // ranks, "ranks": ranks}
    changes = {"steps": 30 + 12 * kills, "evaluation": Evaluation(batch=16, max_new_tokens=4, limit=24)}
    quiet, killed = (
        tiny_spec(name, changes={**changes, "save_every": every, "checkpoint_background": bool(every)}, **arguments)
        for name, every in (("quiet", 0), ("killed", 2))
    )
    file = Path(quiet.output) / "few.json"
    file.write_text(json.dumps(json.loads((digits / "digits" / "train.json").read_text())[:ROWS]))
    held_out = str(digits / "digits" / "evaluation.json")
    data = replace(quiet.data, builtin="", train=str(file), evaluation=held_out, images=str(digits / "digits"))
    return replace(quiet, data=data), replace(killed, data=data)


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=pytest.mark.slow if ranks > 1 else ()) for ranks in RANKS])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(
    ranks: int, tiny_spec: Any, digits: Path, request: pytest.FixtureRequest
) -> None:
    kills = dict(share_kills(request.config.getoption("--kills")))[ranks]
    if not kills:
        pytest.skip("no kill is left for this number of ranks: --kills 3 or more")
    quiet, killed = make_runs(tiny_spec, digits, ranks, kills)
    gone = run_ranks(quiet)
    assert gone.codes == (0,) * ranks, gone.text
    draw = random.Random(f"{kills} of {ranks}")
    for number, moment in zip(range(1, kills + 1), cycle(MOMENTS), strict=False):
        rows = count_rows(killed)
        gone = run_ranks(killed, kill_when=aim_at(moment, killed, draw))
        print(f"{ranks} ranks, kill {number} {moment.name}: rows {rows} to {count_rows(killed)}, exit codes {gone.codes}")
        assert -9 in gone.codes, f"kill {number} {moment.name} came too late:\n{gone.text}"
    gone = run_ranks(killed)
    assert gone.codes == (0,) * ranks, gone.text
    assert result_of(killed).weights_sha256 == result_of(quiet).weights_sha256
    assert losses_of(killed) == losses_of(quiet)
    assert (Path(killed.output) / SAMPLES_FILE).read_text() == (Path(quiet.output) / SAMPLES_FILE).read_text()


def losses_of(spec: TrainSpec) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows_of(spec)]
