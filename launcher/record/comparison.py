"""What comes of holding runs against each other: nouns, and their text. `compare` makes them."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from launcher.record.comparable import FactDifference, FactKind
from trainer.contract import SCHEMA

SHOWN = 12  # differences of one kind that are listed as text


class Outcome(Enum):
    """same: all facts and all bits. equivalent: another computation within what was stated or measured. The order is that of their weight."""

    SAME = "same"
    EQUIVALENT = "equivalent"
    DIFFERENT = "different"


class Level(Enum):
    """Of one figure beside the reference's. told: no band was stated and no repeats were given, so that nobody can judge it."""

    EQUAL = "equal"
    WITHIN = "within"
    OUTSIDE = "outside"
    TOLD = "not judged"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of two runs. `change` is a share of the left one, of an evaluation the difference. `limit` says what it was judged by."""

    name: str
    unit: str
    left: float | None
    right: float | None
    change: float | None
    level: Level
    limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """`steps`: that both have. `first_step`: the first whose row has other bits in `column`, which is '' where one run
    only has more steps; 0 where there is none. `change`: the largest of the
    means of a tenth of the steps, as a share."""

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
    """One run against the reference. `reasons`: what made the outcome, the weightiest first. `matching`: how many facts of each kind agree."""

    run_id: str
    outcome: Outcome
    reasons: tuple[str, ...]
    matching: dict[str, int]
    differences: tuple[FactDifference, ...]
    losses: Losses
    figures: tuple[Figure, ...]
    weights: Level
    answers: str

    @property
    def first_environment(self) -> FactDifference | None:
        """The first fact of the environment that must match and does not."""
        return next((found for found in self.differences if found.kind is FactKind.ENVIRONMENT and found.known), None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    schema: int = SCHEMA
    reference: str
    judgements: tuple[Judgement, ...]

    @property
    def outcome(self) -> Outcome:
        weight = list(Outcome).index
        return max((judgement.outcome for judgement in self.judgements), key=weight)


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
    """A block a run; the verdict is its last lines."""
    return "\n\n".join("\n".join(describe_judgement(judgement, comparison.reference)) for judgement in comparison.judgements)


def describe_judgement(judgement: Judgement, reference: str) -> Iterator[str]:
    yield f"{judgement.run_id} against {reference}"
    yield from describe_facts(judgement)
    yield ""
    yield from describe_figures(judgement)
    yield ""
    yield f"verdict: {judgement.outcome.value}"
    yield from (f"  {reason}" for reason in judgement.reasons)


def describe_figures(judgement: Judgement) -> Iterator[str]:
    yield f"  {'losses':20} {describe_losses(judgement.losses)}"
    yield f"  {'final weights':20} {WEIGHTS[judgement.weights]}"
    yield from (f"  {figure.name:20} {describe_figure(figure)}" for figure in judgement.figures)
    if judgement.answers:
        yield f"  {'answers':20} {judgement.answers}"


def describe_facts(judgement: Judgement) -> Iterator[str]:
    apart = Counter(difference.kind for difference in judgement.differences)
    for kind, title in TITLES.items():
        equal, different = judgement.matching.get(kind.value, 0), apart[kind]
        yield f"  {title:20} {equal:4} agree" + (f", {different} do not" if different else "")
        if kind is FactKind.FREE:
            continue
        found = [difference for difference in judgement.differences if difference.kind is kind]
        yield from (f"    {line}" for line in map(describe_difference, found[:SHOWN]))
        if len(found) > SHOWN:
            yield f"    ... and {len(found) - SHOWN} more: --json has all of them"


def describe_difference(difference: FactDifference) -> str:
    mark = "  (not recorded on one side)" if not difference.known else "  (allowed)" if difference.allowed else ""
    return f"{difference.key}: {shorten(difference.left)} -> {shorten(difference.right)}{mark}"


def describe_losses(losses: Losses) -> str:
    if losses.level is Level.EQUAL:
        return f"equal to the bit over {losses.steps} steps" if losses.steps else "none on either side"
    if not losses.column:
        return f"{losses.left:g} steps and {losses.right:g}; {judged(losses.level, losses.limit)}"
    apart = f", {losses.change:.3%} apart at most" if losses.change is not None else ""
    return f"{losses.column} differs from step {losses.first_step}: {losses.left!r} -> {losses.right!r}{apart}; {judged(losses.level, losses.limit)}"


def describe_figure(figure: Figure) -> str:
    sides = f"{number(figure.left)} -> {number(figure.right)} {figure.unit}".rstrip()
    if figure.level is Level.EQUAL:
        return f"{number(figure.left)} {figure.unit}".rstrip() + ", equal"
    change = "" if figure.change is None else f"  ({figure.change:+.2%})" if figure.unit else f"  ({figure.change:+.4f})"
    return f"{sides}{change}; {judged(figure.level, figure.limit)}"


def judged(level: Level, limit: str) -> str:
    return f"{level.value} {limit}".rstrip() if level is not Level.TOLD else f"{level.value}: {limit}"


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def shorten(text: str, most: int = 44) -> str:
    """One line; both ends of a long one, since hashes and paths differ in one of them."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-most // 2 :]}"


WEIGHTS = {Level.EQUAL: "equal", Level.OUTSIDE: "not the same", Level.TOLD: "not recorded on both sides"}
TITLES = {
    FactKind.EXPERIMENT: "the experiment",
    FactKind.INPUT: "inputs",
    FactKind.ENVIRONMENT: "environment",
    FactKind.FREE: "may differ",
}
