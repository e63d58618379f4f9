"""Compares runs with a reference: are they the same, and if not, where do they diverge first?

    reference, *others = [read_run_files(folder) for folder in folders]
    comparison = compare(reference, others, bands=bands_of(reference))

Runs are `same` if every value that must match does and all results are bitwise identical. Other results are `equivalent` only within a band
that was stated, or within the spread of repeats that were given. A difference is never called noise without one of the two.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused
from launcher.plan.text import shorten
from launcher.record.comparable import (
    COMMIT,
    FILES,
    ComparableKind,
    Difference,
    collect_comparables,
    find_changed_inputs,
    find_differences,
    kind_of,
)
from launcher.record.comparison import Comparison, Figure, Judgement, Level, Losses, Outcome
from launcher.record.metrics import Curve, first_difference, window_means
from launcher.record.noise import LEAST_REPEATS, interval
from launcher.record.run_files import RunFiles, require_whole

WINDOWS = 10  # the losses are compared by the means of that many equal parts
BITWISE = ("loss", "grad_norm", "lr", "samples", "tokens")
UNJUDGED = f"state a band (run.bands, --band NAME=SHARE), or name at least {LEAST_REPEATS} repeats as well"
# name -> (unit, which change is worse: -1 a lower value, 1 a higher one, 0 any)
FIGURES = {"throughput": ("samples/s", -1), "memory": ("GiB", 1)}
MAX_REASONS = 6


def compare(
    reference: RunFiles, others: Sequence[RunFiles], *, bands: Bands, allow: tuple[str, ...] = (), unlike: bool = False
) -> Comparison:
    """Judge each of `others`. Raises ConfigRefused for a damaged record, and for runs of different experiments unless `unlike` is true."""
    runs = (reference, *others)
    for run in runs:
        require_whole(run)
    values = [collect_comparables(run) for run in runs]
    found = [
        (*find_changed_inputs(reference, run, allow), *find_differences(values[0], theirs, allow))
        for run, theirs in zip(runs, values, strict=True)
    ]
    if not unlike:
        for run, differences in zip(others, found[1:], strict=True):
            refuse_unlike(reference, run, differences)
    judgements = []
    for place, run in enumerate(others, start=1):
        # Runs that do not differ from the reference in anything that must match are repeats: they show how much chance alone changes.
        repeats = [runs[n] for n in range(len(runs)) if n != place and all(one.kind is ComparableKind.FREE for one in found[n])]
        judgements.append(judge(reference, run, found[place], values[0] | values[place], repeats, bands))
    return Comparison(reference=reference.run_id, judgements=tuple(judgements))


def refuse_unlike(reference: RunFiles, other: RunFiles, differences: Sequence[Difference]) -> None:
    unlike = [difference for difference in differences if difference.kind is ComparableKind.EXPERIMENT and difference.known]
    if unlike:
        lines = "\n".join(f"  {found.key}: {shorten(found.left)} and {shorten(found.right)}" for found in unlike[:MAX_REASONS])
        raise ConfigRefused(
            f"runs {reference.run_id} and {other.run_id} are two experiments, and their figures cannot be compared:\n{lines}\n"
            "To compare them anyway: --unlike"
        )


def judge(
    reference: RunFiles,
    other: RunFiles,
    differences: tuple[Difference, ...],
    values: Mapping[str, Any],
    repeats: Sequence[RunFiles],
    bands: Bands,
) -> Judgement:
    """`values`: of both runs, by key."""
    losses = compare_losses(reference.curve, other.curve, [repeat.curve for repeat in repeats], bands.loss)
    weights = compare_weights(reference, other)
    figures = (*compare_speed(reference, other, repeats, bands), *compare_scores(reference, other, repeats, bands.evaluation))
    finished = all(run.record.get("status") == "finished" for run in (reference, other))
    outcome, reasons = conclude(differences, losses, weights, figures, finished=finished)
    different = Counter(difference.kind.value for difference in differences if difference.key in values)
    kinds = Counter(kind_of(key).value for key in values)
    return Judgement(
        run_id=other.run_id,
        outcome=outcome,
        reasons=reasons,
        matching={kind: count - different[kind] for kind, count in kinds.items()},
        differences=differences,
        losses=losses,
        figures=figures,
        weights=weights,
        answers=compare_answers(reference, other),
    )


# ------------------------------------------------------------------------------------------------------------- the outcome


def conclude(
    differences: Sequence[Difference], losses: Losses, weights: Level, figures: Sequence[Figure], *, finished: bool
) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome and its reasons. What keeps runs only from being the same is listed only if nothing makes them different."""
    bitwise = losses.level is Level.EQUAL
    worse = [f"{found.key}: {shorten(found.left)} -> {shorten(found.right)}" for found in differences if found.matters]
    worse = worse[:MAX_REASONS] + ([f"and {len(worse) - MAX_REASONS} more values"] if len(worse) > MAX_REASONS else [])
    diverged = f"the metrics rows differ from step {losses.first_step} on ({losses.column or 'one run has no more rows'})"
    if losses.level in (Level.OUTSIDE, Level.NOT_JUDGED):
        worse.append(f"{diverged}, {losses.level.value}{' ' if losses.level is Level.OUTSIDE else ': '}{losses.limit}")
    if bitwise and weights is Level.OUTSIDE:
        worse.append("the metrics rows are equal but the final weights are not: a checkpoint or a record was replaced")
    worse += [describe_outside(figure) for figure in figures if figure.level is Level.OUTSIDE]
    if bitwise and weights is Level.EQUAL:
        scores = (figure.name for figure in figures if not figure.unit and figure.level is Level.NOT_JUDGED)
        worse += [f"{name} differs although the weights are equal" for name in scores]
    if worse:
        return Outcome.DIFFERENT, tuple(worse)
    less = [describe_allowed(found, differences) for found in differences if found.kind is not ComparableKind.FREE and found.allowed]
    less += [f"{found.key} is not in both records" for found in differences if not found.known]
    if not bitwise:
        less.append(f"{diverged}, within {losses.limit}")
    if bitwise and weights is Level.NOT_JUDGED:
        less.append("the hash of the final weights is not in both records")
    if not finished:
        less.append("not both runs finished")
    if less:
        return Outcome.EQUIVALENT, tuple(less[:MAX_REASONS])
    return Outcome.SAME, (f"every value that must match does; {losses.steps} metrics rows and the final weights are bitwise identical",)


