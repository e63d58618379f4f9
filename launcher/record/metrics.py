"""Reads the rows of metrics.jsonl, one per step: as columns (`read_curve`, 100,000 steps in less than a second) or as objects (`read_rows`)."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from launcher.plan.text import figure
from trainer.contract import StepRow
from trainer.contract.wording import plural

COLUMNS: dict[str, type] = {
    **{"step": int, "loss": float, "lr": float, "grad_norm": float},
    **{"samples": int, "tokens": int, "seconds": float, "peak_bytes": int},
}
NUMBER = r"(-?[0-9][0-9.eE+-]*|NaN|-?Infinity)"
# A line as trainer/observe writes it: json.dumps of a StepRow, in the order of its fields.
ROW = re.compile(
    rf'\{{"step": (\d+), "steps": \d+, "loss": {NUMBER}, "lr": {NUMBER}, "grad_norm": {NUMBER}, '
    rf'"samples": (\d+), "tokens": (\d+), "seconds": {NUMBER}, "peak_bytes": (\d+)[^{{}}\n]*\}}\n'
)
TAIL_BYTES = 2**14  # of metrics.jsonl: many rows
STEP_ROW_KEYS = frozenset(StepRow.__dataclass_fields__)
WARM_UP_SHARE, WARM_UP_LIMIT = 10, 50  # the first tenth of the steps, at most 50, does not count for the speed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One value per step. `peak_bytes`: the highest up to that step. `problems`: what is wrong with the file, one text each."""

    step: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    grad_norm: tuple[float, ...] = ()
    samples: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    peak_bytes: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    def column(self, name: str) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name)
        return values

    @property
    def warm_up(self) -> int:
        """How many steps at the beginning do not count for the speed."""
        return count_warm_up(len(self.step))

    @cached_property
    def speed(self) -> "Speed | None":
        """None if there are no steps after the warm-up."""
        first = self.warm_up
        return measure_speed(self.seconds[first:], self.samples[first:], self.tokens[first:], max(self.peak_bytes, default=0))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Over the steps after the warm-up. `step_s` is the median, and the rates follow from it, so that a pause of the machine does not count.
    This is the one speed of a run: during it, in the record, in reports, comparisons and benchmarks."""

    steps: int
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    peak_bytes: int


def measure_speed(seconds: Sequence[float], samples: Sequence[int], tokens: Sequence[int], peak_bytes: int) -> Speed | None:
    """Of steps with these times, samples and tokens. None where no time is a positive number."""
    timed = [value for value in seconds if math.isfinite(value) and value > 0]
    if not timed:
        return None
    step_s = median(timed)
    return Speed(
        steps=len(timed), step_s=step_s, samples_per_s=median(samples) / step_s, tokens_per_s=median(tokens) / step_s, peak_bytes=peak_bytes
    )


def count_warm_up(steps: int) -> int:
    """How many of so many steps do not count for the speed."""
    return min(steps // WARM_UP_SHARE, WARM_UP_LIMIT)


def describe_speed(curve: Curve) -> str:
    """'' if there are no steps after the warm-up."""
    if curve.speed is None:
        return ""
    first = f", the first {curve.warm_up} not counted" if curve.warm_up else ""
    median_of = f"the median of {curve.speed.steps} steps{first}" if curve.speed.steps > 1 else "one step"
    return f"{figure(curve.speed.samples_per_s)} samples/s, {figure(curve.speed.tokens_per_s)} tokens/s ({median_of})"


def read_curve(path: Path) -> Curve:
    """The whole rows of metrics.jsonl. Everything else in the file is left out and named in `problems`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Curve(problems=(f"{path.name} is missing",))
    except OSError as error:
        return Curve(problems=(f"{path.name} cannot be read: {error.strerror}",))
    problems = []
    if text and not text.endswith("\n"):
        problems = [f"{path.name}: its last row is cut short"]
        text = text[: text.rfind("\n") + 1]
    lines = text.count("\n")
    columns = parse_whole(text, lines) or parse_lines(text.split("\n")[:-1])
    wrong = lines - len(columns["step"])
    if wrong:
        problems.append(f"{path.name}: {plural(wrong, 'line')} cannot be read as whole rows")
    steps = columns["step"]
    if steps != tuple(range(1, len(steps) + 1)):
        gap = next(after for before, after in pairwise((0, *steps)) if after != before + 1)
        problems.append(f"{path.name}: the row before step {gap} is missing or has another step")
    return Curve(**columns, problems=tuple(problems))


