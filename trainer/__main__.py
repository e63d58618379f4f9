"""`python -m trainer data SPEC`: check the data before a rank starts. `torchrun ... -m trainer run SPEC`: the run, on every rank.
`python -m trainer trace SPEC`: the memory of one step, as JSON, without weights and without an accelerator.

Exit codes: trainer.contract.Exit. A rank that fails writes `failure-rank<n>.json` to the run's folder.
"""

import importlib.util
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from trainer.contract import (
    DATA_FILE,
    DATA_PENDING_FILE,
    DATA_PROBLEMS_FILE,
    FAILURE_FILES,
    INPUTS_FILE,
    SCHEMA,
    DataReport,
    Exit,
    FailureReport,
    InputRefused,
    Inputs,
    RunFailed,
    SpecError,
    TrainSpec,
    as_problem,
    describe_groups,
    encode,
    read,
    write,
    write_text,
)
from trainer.contract.checkpoint_files import newest_checkpoint
from trainer.device.log_prefix import prefix_lines, report_phase

USAGE = "usage: python -m trainer data SPEC | run SPEC | trace SPEC    (SPEC: the path of a run's spec.json)"
SHOWN_CAUSES = 20
TRACE_PACKAGES = ("torch", "transformers", "peft")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return Exit.USAGE
    with prefix_lines(os.environ):
        return run_command(COMMANDS[arguments[0]], Path(arguments[1]))


def run_command(command: Callable[[TrainSpec], int], path: Path) -> int:
    try:
        spec = read(TrainSpec, path)
    except SpecError as error:
        print(error, file=sys.stderr)
        return Exit.USAGE
    try:
        return command(spec)
    except Exception as error:
        return fail(spec, error)


def data(spec: TrainSpec) -> int:
    """Write data.json, inputs.json, data_left_out.jsonl if rows are left out, and data_problems.jsonl if there are problems, and print the first
    ones. Raises InputRefused if the data has changed since the run's checkpoints, and in a rerun for other inputs than those of its record."""
    from trainer.data.check import check_data, paths_of
    from trainer.data.left_out import write_left_out
    from trainer.data.manifest import list_inputs, refuse_other_inputs
    from trainer.data.row_use import find_uses

    paths = paths_of(spec)
    found = check_data(spec, partial(print, flush=True))
    problems, report = found.problems, replace(found.report, uses=find_uses(spec, paths, found.problems))
    inputs = list_inputs(spec, paths, found.hashes)
    if "data" not in spec.accepted_changes:
        refuse_changed(report, inputs, Path(spec.output))
    listed = Path(spec.output) / DATA_PROBLEMS_FILE
    if problems:
        write_text("".join(f"{json.dumps(asdict(problem), ensure_ascii=False)}\n" for problem in problems), listed)
    else:
        listed.unlink(missing_ok=True)
    write_left_out(found.left_out, Path(spec.output), expected=spec.data.leaves_rows_out)
    write(inputs, Path(spec.output) / INPUTS_FILE)
    write(report, Path(spec.output) / DATA_FILE)
    refuse_other_inputs(spec.expects, inputs, report.sha256)
    for text in describe_groups(problems, SHOWN_CAUSES):
        print(text, file=sys.stderr)
    for change, rows in report.summary.adjustments.items():
        print(f"data: {change}: {rows:,} rows", flush=True)
    for text in describe_groups([as_problem(row) for row in found.left_out if row.done in ("left out", "cut")], SHOWN_CAUSES):
        print(f"data: {text}", flush=True)
    for key, rows in report.summary.ignored_keys.items():
        print(f"data: key {key!r} is not read: {rows:,} rows", flush=True)
    for warning, rows in report.summary.warnings.items():
        print(f"data: warning: {warning}: {rows:,} rows", flush=True)
    if not report.problems:
        (Path(spec.output) / DATA_PENDING_FILE).unlink(missing_ok=True)
    return Exit.USAGE if report.problems else Exit.OK


def refuse_changed(report: DataReport, inputs: Inputs, run: Path) -> None:
    """The ranks check only the annotation file; changed images are found here."""
    from trainer.contract.listing import describe_changes

    lines: list[str] = []
    try:
        before: DataReport = read(DataReport, run / DATA_FILE)
    except SpecError:
        return  # no file: the run has not begun
    if before.sha256 != report.sha256 and newest_checkpoint(run) is not None:
        with suppress(SpecError):  # without the list, no file is named
            listed: Inputs = read(Inputs, run / INPUTS_FILE)
            lines = [f"\n  data {line}" for line in describe_changes(listed.data, inputs.data)]
        raise InputRefused(
            f"{run / DATA_FILE}: the rows or the images have changed since this run began:{''.join(lines)}\nRestore them, or continue with the data as "
            f"it is now: omnilaunch launch --resume {run.name} --accept data; or start a new run."
        )


def run(spec: TrainSpec) -> int:
    report_phase(0)
    from trainer.programs.dispatch import run_stage  # imports torch, which `data` must not

    run_stage(spec, os.environ)
    return Exit.OK


def trace(spec: TrainSpec) -> int:
    """Print a TraceReport. A refusal is only printed, since there may be no run's folder."""
    try:
        missing = [name for name in TRACE_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise InputRefused(
                f"{sys.executable} has no {', '.join(missing)}, but a trace runs a step of the real model.\n    install the trainer's "
                "environment (make setup), or plan without --trace"
            )
        with redirect_stdout(sys.stderr):  # libraries print; the launcher reads stdout
            from trainer.memory_model.trace import trace as trace_step

            report = trace_step(spec)
    except InputRefused as error:
        print(error, file=sys.stderr)
        return Exit.USAGE
    print(encode(report), end="")
    return Exit.OK


COMMANDS: dict[str, Callable[[TrainSpec], int]] = {"data": data, "run": run, "trace": trace}


def fail(spec: TrainSpec, error: Exception) -> int:
    """Report why this rank ends, on stderr and in the run's folder. Returns the exit code."""
    code = {InputRefused: Exit.USAGE, RunFailed: Exit.RUN}.get(type(error), Exit.BUG)
    trace = "".join(traceback.format_exception(error))
    print(trace if code == Exit.BUG else error, file=sys.stderr)
    rank = int(os.environ.get("RANK", "0"))
    report = FailureReport(
        schema=SCHEMA,
        rank=rank,
        hostname=socket.gethostname(),
        unix_s=time.time(),
        code=code,
        kind=type(error).__name__,
        message=str(error),
        traceback=trace,
    )
    try:
        write(report, Path(spec.output) / FAILURE_FILES.format(rank=rank))
    except OSError as unwritten:  # a full disk: only the printed text remains
        print(f"the failure report could not be written: {unwritten}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
