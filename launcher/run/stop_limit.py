"""How long a run that was asked to stop is waited for, and what is printed meanwhile."""

from pathlib import Path

from launcher.plan.plan import Plan
from launcher.plan.text import duration
from launcher.record.metrics import newest_rows
from trainer.contract import METRICS_FILE

# Before the first row there is nothing to save, and an interpreter that is still importing as the first process of a container ignores SIGTERM.
START_GRACE_S = 3.0
SAVED = " is being finished and saved"
STEPS = 5  # the step that is under way may be slower than those before: the machine is busy, or an evaluation begins


def find_limit_s(plan: Plan, folder: Path) -> float:
    """The plan's limit, and the time of some steps as slow as the slowest of the last ones, unless the user has set a limit."""
    if plan.config.run.stop_timeout_s is not None or plan.spec.stage.kind != "train":
        return plan.stop_limit_s
    return plan.stop_limit_s + STEPS * max((row.seconds for row in newest_rows(folder / METRICS_FILE)), default=0.0)


def grace_s(plan: Plan, folder: Path, *, started_here: bool = True) -> float:
    """How long the ranks may take to save and end. Called repeatedly, since a first row may have been on its way here. A run that another launcher
    started (`started_here` false) may have hours of rows that were not copied here yet."""
    limit_s = find_limit_s(plan, folder)
    return min(limit_s, START_GRACE_S) if started_here and has_nothing_to_save(plan, folder) else limit_s


def has_nothing_to_save(plan: Plan, folder: Path) -> bool:
    rows = folder / METRICS_FILE
    return plan.spec.stage.kind == "train" and not (rows.exists() and rows.stat().st_size)


def describe_wait(plan: Plan, folder: Path, *, started_here: bool = True) -> str:
    """What a stop request is answered with."""
    work = describe_work(plan, folder, started_here=started_here)
    without = "without saving" if work.endswith(SAVED) else "at once"
    limit = f"This may take up to {duration(grace_s(plan, folder, started_here=started_here))}; press Ctrl-C again to end {without}"
    return f"{work}. {limit}"


def describe_work(plan: Plan, folder: Path, *, started_here: bool = True) -> str:
    """What the ranks do before they end."""
    if plan.spec.stage.kind == "serve":
        return "the requests that were accepted are being answered"
    if plan.spec.stage.kind != "train":
        return "it is ending"
    if started_here and has_nothing_to_save(plan, folder):
        return "it is ending; before the first step there is nothing to save"
    rows = newest_rows(folder / METRICS_FILE)
    if rows and rows[-1].step >= plan.spec.steps:
        return "all steps are done, and it is ending"
    return f"step {rows[-1].step + 1}{SAVED}" if rows else f"the step{SAVED}"
