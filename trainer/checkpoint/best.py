"""The checkpoint with the best evaluation, computed from evaluations.jsonl and the files on disk, so that a killed run loses nothing."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from trainer.contract import BEST_FILE, EVALUATIONS_FILE, Best, EvaluationRow, SpecError, TrainSpec, decode, encode, write_text
from trainer.contract.checkpoint_files import whole_checkpoints

HIGHER = {"exact_match": True, "loss": False}  # metric -> whether higher is better


def is_better(metric: str, value: float | None, than: float | None) -> bool:
    if value is None or math.isnan(value):  # a NaN loss kept as the best would never be beaten
        return False
    if than is None:
        return True
    return value > than if HIGHER[metric] else value < than


def read_evaluations(run: Path) -> dict[int, EvaluationRow]:
    """The complete rows, by step."""
    path = run / EVALUATIONS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = filter(None, map(parse_evaluation, lines))
    return {row.step: row for row in rows}


def parse_evaluation(line: str) -> EvaluationRow | None:
    """None for a line that was being written when the run ended."""
    try:
        row: EvaluationRow | None = decode(EvaluationRow, json.loads(line)) if line.endswith("\n") else None
    except (ValueError, SpecError):
        return None
    return row


def cut_evaluations(run: Path, step: int) -> None:
    """Keep the rows of steps up to `step`: later evaluations will be repeated."""
    rows = read_evaluations(run)
    if rows:
        kept = (json.dumps(asdict(row)) + "\n" for row in rows.values() if row.step <= step)
        write_text("".join(kept), run / EVALUATIONS_FILE)


def find_best(spec: TrainSpec) -> Best | None:
    """The best complete checkpoint that was evaluated, the first of equals; None without spec.keep_best."""
    if not spec.keep_best:
        return None
    rows, found = read_evaluations(Path(spec.output)), None
    for state in sorted(whole_checkpoints(Path(spec.output)), key=lambda state: state.step):
        value = getattr(rows[state.step], spec.keep_best) if state.step in rows else None
        if is_better(spec.keep_best, value, found.value if found else None):
            found = Best(step=state.step, path=state.path, metric=spec.keep_best, value=value)
    return found


def record_best(spec: TrainSpec) -> Best | None:
    """Write best.json, or remove an outdated one. Called on rank 0 only."""
    best, path = find_best(spec), Path(spec.output) / BEST_FILE
    if best is not None:
        write_text(encode(best), path)
    else:
        path.unlink(missing_ok=True)
    return best