def describe_allowed(found: Difference, differences: Sequence[Difference]) -> str:
    same_files = found.key == COMMIT and not any(one.key.startswith(FILES) for one in differences)
    return f"{found.key} may differ" + (": the files of the image are the same" if same_files else " (--allow)")


def describe_outside(figure: Figure) -> str:
    if figure.change is None:
        return f"{figure.name} is missing in one run"
    return f"{figure.name} {figure.change:{'+.2%' if figure.unit else '+.4f'}}, outside {figure.limit}"


# ----------------------------------------------------------------------------------------------------------------- losses


def compare_losses(left: Curve, right: Curve, repeats: Sequence[Curve], band: float | None) -> Losses:
    """Bitwise; if there is a difference, by the means of tenths of the steps."""
    steps = min(len(left.step), len(right.step))
    first = sorted((place, name) for name in BITWISE if (place := first_difference(left.column(name), right.column(name))) is not None)
    if not first and len(left.step) == len(right.step):
        return Losses(steps=steps, first_step=0, column="", left=None, right=None, change=0.0, level=Level.EQUAL)
    # Within one step, the loss comes first: the other values follow from it.
    place, column = min(first, key=lambda found: (found[0], BITWISE.index(found[1]))) if first else (steps, "")
    change, level, limit = judge_losses(left.loss, right.loss, [repeat.loss for repeat in repeats], band)
    sides = [float(curve.column(column)[place]) if first else float(len(curve.step)) for curve in (left, right)]
    return Losses(steps=steps, first_step=place + 1, column=column, left=sides[0], right=sides[1], change=change, level=level, limit=limit)


