"""`omnilaunch bench`: run the repeats of a benchmark of conf/experiment, and publish median and range in docs/results."""

import argparse
import gc
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands import launch
from launcher.commands.plan import PROJECT
from launcher.errors import ConfigRefused
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.cell import Cell
    from launcher.bench.repeats import Series
    from launcher.bench.result import PublishedResult
    from launcher.plan.plan import Plan
    from launcher.record.source import SourceTree

CONF = PROJECT / "conf"
RESULTS = PROJECT / "docs/results"
STATUS_PAGE = PROJECT / "docs" / "status.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """
  omnilaunch bench                          list the benchmarks of conf/experiment, and what is published of each
  omnilaunch bench NAME [cluster=...]       run its repeats one after the other, and publish median and range
  omnilaunch bench --matrix                 write the table of docs/status.md from the published results"""
    parser.add_argument("words", nargs="*", metavar="NAME", help="a benchmark of conf/experiment, and where it runs: cluster=lab")
    parser.add_argument("--anew", dest="new_series", action="store_true", help="start another series, and leave an unfinished one as it is")
    dirty = "measure a tree with uncommitted changes; the reason is published"
    parser.add_argument("--dirty", default="", metavar="REASON", help=dirty)
    parser.add_argument("--matrix", action="store_true", help="write the table of docs/status.md")
    parser.add_argument("--results", default="", metavar="FOLDER", help="where results are published; docs/results when omitted")


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.results) if arguments.results else RESULTS
    if arguments.matrix:
        if arguments.words or arguments.results:
            source = RESULTS.relative_to(PROJECT)
            raise ConfigRefused(f"--matrix writes the table of all benchmarks, from {source} alone: omnilaunch bench --matrix")
        return write_matrix(arguments, folder)
    if not arguments.words:
        return list_benchmarks(arguments, folder)
    name, *words = arguments.words
    if "=" in name:
        raise ConfigRefused(f"{name}: the name of a benchmark comes first: omnilaunch bench NAME {name}")
    return measure(arguments, name, words, folder)


def measure(arguments: argparse.Namespace, name: str, words: list[str], folder: Path) -> int:
    """Whatever could stop the series is checked before its first run."""
    from launcher.bench.cell import load_cell
    from launcher.bench.measure import publish
    from launcher.bench.repeats import load_repeats, lock_runs, run_repeats
    from launcher.bench.result import append_result, read_results, require_writable, results_file
    from launcher.record.record import utc_now
    from launcher.record.source import read_source

    cell, path = load_cell(name, words, CONF), results_file(folder, name)
    published = [result.result_id for result in read_results(path)]
    require_writable(path)
    source = read_source(PROJECT)
    dirty = refuse_dirty(source, arguments.dirty)
    runs = Path(plan_cell(cell, name).folder).parent
    gc.enable()  # `main` turned it off; from here on it may be hours
    again = join_command("bench", name, words, arguments, "dirty", "results")
    with lock_runs(runs):
        series = open_series(cell, source, runs, published, again, start_new=arguments.new_series)
        if len(series.done) < cell.config.run.repeats:
            require_devices(plan_cell(cell, name), arguments.say)

        def carry_out(run_id: str) -> Any:
            require_unchanged(source)
            return launch.carry_out(plan_cell(cell, run_id), arguments.say)[0]

        here = cell.config.cluster.is_local
        repeats = run_repeats(series, cell.config.run.repeats, carry_out, tags=(name,), again=again, say=arguments.say, here=here)
        result = publish(series.name, name, repeats, load_repeats(runs, repeats), dirty=dirty, made_at=utc_now())
        result = append_result(path, result)
    arguments.say(f"\n{describe_result(result)}\npublished in {path}; to write the table of docs/status.md: omnilaunch bench --matrix")
    return Exit.OK


def join_command(verb: str, name: str, words: list[str], arguments: argparse.Namespace, *options: str) -> str:
    """The command line that does this again, with the `options` that were given."""
    given = [(f"--{option}", value) for option in options for value in as_list(getattr(arguments, option))]
    return shlex.join(("omnilaunch", verb, name, *words, *(text for pair in given for text in pair)))


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [str(value)] if value else []


def plan_cell(cell: "Cell", run_id: str) -> "Plan":
    """The plan of one run of the benchmark; all its runs have the same plan."""
    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import make_plan
    from launcher.record.record import valid_run_id

    stacks = load_stacks(PROJECT / "images")
    return make_plan(cell.config, stacks, local_context(PROJECT), run_id=valid_run_id(run_id), overrides=cell.overrides)


def open_series(cell: "Cell", source: "SourceTree", runs: Path, published: list[str], again: str, *, start_new: bool) -> "Series":
    """The unfinished series, where the next run would be a repeat of its runs; else a new one."""
    from launcher.bench.repeats import Series, find_series, name_series, refuse_busy, require_same
    from launcher.record.record import utc_now

    found = None if start_new else find_series(cell.name, runs, published=published)
    if found is None:
        return Series(name=name_series(cell.name, utc_now(), pid=os.getpid()), runs=runs)
    refuse_busy(found)
    require_same(found, plan_cell(cell, found.name), source.state, start_new=f"{again} --anew")
    return found


def refuse_dirty(source: "SourceTree", reason: str) -> str:
    """The reason, '' where the tree is clean. Raises ConfigRefused where the code of the result could not be taken from git again."""
    changed = list_changes()
    if source.state.commit and not changed:
        return ""
    if not reason:
        why = f"the tree has uncommitted changes: {', '.join(changed[:8])}" if source.state.commit else f"{PROJECT} is not a git repository"
        raise ConfigRefused(f"{why}. The same code could not be measured again. Commit the changes; or measure anyway: --dirty REASON")
    return reason


def list_changes() -> list[str]:
    """Uncommitted changes of what runs are made of; docs/ is not part of a run."""
    from launcher.record.source import CODE, git

    try:
        lines = git(PROJECT, "status", "--porcelain", "--", *CODE, "conf").decode(errors="replace").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line[3:] for line in lines]


def require_unchanged(source: "SourceTree") -> None:
    from launcher.record.source import read_source

    now = read_source(PROJECT).state
    if (now.commit, now.diff_sha256) != (source.state.commit, source.state.diff_sha256):
        raise ConfigRefused(
            f"the tree changed during the benchmark, from commit {source.state.commit[:12]} to {now.commit[:12]} or in its files"
        )


def require_devices(plan: "Plan", say: Callable[[str], None]) -> None:
    """Raises NodeFailed where the nodes do not have the hardware of the benchmark."""
    from launcher.image.stack import load_stacks
    from launcher.plan.plan import refuse
    from launcher.run.session import examine_nodes, require_health

    refuse(plan.verdict, launching=True)
    stack = load_stacks(PROJECT / "images")[plan.config.hardware.stack]
    require_health(examine_nodes(plan, stack, os.environ, launching=True), say)


# ------------------------------------------------------------------------------------------------------------------- text


def list_benchmarks(arguments: argparse.Namespace, folder: Path) -> int:
    from launcher.bench.cell import list_cells
    from launcher.bench.result import read_results, results_file

    for name in list_cells(CONF):
        results = read_results(results_file(folder, name))
        arguments.say(describe_result(results[-1]) if results else f"{name}: not run")
    return Exit.OK


def write_matrix(arguments: argparse.Namespace, folder: Path) -> int:
    from launcher.bench.matrix import describe_matrix, put_matrix
    from trainer import contract

    contract.write_text(put_matrix(STATUS_PAGE.read_text(encoding="utf-8"), describe_matrix(CONF, folder)), STATUS_PAGE)
    arguments.say(str(STATUS_PAGE))
    return Exit.OK


def describe_result(result: "PublishedResult") -> str:
    """Median, lowest and highest value of each figure, one per line."""
    from launcher.bench.matrix import describe_bits
    from launcher.bench.result import is_unsteady

    lines = [f"{result.result_id}: {len(result.repeats)} repeats of {result.steps} steps, the first {result.warm_up_steps} not counted"]
    for name, span in result.summary.items():
        scale, unit = (2**30, " GiB") if name == "peak_bytes" else (1, "")
        median, low, high = (f"{value / scale:,.6g}" for value in (span.median, span.lowest, span.highest))
        lines.append(f"  {name:24} {median:>12}{unit}  ({low} to {high})")
    lines.append(f"  {'bitwise identical':24} {describe_bits(result)}")
    if is_unsteady(result):
        lines.append("  the speeds vary more than the band that a rerun is compared with: the machine was not steady")
    return "\n".join(lines)
