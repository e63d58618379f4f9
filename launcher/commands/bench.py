"""`omnilaunch bench`: run the repeats of a benchmark of conf/experiment, and publish median and range in docs/results."""

import argparse
import gc
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands import launch
from launcher.commands.plan import PROJECT, add_conf, conf_of
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
# Figure of a summary -> (name, factor, unit) for a person.
FIGURES = {
    "samples_per_s": ("throughput", 1, "samples/s"),
    "tokens_per_s": ("", 1, "tokens/s"),
    "step_s": ("time of a step", 1000, "ms"),
    "peak_bytes": ("peak memory", 2**-30, "GiB"),
    "final_loss": ("final loss", 1, ""),
}
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
    add_conf(parser)


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

    cell, path = load_cell(name, words, conf_of(arguments)), results_file(folder, name)
    published = [result.result_id for result in read_results(path)]
    require_writable(path)
    source = read_source(PROJECT, cell.files)
    dirty = refuse_dirty(source, arguments.dirty)
    runs = Path(plan_cell(cell, name).folder).parent
    gc.enable()  # `main` turned it off; from here on it may be hours
    again = join_command("bench", name, words, arguments, "dirty", "results", "conf")
    with lock_runs(runs):
        series = open_series(cell, source, runs, published, again, start_new=arguments.new_series)
        if len(series.done) < cell.config.run.repeats:
            require_devices(plan_cell(cell, name), arguments.say)

        def carry_out(run_id: str) -> Any:
            require_unchanged(source, cell)
            return launch.carry_out(plan_cell(cell, run_id), arguments.say)[0]

        here = cell.config.cluster.is_local
        repeats = run_repeats(series, cell.config.run.repeats, carry_out, tags=(name,), again=again, say=arguments.say, here=here)
        result = publish(series.name, name, repeats, load_repeats(runs, repeats), dirty=dirty, made_at=utc_now())
        result = append_result(path, result)
    arguments.say(f"\n{describe_result(result)}\npublished in {path}\n{next_commands(result)}")
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
    from launcher.plan.local_context import context_for, for_this_machine
    from launcher.plan.plan import make_plan
    from launcher.record.record import valid_run_id

    stacks = load_stacks(PROJECT / "images")
    config = for_this_machine(cell.config, cell.overrides)
    context = context_for(config, stacks, PROJECT)
    plan = make_plan(config, stacks, context, run_id=valid_run_id(run_id), overrides=cell.overrides)
    return replace(plan, files=cell.files, conf=cell.conf)


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
    state = source.state
    if state.commit and not state.dirty:
        return ""
    if not reason:
        changed = ", ".join((*source.code, *state.conf)[:8]) or state.diff_lacks
        why = f"the tree has uncommitted changes: {changed}" if state.commit else f"{PROJECT} is not a git repository"
        raise ConfigRefused(f"{why}. The same code could not be measured again. Commit the changes; or measure anyway: --dirty REASON")
    return reason


def require_unchanged(source: "SourceTree", cell: "Cell") -> None:
    from launcher.record.source import read_source

    now = read_source(PROJECT, cell.files).state
    before = source.state
    if (now.commit, now.diff_sha256, now.conf) != (before.commit, before.diff_sha256, before.conf):
        raise ConfigRefused(f"the tree changed during the benchmark, from commit {before.commit[:12]} to {now.commit[:12]} or in its files")


def require_devices(plan: "Plan", say: Callable[[str], None]) -> None:
    """Raises NodeFailed where the nodes do not have the hardware of the benchmark."""
    from launcher.image.stack import load_stacks
    from launcher.plan.plan import refuse
    from launcher.run.session import examine_nodes, require_health

    refuse(plan.verdict, launching=True)
    require_health(examine_nodes(plan, load_stacks(PROJECT / "images"), os.environ, launching=True), say)


# ------------------------------------------------------------------------------------------------------------------- text


def next_commands(result: "PublishedResult") -> str:
    from launcher.plan.text import command_line

    return f"next steps\n  {command_line('bench', '--matrix')}  # writes the table of docs/status.md\n  {command_line('bench-rerun', result.experiment)}"


def list_benchmarks(arguments: argparse.Namespace, folder: Path) -> int:
    from launcher.bench.cell import list_cells
    from launcher.bench.result import read_results, results_file

    for name in list_cells(conf_of(arguments)):
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
    from launcher.plan.text import figure

    lines = [f"{result.result_id}: {len(result.repeats)} repeats of {result.steps} steps, the first {result.warm_up_steps} not counted"]
    for name, span in result.summary.items():
        title, factor, unit = FIGURES.get(name, (name.removeprefix("evaluation.").replace("_", " "), 1, ""))
        median, low, high = (figure(value * factor) for value in (span.median, span.lowest, span.highest))
        spread = f"({low} to {high})" if low != high else ""
        lines.append(f"  {title:18} {f'{median} {unit}':20} {spread}".rstrip())
    lines.append(f"  {'bitwise identical':18} {describe_bits(result)}")
    if is_unsteady(result):
        lines.append("  the speeds vary more than the band that a rerun is compared with: the machine was not steady")
    return "\n".join(lines)
