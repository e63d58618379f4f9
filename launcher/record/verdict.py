"""Runs against a reference: are they the same, and if not, where do they part first?

    reference, *others = [read_evidence(folder) for folder in folders]
    comparison = compare(reference, others, bands=bands_of(reference))

Facts and bits decide on `same`. What computes otherwise is `equivalent` only by a band that was stated, or by the spread of repeats that
were given; without either nothing is called noise.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused
from launcher.record.comparable import (
    COMMIT,
    FILES,
    FactDifference,
    FactKind,
    collect_facts,
    find_changed_inputs,
    find_differences,
    kind_of,
)
from launcher.record.comparison import Comparison, Figure, Judgement, Level, Losses, Outcome, shorten
from launcher.record.metrics import Curve, first_difference, window_means
from launcher.record.noise import LEAST_REPEATS, interval
from launcher.record.run_files import RunFiles, require_whole

WINDOWS = 10  # of which each loss's mean is held against the band
BITWISE = ("loss", "grad_norm", "lr", "samples", "tokens")
UNJUDGED = f"state a band (run.bands, --band NAME=SHARE), or name {LEAST_REPEATS} repeats as well"
# name -> (unit, which way is worse: -1 less, +1 more, 0 either)
FIGURES = {"throughput": ("samples/s", -1), "memory": ("GiB", 1)}
SHOWN_REASONS = 6


def compare(
    reference: RunFiles, others: Sequence[RunFiles], *, bands: Bands, allow: tuple[str, ...] = (), unlike: bool = False
) -> Comparison:
    """Judge each of `others`. Raises ConfigRefused for a record that is not whole, and for runs of two things unless `unlike` says so."""
    runs = (reference, *others)
    for run in runs:
        require_whole(run)
    facts = [collect_facts(run) for run in runs]
    found = [
        (*find_changed_inputs(reference, run, allow), *find_differences(facts[0], theirs, allow))
        for run, theirs in zip(runs, facts, strict=True)
    ]
    if not unlike:
        for run, differences in zip(others, found[1:], strict=True):
            refuse_unlike(reference, run, differences)
    judgements = []
    for place, run in enumerate(others, start=1):
        # The others that nothing sets apart from the reference say how far apart chance alone puts two runs.
        repeats = [runs[n] for n in range(len(runs)) if n != place and not any(map(weighs_or_unknown, found[n]))]
        judgements.append(judge(reference, run, found[place], facts[0] | facts[place], repeats, bands))
    return Comparison(reference=reference.run_id, judgements=tuple(judgements))


def weighs_or_unknown(difference: FactDifference) -> bool:
    return difference.kind is not FactKind.FREE


def refuse_unlike(reference: RunFiles, other: RunFiles, differences: Sequence[FactDifference]) -> None:
    unlike = [difference for difference in differences if difference.kind is FactKind.EXPERIMENT and difference.known]
    if unlike:
        told = "\n".join(f"  {found.key}: {shorten(found.left)} and {shorten(found.right)}" for found in unlike[:SHOWN_REASONS])
        raise ConfigRefused(
            f"runs {reference.run_id} and {other.run_id} are of two experiments, so that no figure of one says anything of the other:\n{told}\n"
            "To see them side by side all the same: --unlike"
        )


def judge(
    reference: RunFiles,
    other: RunFiles,
    differences: tuple[FactDifference, ...],
    facts: Mapping[str, Any],
    repeats: Sequence[RunFiles],
    bands: Bands,
) -> Judgement:
    """`facts`: of both, by key."""
    losses = compare_losses(reference.curve, other.curve, [repeat.curve for repeat in repeats], bands.loss)
    weights = compare_weights(reference, other)
    figures = (*compare_speed(reference, other, repeats, bands), *compare_scores(reference, other, repeats, bands.evaluation))
    answers = compare_answers(reference, other)
    finished = all(run.record.get("status") == "finished" for run in (reference, other))
    outcome, reasons = conclude(differences, losses, weights, figures, finished=finished)
    apart = Counter(difference.kind.value for difference in differences if difference.key in facts)
    kinds = Counter(kind_of(key).value for key in facts)
    return Judgement(
        run_id=other.run_id,
        outcome=outcome,
        reasons=reasons,
        matching={kind: count - apart[kind] for kind, count in kinds.items()},
        differences=differences,
        losses=losses,
        figures=figures,
        weights=weights,
        answers=answers,
    )


# ------------------------------------------------------------------------------------------------------------- the outcome


def conclude(
    differences: Sequence[FactDifference], losses: Losses, weights: Level, figures: Sequence[Figure], *, finished: bool
) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome, and what made it. What only keeps two runs from being the same counts where nothing sets them apart."""
    bits = losses.level is Level.EQUAL
    apart = [f"{found.key}: {shorten(found.left)} -> {shorten(found.right)}" for found in differences if found.weighs]
    apart = apart[:SHOWN_REASONS] + ([f"and {len(apart) - SHOWN_REASONS} facts more"] if len(apart) > SHOWN_REASONS else [])
    if losses.level in (Level.OUTSIDE, Level.TOLD):
        why = losses.limit if losses.level is Level.TOLD else f"outside {losses.limit}"
        apart.append(f"the rows part at step {losses.first_step} ({losses.column or 'one run has no more'}); {why}")
    if bits and weights is Level.OUTSIDE:
        apart.append("the rows are equal and the final weights are not: a checkpoint was exchanged, or the record was")
    apart += [describe_outside(figure) for figure in figures if figure.level is Level.OUTSIDE]
    if bits and weights is Level.EQUAL:
        apart += [
            f"{figure.name} differs though the weights are equal" for figure in figures if not figure.unit and figure.level is Level.TOLD
        ]
    if apart:
        return Outcome.DIFFERENT, tuple(apart)
    less = [describe_allowed(found, differences) for found in differences if found.kind is not FactKind.FREE and found.allowed]
    less += [f"{found.key} was not recorded on both sides" for found in differences if not found.known]
    if not bits:
        less.append(f"the rows part at step {losses.first_step} ({losses.column}), within {losses.limit}")
    if bits and weights is Level.TOLD:
        less.append("the hash of the final weights was not recorded on both sides")
    if not finished:
        less.append("not both runs finished")
    if less:
        return Outcome.EQUIVALENT, tuple(less[:SHOWN_REASONS])
    return Outcome.SAME, (f"all facts that must match do; {losses.steps} rows and the final weights are equal to the bit",)


