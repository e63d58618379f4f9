"""Early stopping: whether the evaluations of a run have stopped to improve. A pure function of their values, so that it survives a resume."""

from collections.abc import Iterable

from trainer.checkpoint.best import HIGHER, is_better
from trainer.contract import EarlyStop, EvaluationRow


def find_reason_to_stop(rows: Iterable[EvaluationRow], options: EarlyStop) -> str:
    """'' to continue, else why the run ends after the last of `rows`, which are in the order of their steps. Every rank has the same rows."""
    best, waited, step = None, 0, 0
    for row in rows:
        value, step = getattr(row, options.metric), row.step
        if improves(options, value, best):
            best, waited = value, 0
        else:
            waited += 1
    if not options.patience or waited < options.patience:
        return ""
    return (
        f"stopped early at step {step}: {options.metric} did not improve over {options.patience} evaluation{'s' * (options.patience > 1)}"
    )


def improves(options: EarlyStop, value: float | None, best: float | None) -> bool:
    if value is None or best is None:
        return is_better(options.metric, value, best)
    least = options.min_delta if HIGHER[options.metric] else -options.min_delta
    return is_better(options.metric, value, best + least)
