"""Compares the answers of a checkpoint with those of its base: which samples are better, and the change of each score."""

from collections.abc import Sequence
from typing import Literal

from trainer.checkpoint.journal import Row

Change = Literal["better", "worse", "same"]
LOWER = ("perplexity",)


def compare_rows(rows: Sequence[Row], base: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Adds to each row the key `base`: the base's answer, its scores, and the change by the first of `metrics`. Both in sample order."""
    metric = metrics[0] if metrics else "exact_match"
    compared = []
    for row, before in zip(rows, base, strict=True):
        base_answer = {key: before[key] for key in ("got", "match", "scores") if key in before}
        compared.append(row | {"base": base_answer | {"change": find_change(figure(row, metric), figure(before, metric), metric)}})
    return compared


def figure(row: Row, metric: str) -> float:
    return (
        float(row["match"]) if metric == "exact_match" else float(row.get("scores", {}).get(metric, 0.0))
    )  # rows without boxes have no score of boxes


def find_change(now: float, before: float, metric: str) -> Change:
    if now == before:
        return "same"
    return "better" if (now > before) != (metric in LOWER) else "worse"


def compare_scores(scores: dict[str, float], base: dict[str, float], rows: Sequence[Row]) -> dict[str, float]:
    """`scores` with the base's under base_<name>, and how many samples are better, worse and the same."""
    counts = {change: float(sum(row["base"]["change"] == change for row in rows)) for change in ("better", "worse", "same")}
    return scores | {f"base_{name}": value for name, value in base.items() if name != "count"} | counts