def describe_allowed(found: FactDifference, differences: Sequence[FactDifference]) -> str:
    same_files = found.key == COMMIT and not any(one.key.startswith(FILES) for one in differences)
    why = ": the files of the image are the same" if same_files else ""
    return f"{found.key} is allowed to differ{why}"


def describe_outside(figure: Figure) -> str:
    if figure.change is None:
        return f"{figure.name} is missing on one side"
    return f"{figure.name} {figure.change:{'+.2%' if figure.unit else '+.4f'}}, outside {figure.limit}"


# ----------------------------------------------------------------------------------------------------------------- losses


def compare_losses(left: Curve, right: Curve, repeats: Sequence[Curve], band: float | None) -> Losses:
    """Bit by bit; where bits differ, by the means of tenths of the steps."""
    steps = min(len(left.step), len(right.step))
    first = sorted((place, name) for name in BITWISE if (place := first_difference(left.column(name), right.column(name))) is not None)
    if not first and len(left.step) == len(right.step):
        return Losses(steps=steps, first_step=0, column="", left=None, right=None, change=0.0, level=Level.EQUAL)
    # Of one step the loss says more than what comes of it.
    place, column = min(first, key=lambda found: (found[0], BITWISE.index(found[1]))) if first else (steps, "")
    change, level, limit = judge_losses(left.loss, right.loss, [repeat.loss for repeat in repeats], band)
    sides = [float(curve.column(column)[place]) if first else float(len(curve.step)) for curve in (left, right)]
    return Losses(steps=steps, first_step=place + 1, column=column, left=sides[0], right=sides[1], change=change, level=level, limit=limit)


def judge_losses(
    left: Sequence[float], right: Sequence[float], repeats: Sequence[Sequence[float]], band: float | None
) -> tuple[float | None, Level, str]:
    """(largest change, level, by what). Curves of other lengths or with no number in them are outside of everything."""
    means = window_means(left, WINDOWS), window_means(right, WINDOWS)
    if len(left) != len(right) or not left or not all(map(math.isfinite, (*means[0], *means[1]))):
        return None, Level.OUTSIDE, "any band: rows are missing, or hold no number"
    change = max(abs(other - one) / max(abs(one), 1e-12) for one, other in zip(*means, strict=True))
    if band is not None:
        return change, Level.WITHIN if change <= band else Level.OUTSIDE, f"the stated band of {band:.3%}"
    windows = [window_means(repeat, WINDOWS) for repeat in repeats if len(repeat) == len(left)]
    if len(windows) < LEAST_REPEATS:
        return change, Level.TOLD, UNJUDGED
    spans = [interval(column) for column in zip(*windows, strict=True)]
    inside = all(low <= value <= high for (low, high), value in zip(spans, means[1], strict=True))
    return change, Level.WITHIN if inside else Level.OUTSIDE, f"the noise of {len(windows)} repeats"


