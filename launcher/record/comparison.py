"""The result of comparing runs, as data and as text. `verdict.compare` makes it."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from launcher.plan.text import figure as rounded, shorten
from launcher.record.comparable import ComparableKind, Difference
from trainer.contract import SCHEMA

MAX_LISTED = 12  # differences of one kind in the text


class Outcome(Enum):
    """same: every value that must match does, and the results are bitwise identical. equivalent: the results differ within a stated band or
    the noise of repeats. In the order of their weight."""

    SAME = "same"
    EQUIVALENT = "equivalent"
    DIFFERENT = "different"


class Level(Enum):
    """One figure beside the reference's. not judged: no band was stated and there are too few repeats."""

    EQUAL = "equal"
    WITHIN = "within"
    OUTSIDE = "outside"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of two runs. `change`: relative to the left one if the figure has a unit, else the difference. `limit`: what it was compared
    with."""

    name: str
    unit: str
    left: float | None
    right: float | None
    change: float | None
    level: Level
    limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """`steps`: those that both runs have. `first_step`: the first whose rows differ, and `column` the first value that does; 0 if none differ,
    and column '' if one run only has more steps. `change`: the largest relative difference between the means of one tenth of the steps."""

    steps: int
    first_step: int
    column: str
    left: float | None
    right: float | None
    change: float | None
    level: Level
    limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One run against the reference. `reasons`: for the outcome, the most important first. `matching`: how many values of each kind match."""

    run_id: str
    outcome: Outcome
    reasons: tuple[str, ...]
    matching: dict[str, int]
    differences: tuple[Difference, ...]
    losses: Losses
    figures: tuple[Figure, ...]
    weights: Level
    answers: str

    @property
    def first_environment(self) -> Difference | None:
        """The first value of the environment that must match and does not."""
        return next((found for found in self.differences if found.kind is ComparableKind.ENVIRONMENT and found.known), None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    schema: int = SCHEMA
    reference: str
    judgements: tuple[Judgement, ...]

    @property
    def outcome(self) -> Outcome:
        return max((judgement.outcome for judgement in self.judgements), key=list(Outcome).index)


def comparison_json(comparison: Comparison) -> str:
    plain = asdict(comparison) | {"outcome": comparison.outcome}
    for judged, judgement in zip(plain["judgements"], comparison.judgements, strict=True):
        first = judgement.first_environment
        judged["first_environment"] = first.key if first else None
    return json.dumps(finite(plain), indent=2, ensure_ascii=False, default=lambda value: value.value, allow_nan=False)


def finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, (list, tuple)) else data


# ------------------------------------------------------------------------------------------------------------ as text


def describe_comparison(comparison: Comparison) -> str:
    """One block for each run, which ends with the verdict."""
    return "\n\n".join("\n".join(describe_judgement(judgement, comparison.reference)) for judgement in comparison.judgements)


def describe_judgement(judgement: Judgement, reference: str) -> Iterator[str]:
    yield f"{judgement.run_id} compared with {reference}"
    yield from describe_values(judgement)
    yield ""
    yield from describe_figures(judgement)
    yield ""
    yield f"verdict: {judgement.outcome.value}"
    yield from (f"  {reason}" for reason in judgement.reasons)


def describe_figures(judgement: Judgement) -> Iterator[str]:
    yield f"  {'losses':20} {describe_losses(judgement.losses)}"
    yield f"  {'final weights':20} {WEIGHTS[judgement.weights]}"
    yield from (f"  {figure.name.replace('_', ' '):20} {describe_figure(figure)}" for figure in judgement.figures)
    if judgement.answers:
        yield f"  {'answers':20} {judgement.answers}"
    judged = [(judgement.losses.level, judgement.losses.limit), *((figure.level, figure.limit) for figure in judgement.figures)]
    reasons = dict.fromkeys(limit for level, limit in judged if level is Level.NOT_JUDGED)
    yield from (f"  not judged: {reason}" for reason in reasons)


def describe_values(judgement: Judgement) -> Iterator[str]:
    different = Counter(difference.kind for difference in judgement.differences)
    for kind, title in TITLES.items():
        yield f"  {title:20} {judgement.matching.get(kind.value, 0):4} match" + (f", {different[kind]} differ" if different[kind] else "")
        if kind is ComparableKind.FREE:
            continue
        listed = [difference for difference in judgement.differences if difference.kind is kind]
        found = [one for one in listed if f"{one.key}: {shorten(one.left)} -> {shorten(one.right)}" not in judgement.reasons]
        for one in found[:MAX_LISTED]:
            mark = "  (not in both records)" if not one.known else "  (allowed)" if one.allowed else ""
            yield f"    {one.key}: {shorten(one.left)} -> {shorten(one.right)}{mark}"
        if len(found) > MAX_LISTED:
            yield f"    ... and {len(found) - MAX_LISTED} more: see --json"


def describe_losses(losses: Losses) -> str:
    if losses.level is Level.EQUAL:
        return f"bitwise identical over {losses.steps} steps" if losses.steps else "neither run has any"
    level = describe_level(losses.level, losses.limit)
    if not losses.column:
        return f"{losses.left:g} steps and {losses.right:g}; {level}"
    change = f"; the means of tenths of the steps differ by at most {losses.change:.2%}" if losses.change is not None else ""
    column = losses.column.replace("_", " ")
    return f"{column} differs from step {losses.first_step} on: {losses.left!r} -> {losses.right!r}{change}; {level}"


def describe_figure(figure: Figure) -> str:
    if figure.level is Level.EQUAL:
        return f"{number(figure.left)} {figure.unit}".rstrip() + ", equal"
    sides = f"{number(figure.left)} -> {number(figure.right)} {figure.unit}".rstrip()
    change = "" if figure.change is None else f"  ({figure.change:+.1%})" if figure.unit else f"  ({figure.change:+.4f})"
    return f"{sides}{change}; {describe_level(figure.level, figure.limit)}"


def describe_level(level: Level, limit: str) -> str:
    """What is not judged has its reason below, once for all figures."""
    return level.value if level is Level.NOT_JUDGED else f"{level.value} {limit}".rstrip()


def number(value: float | None) -> str:
    return "none" if value is None else rounded(value)


WEIGHTS = {Level.EQUAL: "equal", Level.OUTSIDE: "not the same", Level.NOT_JUDGED: "their hash is not in both records"}
TITLES = {
    ComparableKind.EXPERIMENT: "experiment",
    ComparableKind.INPUT: "inputs",
    ComparableKind.ENVIRONMENT: "environment",
    ComparableKind.FREE: "may differ",
}
