"""The step of a plan, traced by the trainer in a process of its own: it needs packages that the launcher does without."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.errors import ConfigRefused, LaunchError
from launcher.plan import Place, Plan
from launcher.show import gib, table
from trainer.contract import SPEC_FILE, Exit, SpecError, TraceReport, decode, write

TIMEOUT_S = 1800
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}  # a trace takes no accelerator, and must not wait for one


def trace_plan(plan: Plan, place: Place, environ: Mapping[str, str]) -> TraceReport:
    """With the interpreter that cluster.runtime=process trains with. Raises ConfigRefused where the trainer refuses, LaunchError where it
    fails."""
    with tempfile.TemporaryDirectory(prefix="omnilaunch-trace-") as name:
        write(replace(plan.spec, output=name), Path(name) / SPEC_FILE)
        argv = (place.interpreter, "-m", "trainer", "trace", str(Path(name) / SPEC_FILE))
        told = {**environ, **HIDDEN}
        try:
            done = subprocess.run(argv, cwd=place.project, env=told, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"the trace has not ended within {TIMEOUT_S} s. Plan without --trace.") from error
    said = done.stderr.strip()
    if done.returncode == Exit.USAGE:
        raise ConfigRefused(f"this step cannot be traced:\n{said}")
    if done.returncode:
        raise LaunchError(f"the trace failed with exit code {done.returncode}; plan without --trace. Its last lines:\n{said[-2000:]}")
    try:
        report: TraceReport = decode(TraceReport, json.loads(done.stdout), "trace")
    except (ValueError, SpecError) as error:
        raise LaunchError(
            f"{place.interpreter} -m trainer trace answered what this version cannot read: {error}{os.linesep}{said}"
        ) from error
    return report


def describe_trace(report: TraceReport, plan: Plan) -> str:
    """The highest moment of each part of the step, item by item, beside what the plan's arithmetic says."""
    highest = next(phase for phase in report.phases if phase.phase == report.peak_phase)
    rows = {name: gib(size) for name, size in sorted(highest.items_bytes.items(), key=lambda item: -item[1])}
    rows |= {f"peak, {phase.phase}": gib(phase.peak_bytes) + ("  the highest" if phase is highest else "") for phase in report.phases}
    if plan.memory is not None:
        rows["planned peak"] = f"{gib(plan.memory.total_bytes)}  device context, loading and fragmentation included"
    if report.host_bytes:
        rows["host, a node"] = gib(report.host_bytes)
    image = f"{report.images} image(s) of {report.image_size[0]} x {report.image_size[1]}" if report.image_size else "no image"
    lines = (
        f"one step of {report.samples} x {report.length} tokens: {image}, {report.image_tokens} image tokens, {report.trained_tokens} trained",
        f"torch {report.torch}, {report.cpu_seconds:g} s of the processor, {report.resident_bytes / 2**20:.0f} MiB; {report.parameters:,} parameters",
        *(f"note: {note}" for note in report.notes),
    )
    return "\n".join((table(rows), *lines))