def compare_weights(left: RunFiles, right: RunFiles) -> Level:
    one, other = (run.record.get("weights_sha256") for run in (left, right))
    if not one or not other:
        return Level.EQUAL if one == other and not left.curve.step else Level.TOLD
    return Level.EQUAL if one == other else Level.OUTSIDE


# ---------------------------------------------------------------------------------------------------------------- figures


def compare_speed(left: RunFiles, right: RunFiles, repeats: Sequence[RunFiles], bands: Bands) -> tuple[Figure, ...]:
    """Throughput by the median second a step after the warm-up, and the highest memory of any rank. () where no step was made."""
    stated = asdict(bands)
    sides = [speeds_of(run) for run in (left, right)]
    if not sides[0] or not sides[1]:
        return ()
    others = [found for repeat in repeats if (found := speeds_of(repeat))]
    return tuple(
        judge_figure(name, unit, sides[0][name], sides[1][name], [other[name] for other in others], stated[name], worse)
        for name, (unit, worse) in FIGURES.items()
    )


def speeds_of(run: RunFiles) -> dict[str, float]:
    speed = run.curve.speed
    return {"throughput": speed.samples_per_s, "memory": speed.peak_bytes / 2**30} if speed else {}


def compare_scores(left: RunFiles, right: RunFiles, repeats: Sequence[RunFiles], band: float | None) -> tuple[Figure, ...]:
    """Every figure of the last evaluation, that of both or of one."""
    one, other = (scores_of(run) for run in (left, right))
    return tuple(
        judge_figure(name, "", one.get(name), other.get(name), [scores_of(r)[name] for r in repeats if name in scores_of(r)], band, 0)
        for name in dict.fromkeys((*one, *other))
    )


def scores_of(run: RunFiles) -> dict[str, float]:
    scores: dict[str, float] = run.record.get("evaluation") or {}
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def judge_figure(
    name: str, unit: str, left: float | None, right: float | None, repeats: Sequence[float], band: float | None, worse: int
) -> Figure:
    """`worse`: a change to the other side is never outside. Shares where there is a unit, differences where there is none."""
    if left is None or right is None:
        return Figure(name=name, unit=unit, left=left, right=right, change=None, level=Level.OUTSIDE, limit="anything: one side has none")
    change = right - left if not unit else (right - left) / left if left else math.inf
    level, limit = Level.EQUAL, ""
    if left != right and band is not None:
        outside = worse * change > band if worse else abs(change) > band
        level, limit = (
            (Level.OUTSIDE if outside else Level.WITHIN),
            f"the stated band of {band:.2%}" if unit else f"the stated band of {band:g}",
        )
    elif left != right and len(repeats) >= LEAST_REPEATS:
        low, high = interval(repeats)
        outside = (right < low and worse <= 0) or (right > high and worse >= 0)
        level, limit = (Level.OUTSIDE if outside else Level.WITHIN), f"the noise of {len(repeats)} repeats, {low:,.4g} to {high:,.4g}"
    elif left != right:
        level, limit = Level.TOLD, UNJUDGED
    return Figure(name=name, unit=unit, left=left, right=right, change=change, level=level, limit=limit)


def compare_answers(left: RunFiles, right: RunFiles) -> str:
    """How many answers of the last evaluation differ, and the first row of them; '' where there are none."""
    pairs = list(zip(left.answers, right.answers, strict=False))
    if not pairs:
        return ""
    apart = [one.get("row") for one, other in pairs if one.get("got") != other.get("got")]
    count = f"{len(apart)} of {len(pairs)} differ, the first of row {apart[0]}" if apart else f"all {len(pairs)} equal"
    return count if len(left.answers) == len(right.answers) else f"{count}; {len(left.answers)} and {len(right.answers)} were given"