def judge_losses(
    left: Sequence[float], right: Sequence[float], repeats: Sequence[Sequence[float]], band: float | None
) -> tuple[float | None, Level, str]:
    """(largest change, level, limit). Curves of different length, or with non-finite values, are outside every limit."""
    means = window_means(left, WINDOWS), window_means(right, WINDOWS)
    if len(left) != len(right):
        return None, Level.OUTSIDE, f"any band, since one has {len(left):,} steps and the other {len(right):,}"
    if not left or not all(map(math.isfinite, (*means[0], *means[1]))):
        return None, Level.OUTSIDE, "any band: there are no losses, or some are not finite"
    change = max(abs(other - one) / max(abs(one), 1e-12) for one, other in zip(*means, strict=True))
    if band is not None:
        return change, Level.WITHIN if change <= band else Level.OUTSIDE, f"the stated band of {band:.3%}"
    windows = [window_means(repeat, WINDOWS) for repeat in repeats if len(repeat) == len(left)]
    if len(windows) < LEAST_REPEATS:
        return change, Level.NOT_JUDGED, UNJUDGED
    spans = [interval(column) for column in zip(*windows, strict=True)]
    inside = all(low <= value <= high for (low, high), value in zip(spans, means[1], strict=True))
    return change, Level.WITHIN if inside else Level.OUTSIDE, f"the noise of {len(windows)} repeats"


def compare_weights(left: RunFiles, right: RunFiles) -> Level:
    one, other = (run.record.get("weights_sha256") for run in (left, right))
    if not one or not other:
        return Level.EQUAL if one == other and not left.curve.step else Level.NOT_JUDGED
    return Level.EQUAL if one == other else Level.OUTSIDE


# ---------------------------------------------------------------------------------------------------------------- figures


def compare_speed(left: RunFiles, right: RunFiles, repeats: Sequence[RunFiles], bands: Bands) -> tuple[Figure, ...]:
    """Throughput by the median step time after the warm-up, and the highest memory of any rank. () without steps."""
    stated = asdict(bands)
    one, other, *more = (speeds_of(run) for run in (left, right, *repeats))
    if not one or not other:
        return ()
    return tuple(
        judge_figure(name, unit, one[name], other[name], [found[name] for found in more if found], stated[name], worse)
        for name, (unit, worse) in FIGURES.items()
    )


def speeds_of(run: RunFiles) -> dict[str, float]:
    speed = run.curve.speed
    return {"throughput": speed.samples_per_s, "memory": speed.peak_bytes / 2**30} if speed else {}


def compare_scores(left: RunFiles, right: RunFiles, repeats: Sequence[RunFiles], band: float | None) -> tuple[Figure, ...]:
    """Every figure of the last evaluation of either run."""
    one, other, *more = (scores_of(run) for run in (left, right, *repeats))
    return tuple(
        judge_figure(name, "", one.get(name), other.get(name), [found[name] for found in more if name in found], band, 0)
        for name in dict.fromkeys((*one, *other))
    )


def scores_of(run: RunFiles) -> dict[str, float]:
    scores: dict[str, float] = run.record.get("evaluation") or {}
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def judge_figure(
    name: str, unit: str, left: float | None, right: float | None, repeats: Sequence[float], band: float | None, worse: int
) -> Figure:
    """`worse`: as in FIGURES; a change for the better is never outside. The change is relative if there is a unit, absolute if there is none."""
    if left is None or right is None:
        return Figure(name=name, unit=unit, left=left, right=right, change=None, level=Level.OUTSIDE, limit="any band: one run has none")
    change = right - left if not unit else (right - left) / left if left else math.inf
    level, limit = Level.EQUAL, ""
    if left != right and band is not None:
        outside = worse * change > band if worse else abs(change) > band
        level, limit = Level.OUTSIDE if outside else Level.WITHIN, f"the stated band of {band:{'.2%' if unit else 'g'}}"
    elif left != right and len(repeats) >= LEAST_REPEATS:
        low, high = interval(repeats)
        outside = (right < low and worse <= 0) or (right > high and worse >= 0)
        level, limit = Level.OUTSIDE if outside else Level.WITHIN, f"the noise of {len(repeats)} repeats, {low:,.4g} to {high:,.4g}"
    elif left != right:
        level, limit = Level.NOT_JUDGED, UNJUDGED
    return Figure(name=name, unit=unit, left=left, right=right, change=change, level=level, limit=limit)


def compare_answers(left: RunFiles, right: RunFiles) -> str:
    """How many answers of the last evaluation differ, and the first row that does; '' if there are no answers."""
    pairs = list(zip(left.answers, right.answers, strict=False))
    if not pairs:
        return ""
    different = [one.get("row") for one, other in pairs if one.get("got") != other.get("got")]
    count = f"{len(different)} of {len(pairs)} differ, the first in row {different[0]}" if different else f"all {len(pairs)} equal"
    return (
        count if len(left.answers) == len(right.answers) else f"{count}; the runs have {len(left.answers)} and {len(right.answers)} answers"
    )
