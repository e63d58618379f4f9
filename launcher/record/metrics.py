"""The rows of a run as columns, for whoever looks at many of them at once: 100,000 steps are read in a part of a second."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from trainer.contract import StepRow

COLUMNS: dict[str, type] = {
    **{"step": int, "loss": float, "lr": float, "grad_norm": float},
    **{"samples": int, "tokens": int, "seconds": float, "peak_bytes": int},
}
NUMBER = r"(-?[0-9][0-9.eE+-]*|NaN|-?Infinity)"
# A line as observe/metric.py of the trainer writes it: json.dumps of a StepRow, whose order is that of its fields.
ROW = re.compile(
    rf'\{{"step": (\d+), "steps": \d+, "loss": {NUMBER}, "lr": {NUMBER}, "grad_norm": {NUMBER}, '
    rf'"samples": (\d+), "tokens": (\d+), "seconds": {NUMBER}, "peak_bytes": (\d+)[^{{}}\n]*\}}\n'
)
STEP_ROW_KEYS = frozenset(StepRow.__dataclass_fields__)
WARM_UP_SHARE, WARM_UP_LIMIT = 10, 50  # the first tenth of the steps, at most 50, say nothing of the speed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One value a step. `seconds` of each step, `peak_bytes` up to there. `problems`: what is wrong with the file, one text each."""

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

    @cached_property
    def speed(self) -> "Speed | None":
        """None where no step is left to look at."""
        return speed_of(self)

    @property
    def warm_up(self) -> int:
        """How many steps, from the first, do not count for the speed."""
        return min(len(self.step) // WARM_UP_SHARE, WARM_UP_LIMIT)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the steps after the warm-up. Rates by the median second a step, so that a pause of the machine does not count."""

    steps: int
    samples_per_s: float
    tokens_per_s: float
    peak_bytes: int


def read_curve(path: Path) -> Curve:
    """The whole rows of metrics.jsonl. What is missing, cut short or no row is left out and told."""
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
        problems.append(f"{path.name}: {wrong} line(s) are no row")
    steps = columns["step"]
    if steps != tuple(range(1, len(steps) + 1)):
        gap = next(after for before, after in pairwise((0, *steps)) if after != before + 1)
        problems.append(f"{path.name}: the row before that of step {gap} is missing or is another one")
    return Curve(**columns, problems=tuple(problems))


def parse_whole(text: str, lines: int) -> dict[str, Any] | None:
    """All rows at once, in half of the time that a JSON parser takes. None where one of them does not look as the trainer writes it."""
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


def parse_rows(lines: Iterable[str]) -> tuple[StepRow, ...]:
    """The whole rows among `lines`. The trainer, too, drops the others when it resumes. contract.decode would take ten times as long."""
    rows = (row for line in lines if (row := parse_row(line)) and row.keys() <= STEP_ROW_KEYS)
    return tuple(StepRow(**row) for row in rows if type(row.get("steps")) is int and type(row.get("loss_scale", 1.0)) in (float, int))


def speed_of(curve: Curve) -> Speed | None:
    first = curve.warm_up
    seconds = [value for value in curve.seconds[first:] if math.isfinite(value) and value > 0]
    if not seconds:
        return None
    typical_s = median(seconds)
    return Speed(
        steps=len(seconds),
        samples_per_s=median(curve.samples[first:]) / typical_s,
        tokens_per_s=median(curve.tokens[first:]) / typical_s,
        peak_bytes=max(curve.peak_bytes),
    )


def window_means(values: Sequence[float], count: int) -> tuple[float, ...]:
    """The mean of each of `count` equally long parts, of fewer where there are fewer values."""
    parts = min(count, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return tuple(math.fsum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges))


def first_difference(left: Sequence[float], right: Sequence[float]) -> int | None:
    """The place of the first values that are not the same number (two that are none are the same), None where there is no such place."""
    if left == right:
        return None
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other and not (one != one and other != other):
            return place
    return None


def reduce_points(steps: Sequence[int], values: Sequence[float], buckets: int) -> list[tuple[float, float, float, float]]:
    """(step, lowest, mean, highest) of at most `buckets` parts: no spike is lost, whatever is left out. What is no number is left out."""
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
    "samples a second": lambda curve: [n / s if s > 0 else math.nan for n, s in zip(curve.samples, curve.seconds, strict=True)],
    "memory, GiB": lambda curve: [size / 2**30 for size in curve.peak_bytes],
}
