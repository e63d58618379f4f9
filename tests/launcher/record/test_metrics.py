"""Rows as columns: read fast, and lines that are not rows are reported."""

import json
import math
from pathlib import Path

import pytest

from launcher.record.metrics import Curve, first_difference, parse_lines, read_curve, reduce_points, window_means
from trainer.contract import StepRow

ROWS = [
    StepRow(step=step, steps=4, loss=1 / step, lr=1e-7 * step, grad_norm=1.0, samples=8, tokens=64, seconds=0.5, peak_bytes=step)
    for step in (1, 2, 3, 4)
]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_fast_parser_agrees_with_the_slow_one(tmp_path: Path) -> None:
    lines = [json.dumps(row.__dict__) for row in ROWS]
    lines[1] = json.dumps(ROWS[1].__dict__ | {"loss": math.nan, "grad_norm": math.inf})
    curve = read_curve(write(tmp_path / "metrics.jsonl", *lines))
    assert curve.problems == () and curve.step == (1, 2, 3, 4) and math.isnan(curve.loss[1]) and curve.grad_norm[1] == math.inf
    slow = parse_lines(lines)
    assert (slow["lr"], slow["loss"][2:], slow["peak_bytes"]) == (curve.lr, curve.loss[2:], curve.peak_bytes)
    other = [json.dumps(dict(reversed(row.__dict__.items()))) for row in ROWS]
    assert read_curve(write(tmp_path / "m", *other)) == read_curve(write(tmp_path / "m", *map(json.dumps, (row.__dict__ for row in ROWS))))


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", "null", '{"step": 2}', json.dumps(ROWS[1].__dict__ | {"loss": "low"}), "[" * 100_000, "\0\0"]
)
def test_a_line_that_is_not_a_row_is_left_out_and_reported(tmp_path: Path, line: str) -> None:
    whole = [json.dumps(row.__dict__) for row in ROWS]
    curve = read_curve(write(tmp_path / "metrics.jsonl", whole[0], line, *whole[2:]))
    assert curve.step == (1, 3, 4) and curve.problems == (
        "metrics.jsonl: 1 line cannot be read as whole rows",
        "metrics.jsonl: the row before step 3 is missing or has another step",
    )


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    assert read_curve(tmp_path / "metrics.jsonl") == Curve(problems=("metrics.jsonl is missing",))
    assert "cannot be read" in read_curve(tmp_path).problems[0]
    assert read_curve(write(tmp_path / "metrics.jsonl")) == Curve()


def test_the_speed_is_that_after_the_warm_up() -> None:
    steps = tuple(range(1, 101))
    curve = Curve(
        step=steps, samples=(8,) * 100, tokens=(64,) * 100, seconds=(9.0,) * 10 + (0.5,) * 89 + (30.0,), peak_bytes=steps, loss=(1.0,) * 100
    )
    speed = curve.speed
    assert speed is not None and (speed.steps, speed.samples_per_s, speed.tokens_per_s, speed.peak_bytes) == (90, 16.0, 128.0, 100)
    assert Curve().speed is None


def test_means_differences_and_points() -> None:
    assert window_means([1.0, 1.0, 3.0, 3.0], 2) == (1.0, 3.0) and window_means([], 5) == () and window_means([2.0], 5) == (2.0,)
    assert first_difference([1.0, math.nan, 2.0], [1.0, math.nan, 2.5]) == 2 and first_difference([math.nan], [math.nan]) is None
    values = [0.0] * 100_000
    values[77_777] = 50.0
    points = reduce_points(range(1, 100_001), values, 300)
    assert len(points) <= 300 and max(high for _, _, _, high in points) == 50.0, "no spike is lost"
    assert reduce_points([1, 2], [math.nan, math.inf], 10) == []
