"""`plan --trace`: the trainer traces one step in a separate process, because that needs packages that the launcher does not import."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.check.problem import Problem
from launcher.check.rules import Verdict
from launcher.check.strategy import Resolved
from launcher.check.suggestions import refuse_memory
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, LaunchError
from launcher.image.stack import Stack
from launcher.memory.estimate import Item, Memory, estimate_memory, total
from launcher.memory.states import GIB
from launcher.plan.plan import LocalContext, Plan, refuse
from launcher.plan.text import gib, table
from trainer.contract import SPEC_FILE, Exit, SpecError, TracePhase, TraceReport, decode, write
from trainer.contract.wording import plural

TIMEOUT_S = 1800
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}  # a trace needs no accelerator, and must not wait for one


def trace_plan(plan: Plan, place: LocalContext, environ: Mapping[str, str]) -> TraceReport:
    """Runs the interpreter that cluster.runtime=process trains with. Raises ConfigRefused if the trainer refuses, LaunchError if it fails."""
    with tempfile.TemporaryDirectory(prefix="omnilaunch-trace-") as name:
        write(replace(plan.spec, output=name), Path(name) / SPEC_FILE)
        argv = (place.interpreter, "-m", "trainer", "trace", str(Path(name) / SPEC_FILE))
        try:
            done = subprocess.run(
                argv, cwd=place.project, env={**environ, **HIDDEN}, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"the trace did not end within {TIMEOUT_S} s. Plan without --trace.") from error
    stderr = done.stderr.strip()
    if done.returncode == Exit.USAGE:
        raise ConfigRefused(f"this step cannot be traced:\n{stderr}")
    if done.returncode:
        raise LaunchError(f"the trace failed with exit code {done.returncode}; plan without --trace. Its last lines:\n{stderr[-2000:]}")
    try:
        report: TraceReport = decode(TraceReport, json.loads(done.stdout), "trace")
    except (ValueError, SpecError) as error:
        raise LaunchError(
            f"{place.interpreter} -m trainer trace printed a report that this version cannot read: {error}{os.linesep}{stderr}"
        ) from error
    return report


def go_by_trace(plan: Plan, report: TraceReport, stacks: Mapping[str, Stack]) -> Plan:
    """The plan with its memory and its verdict taken from the traced step. `plan` was made with RULES_BUT_MEMORY. Raises ConfigRefused if the
    traced peak does not fit and run.force is not set."""
    config, planned = plan.config, estimate_memory(plan.config)
    memory = traced_memory(config, planned, report)
    verdict = replace(plan.verdict, tight=memory.is_tight, roomier=())
    if not memory.fits:
        verdict = with_problem(verdict, refuse_traced(config, planned, memory, stacks), forced=bool(config.run.force))
    elif not planned.fits:
        verdict = with_problem(verdict, contradict(planned, memory), forced=bool(config.run.force))
    refuse(verdict, launching=False, overrides=plan.overrides)
    return replace(plan, memory=memory, verdict=verdict)


def traced_memory(config: Config, planned: Memory, report: TraceReport) -> Memory:
    """`planned` with the items of the trace's highest phase instead of the computed ones. The runtime is not in a trace, so its computed item
    stays; fragmentation is the hardware's share of the traced temporary items. The host's items stay."""
    seen = highest_phase(report).items_bytes
    items = tuple(Item(name=name, size_bytes=size, basis="traced") for name, size in seen.items() if size)
    moving = total(item for item in items if item.name not in ("weights", "optimizer"))
    spare = Item(name="fragmentation", size_bytes=int(config.hardware.fragmentation * moving), basis="calibrated")
    items = (*items, spare, *(item for item in planned.items if item.name == "runtime"))
    assumption = f"{planned.assumption}; one step of such a batch was traced; its peak is in the {report.peak_phase} phase"
    return replace(planned, items=items, total_bytes=total(items), assumption=assumption)


def refuse_traced(config: Config, planned: Memory, memory: Memory, stacks: Mapping[str, Stack]) -> Problem:
    """The offered changes are computed, not traced: each must leave free as many bytes as the trace is above the arithmetic."""
    problem = refuse_memory(
        Resolved(asked=config, config=config, memory=planned), memory, stacks, short_bytes=max(0, memory.total_bytes - planned.total_bytes)
    )
    return replace(problem, what=f"by a traced step, {problem.what}; by arithmetic {planned.total_bytes / GIB:.1f} GiB")


def contradict(planned: Memory, memory: Memory) -> Problem:
    """The plan passes by the trace. A launch traces nothing, so the arithmetic refuses it; the problem says so."""
    limit = memory.limit_bytes or 0
    return Problem(
        key="strategy",
        what=f"fits by a traced step, with a peak of {memory.total_bytes / GIB:.1f} GiB of {limit / GIB:g}; by arithmetic it takes "
        f"{planned.total_bytes / GIB:.1f} and does not. A launch, and a plan without --trace, use the arithmetic",
        changes=("run.force='fits by a traced step'",),
        launch_only=True,
        forcible=True,
    )


def with_problem(verdict: Verdict, problem: Problem, *, forced: bool) -> Verdict:
    if forced:
        return replace(verdict, forced=(*verdict.forced, problem))
    return replace(verdict, ok=verdict.ok and problem.launch_only, launchable=False, problems=(*verdict.problems, problem))


def highest_phase(report: TraceReport) -> TracePhase:
    return next(phase for phase in report.phases if phase.phase == report.peak_phase)


def describe_trace(report: TraceReport, plan: Plan) -> str:
    """The peak of each phase of the step, item by item, and the peak by arithmetic."""
    highest = highest_phase(report)
    rows = {name: gib(size) for name, size in sorted(highest.items_bytes.items(), key=lambda item: -item[1])}
    rows |= {f"peak, {phase.phase}": gib(phase.peak_bytes) + ("  the highest" if phase is highest else "") for phase in report.phases}
    rows["peak by arithmetic"] = f"{gib(estimate_memory(plan.config).total_bytes)}  runtime and fragmentation included"
    if report.host_bytes:
        rows["host, a node"] = gib(report.host_bytes)
    image = (
        f"{plural(report.images, 'image')} of {report.image_size[0]} x {report.image_size[1]} pixels" if report.image_size else "no image"
    )
    lines = (
        f"the arithmetic assumed: {estimate_memory(plan.config).assumption}",
        f"one step of {report.samples} x {report.length} tokens: {image}, {report.image_tokens} image tokens, {report.trained_tokens} trained",
        f"torch {report.torch}, {report.cpu_seconds:g} s of processor time, {report.resident_bytes / 2**20:.0f} MiB; {report.parameters:,} parameters",
        *(f"note: {note}" for note in report.notes),
    )
    return "\n".join((table(rows), *lines))