def parse_whole(text: str, lines: int) -> dict[str, Any] | None:
    """All rows at once, in half of the time of a JSON parser. None if a line is not exactly as the trainer writes it."""
    rows = ROW.findall(text)
    if len(rows) != lines:
        return None
    try:
        texts = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
        return {name: tuple(map(kind, column)) for (name, kind), column in zip(COLUMNS.items(), texts, strict=True)}
    except ValueError:
        return None


def parse_lines(lines: Sequence[str]) -> dict[str, Any]:
    """The rows among `lines`, parsed one by one."""
    rows = [row for line in lines if (row := parse_row(line))]
    return {name: tuple(row[name] for row in rows) for name in COLUMNS}


def parse_row(line: str) -> dict[str, Any]:
    """{} for a line that is not a whole row: a full disk or a loss of power may have cut it."""
    try:
        row = json.loads(line)
        whole = all(type(row[name]) in (kind, int) for name, kind in COLUMNS.items())
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return {}
    return row if whole else {}


def read_rows(path: Path) -> tuple[StepRow, ...]:
    """The whole rows of metrics.jsonl, 100,000 in about a second. The last line without a line break is still being written."""
    if not path.exists():
        return ()
    return parse_rows(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1])


def newest_rows(path: Path) -> tuple[StepRow, ...]:
    """Those at the end of metrics.jsonl: many, and without reading a long file. () where there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return parse_rows(file.read().decode(errors="replace").split("\n")[:-1])
    except OSError:
        return ()


def parse_rows(lines: Iterable[str]) -> tuple[StepRow, ...]:
    """The whole rows among `lines`. The trainer, too, drops the others when it resumes. contract.decode would take ten times as long."""
    rows = (row for line in lines if (row := parse_row(line)) and row.keys() <= STEP_ROW_KEYS)
    return tuple(StepRow(**row) for row in rows if type(row.get("steps")) is int and type(row.get("loss_scale", 1.0)) in (float, int))


def window_means(values: Sequence[float], count: int) -> tuple[float, ...]:
    """The mean of each of `count` equally long parts; fewer parts if there are fewer values."""
    parts = min(count, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return tuple(math.fsum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges))


def first_difference(left: Sequence[float], right: Sequence[float]) -> int | None:
    """The index of the first values that differ, None if none do. Two NaNs are equal."""
    if left == right:
        return None
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other and not (one != one and other != other):
            return place
    return None


def reduce_points(steps: Sequence[int], values: Sequence[float], buckets: int) -> list[tuple[float, float, float, float]]:
    """(step, lowest, mean, highest) of at most `buckets` parts, so that no spike is lost. Non-finite values are left out."""
    size = max(1, -(-len(values) // buckets))
    points = []
    for begin in range(0, len(values), size):
        part = [value for value in values[begin : begin + size] if math.isfinite(value)]
        if part:
            places = steps[begin : begin + size]
            points.append(((places[0] + places[-1]) / 2, min(part), math.fsum(part) / len(part), max(part)))
    return points


SERIES: dict[str, Callable[[Curve], Sequence[float]]] = {
    "loss": lambda curve: curve.loss,
    "learning rate": lambda curve: curve.lr,
    "samples per second": lambda curve: [n / s if s > 0 else math.nan for n, s in zip(curve.samples, curve.seconds, strict=True)],
    "memory, GiB": lambda curve: [size / 2**30 for size in curve.peak_bytes],
}
