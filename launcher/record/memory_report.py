"""Compares the memory that plans predicted with the peaks that their runs measured, for all runs of a folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.image.docs import markdown as markdown_lines
from launcher.plan.plan import Plan
from launcher.record.reader import read_if_there
from launcher.record.record import PLAN_FILE, RECORD_FILE
from launcher.record.run_name import find_run
from trainer.contract import RESULT_FILE, TrainResult
from trainer.contract.wording import plural

TRAINING = ("load", "first step", "steps")  # the phases that a plan predicts; evaluation and saving have peaks of their own
HEADINGS = ("run", "model", "stage", "precision", "strategy", "length", "planned GiB", "allocated GiB", "reserved GiB", "error")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PeakComparison:
    """`measured_bytes`: the highest peak of any rank while it loaded and trained; on a CPU resident memory, with the libraries.
    `reserved_bytes`: what the allocator reserved, 0 on a CPU."""

    run_id: str
    config: tuple[str, ...]  # model, stage, precision, strategy, length
    accelerator: str
    planned_bytes: int
    measured_bytes: int
    reserved_bytes: int

    @property
    def error(self) -> float:
        """Relative to the measured peak; negative if the plan predicted too little."""
        return self.planned_bytes / self.measured_bytes - 1


def compare_runs(folders: Iterable[Path]) -> tuple[tuple[PeakComparison, ...], tuple[str, ...]]:
    """(the comparisons; for each run that cannot be compared, a line that says why)."""
    found = [(folder.name, compare_run(folder)) for folder in folders]
    lines = tuple(f"{name}: {what}" for name, what in found if isinstance(what, str))
    return tuple(what for _, what in found if isinstance(what, PeakComparison)), lines


def compare_run(folder: Path) -> PeakComparison | str:
    """The comparison, or the reason why there is none."""
    if not (folder / RECORD_FILE).is_file():
        return "it has no record yet"
    plan: Plan | None = read_if_there(Plan, folder / PLAN_FILE)
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if plan is None:
        return f"{PLAN_FILE} cannot be read by this version"
    if plan.memory is None:
        return "its plan was made by a version that did not predict memory"
    peaks = [peak for peak in result.peaks if peak.phase in TRAINING] if result else []
    if plan.spec.stage.kind != "train" or not any(peak.allocated_bytes for peak in peaks):
        return "it measured no training step"
    spec = plan.spec
    return PeakComparison(
        run_id=plan.run_id,
        config=(spec.model.name, spec.stage.name, spec.precision.name, plan.config.strategy.name, str(spec.data.max_length)),
        accelerator=spec.device.accelerator,
        planned_bytes=plan.memory.total_bytes,
        measured_bytes=max(peak.allocated_bytes for peak in peaks),
        reserved_bytes=max(peak.reserved_bytes for peak in peaks),
    )


def choose_folders(runs: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The folders of the named runs; of all runs if none is named. Raises ConfigRefused for a name that is not a run."""
    named = {find_run(name, runs) for name in names}
    return tuple(sorted(named or (path for path in runs.glob("*") if path.is_dir())))


def describe_comparisons(comparisons: Sequence[PeakComparison], left_out: Sequence[str], *, markdown: bool) -> str:
    """The table, the errors for each kind of accelerator, and the runs that were left out."""
    rows = (HEADINGS, *map(cells, comparisons))
    text = "\n".join(markdown_lines(rows) if markdown else text_lines(rows)) if comparisons else "no run that can be compared"
    kinds = dict.fromkeys(comparison.accelerator for comparison in comparisons)
    sums = [summarise(kind, [c.error for c in comparisons if c.accelerator == kind]) for kind in kinds]
    lines = [f"{'- ' if markdown else ''}{line}" for line in (*sums, *(f"left out: {line}" for line in left_out))]
    return "\n".join((text, "", *lines)).rstrip()


def summarise(kind: str, errors: Sequence[float]) -> str:
    if kind == "cpu":
        return (
            f"cpu: {plural(len(errors), 'run')}, not compared: a CPU reports resident memory, most of which is the interpreter and its libraries, and a plan "
            "counts tensors. python tests/benchmarks/fit_error.py measures these on a CPU"
        )
    mean = sum(map(abs, errors)) / len(errors)
    spread = f"most above {max(0.0, *errors):.1%}, most below {-min(0.0, *errors):.1%}"
    return f"{kind}: {plural(len(errors), 'run')}, mean error {mean:.1%} of the measured peak, {spread}"


def cells(comparison: PeakComparison) -> tuple[str, ...]:
    sizes = (comparison.planned_bytes, comparison.measured_bytes, comparison.reserved_bytes)
    error = "-" if comparison.accelerator == "cpu" else f"{comparison.error:+.1%}"
    return (comparison.run_id, *comparison.config, *(f"{size / GIB:.3f}" for size in sizes), error)


def text_lines(rows: tuple[tuple[str, ...], ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
