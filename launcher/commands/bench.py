"""`omnilaunch bench` and `omnilaunch bench-rerun`: a pinned cell measured and published, and a published result measured again.

Like run_action, imported by every command, so it imports late itself.
"""

import argparse
import gc
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.cell import Cell
    from launcher.bench.repeats import Series
    from launcher.bench.rerun import Rerun
    from launcher.bench.result import PublishedResult, Repeat
    from launcher.config.schema import Cluster
    from launcher.plan.plan import Plan
    from launcher.record.source import SourceTree

PROJECT = Path(__file__).resolve().parents[2]
CONF = PROJECT / "conf"
RESULTS = PROJECT / "docs/results"
README = PROJECT / "README.md"
SCRATCH = ".cache"
TEXT = """
  omnilaunch bench                                the cells of conf/experiment, and what was published of each
  omnilaunch bench NAME [cluster=...]             run its repeats one after the other, and publish median and range
  omnilaunch bench --matrix                       write the table of README.md from what was published
"""
RERUN_TEXT = "a published result once more, from its line alone: reproduced or not, by the bands that its cell had stated"


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    sub = verbs.add_parser(
        "bench",
        help="run a pinned cell of conf/experiment and publish its figures",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument("words", nargs="*", metavar="NAME", help="a cell of conf/experiment, and where it runs: cluster=lab")
    sub.add_argument("--anew", action="store_true", help="leave the runs of a bench that was not finished, and begin another one")
    sub.add_argument("--dirty", default="", metavar="REASON", help="measure a tree with changes that no commit holds; the result says so")
    sub.add_argument("--matrix", action="store_true", help="write the table of README.md")
    sub.add_argument("--results", default="", metavar="FOLDER", help="where the lines go: docs/results of the project when left out")
    sub.set_defaults(verb=run_bench, say=say)
    sub = verbs.add_parser(
        "bench-rerun", help="run a published result again: reproduced or not", description=RERUN_TEXT, allow_abbrev=False
    )
    sub.add_argument("result", metavar="RESULT", help="its id, or a cell's name for the newest one")
    sub.add_argument("words", nargs="*", metavar="cluster=...", help="where it runs")
    sub.add_argument("--repeats", type=int, default=0, metavar="N", help="as many as were published when left out")
    sub.add_argument("--reason", default="", help="why they are fewer than 5")
    sub.add_argument("--accept", action="append", default=[], metavar="KIND", help="code, data or weights that are others: see rerun")
    sub.add_argument("--results", default="", metavar="FOLDER", help="as for bench")
    sub.set_defaults(verb=rerun_bench, say=say)


def run_bench(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.results) if arguments.results else RESULTS
    if arguments.matrix:
        if arguments.words or arguments.results:
            raise ConfigRefused(
                f"--matrix writes the table of all cells, from {RESULTS.relative_to(PROJECT)} alone: omnilaunch bench --matrix"
            )
        return write_matrix(arguments, folder)
    if not arguments.words:
        return list_bench(arguments, folder)
    name, *words = arguments.words
    if "=" in name:
        raise ConfigRefused(f"{name}: the name of a cell comes first: omnilaunch bench NAME {name}")
    return measure_cell(arguments, name, words, folder)


# ------------------------------------------------------------------------------------------------------------------ bench


def measure_cell(arguments: argparse.Namespace, name: str, words: list[str], folder: Path) -> int:
    """Everything that could stop it is looked at before the first run."""
    from launcher.bench.cell import load_cell
    from launcher.bench.measure import publish
    from launcher.bench.repeats import carry_on, hold, read_archives
    from launcher.bench.result import append_result, read_results, require_writable, results_file
    from launcher.record.record import utc_now
    from launcher.record.source import read_source

    cell, path = load_cell(name, words, CONF), results_file(folder, name)
    published = [result.result_id for result in read_results(path)]
    require_writable(path)
    source = read_source(PROJECT)
    dirty = refuse_dirty(source, arguments.dirty)
    runs = Path(plan_cell(cell, name).folder).parent
    gc.enable()  # from here on it may be hours
    again = join_command("bench", name, words, arguments, "dirty", "results")
    with hold(runs):
        series = open_series(cell, source, runs, published, again, anew=arguments.anew)
        if len(series.done) < cell.config.run.repeats:
            require_devices(plan_cell(cell, name), arguments.say)

        def carry_out(run_id: str) -> Any:
            require_unchanged(source)
            return launch_run(plan_cell(cell, run_id), source, arguments.say)

        repeats = carry_on(
            series, cell.config.run.repeats, carry_out, tags=(name,), again=again, say=arguments.say, here=is_here(cell.config.cluster)
        )
        result = publish(series.name, name, repeats, read_archives(runs, repeats), dirty=dirty, made_at=utc_now())
        result = append_result(path, result)
    arguments.say(f"\n{describe_result(result)}\npublished in {path}; the table of README.md: omnilaunch bench --matrix")
    return Exit.OK


def join_command(verb: str, name: str, words: list[str], arguments: argparse.Namespace, *options: str) -> str:
    """What is to be typed to do this once more, with the `options` that were given."""
    said = [(f"--{option}", value) for option in options for value in as_list(getattr(arguments, option))]
    return shlex.join(("omnilaunch", verb, name, *words, *(text for pair in said for text in pair)))


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [str(value)] if value else []


def is_here(cluster: "Cluster") -> bool:
    return cluster.is_local


def plan_cell(cell: "Cell", run_id: str) -> "Plan":
    """The one plan of the cell, by the name of each of its runs."""
    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import make_plan
    from launcher.record.record import valid_run_id

    stacks = load_stacks(PROJECT / "images")
    return make_plan(cell.config, stacks, local_context(PROJECT), run_id=valid_run_id(run_id), overrides=cell.overrides)


def open_series(cell: "Cell", source: "SourceTree", runs: Path, published: list[str], again: str, *, anew: bool) -> "Series":
    """The one that was begun and not published, where the next run would be a repeat of its runs; else a new one."""
    from launcher.bench.repeats import Series, find_series, name_series, refuse_busy, require_same
    from launcher.record.record import utc_now

    found = None if anew else find_series(cell.name, runs, published=published)
    if found is None:
        return Series(name=name_series(cell.name, utc_now(), pid=os.getpid()), runs=runs)
    refuse_busy(found)
    require_same(found, plan_cell(cell, found.name), source.state, anew=f"{again} --anew")
    return found


def refuse_dirty(source: "SourceTree", reason: str) -> str:
    """The reason, '' where the tree needs none. Raises ConfigRefused where nobody could get the code of the result from git."""
    changed = list_changes()
    if source.state.commit and not changed:
        return ""
    if not reason:
        why = f"the tree has changes that no commit holds: {', '.join(changed[:8])}" if source.state.commit else f"{PROJECT} is no git tree"
        raise ConfigRefused(f"{why}. Nobody could measure the same code again. Commit them; or measure it all the same: --dirty REASON")
    return reason


def list_changes() -> list[str]:
    """Of what runs are made of. What is written below docs changes nothing of a run."""
    from launcher.record.source import MADE_OF, git

    try:
        lines = git(PROJECT, "status", "--porcelain", "--", *MADE_OF, "conf").decode(errors="replace").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line[3:] for line in lines]


def require_unchanged(source: "SourceTree") -> None:
    from launcher.record.source import read_source

    now = read_source(PROJECT).state
    if (now.commit, now.diff_sha256) != (source.state.commit, source.state.diff_sha256):
        raise ConfigRefused(
            f"the tree changed under the bench, from commit {source.state.commit[:12]} to {now.commit[:12]} or in its files"
        )


def require_devices(plan: "Plan", say: Callable[[str], None]) -> None:
    """Raises NodeFailed where the hardware of the cell is not there."""
    from launcher.image.stack import load_stacks
    from launcher.plan.plan import refuse
    from launcher.run.session import examine_nodes, require_health

    refuse(plan.verdict, launching=True)
    stack = load_stacks(PROJECT / "images")[plan.config.hardware.stack]
    require_health(examine_nodes(plan, stack, os.environ, launching=True), say)


def launch_run(plan: "Plan", source: "SourceTree", say: Callable[[str], None]) -> Any:
    from launcher.plan.local_context import local_context
    from launcher.run.launch import launch
    from launcher.run.session import open_examined

    opened = open_examined(plan, local_context(PROJECT), os.environ, say=say, terminal=sys.stdout.isatty())
    with opened as (examined, desk):
        return launch(examined, source, desk)


# ------------------------------------------------------------------------------------------------------------------ rerun


def rerun_bench(arguments: argparse.Namespace) -> int:
    from launcher.bench.repeats import Series, carry_on, hold, name_series
    from launcher.bench.result import find_result
    from launcher.bench.verdict import bands_of, describe_reproduction, judge, told_facts
    from launcher.record.record import utc_now

    result = find_result(arguments.result, Path(arguments.results) if arguments.results else RESULTS)
    bands_of(result)  # without them nobody could judge what takes hours to run
    wanted, fewer = count_repeats(arguments, result)
    plan_run = restored(arguments, result)
    first = plan_run("planned")
    for note in first.notes:
        arguments.say(note)
    runs = Path(first.plan.folder).parent
    gc.enable()
    with hold(runs):
        require_devices(first.plan, arguments.say)
        series = Series(name=name_series(f"rerun-{result.experiment}", utc_now(), pid=os.getpid()), runs=runs)

        def carry_out(run_id: str) -> Any:
            return carry_rerun(plan_run(run_id), arguments.say)

        options = ("repeats", "reason", "accept", "results")
        again = f"{join_command('bench-rerun', result.result_id, arguments.words, arguments, *options)} (from its first repeat)"
        tags, here = (result.experiment, "bench-rerun"), is_here(first.plan.config.cluster)
        repeats = carry_on(series, wanted, carry_out, tags=tags, again=again, say=arguments.say, here=here)
    found = judge(told_facts(result), repeats, facts_now(runs, repeats), fewer=fewer)
    arguments.say(f"\n{describe_reproduction(found, told_facts(result))}")
    return Exit.OK if found.reproduced else Exit.DIFFERENT


def count_repeats(arguments: argparse.Namespace, result: "PublishedResult") -> tuple[int, str]:
    """(how many, why fewer). Raises ConfigRefused for fewer without a reason."""
    from launcher.bench.cell import LEAST_REPEATS

    wanted = arguments.repeats or max(LEAST_REPEATS, len(result.repeats))
    if wanted < 1:
        raise ConfigRefused(f"--repeats {wanted}: at least 1")
    if wanted < LEAST_REPEATS and not arguments.reason:
        raise ConfigRefused(f"--repeats {wanted}: of fewer than {LEAST_REPEATS} nobody knows the spread; say why: --reason TEXT")
    return wanted, arguments.reason if wanted < LEAST_REPEATS else ""


def restored(arguments: argparse.Namespace, result: "PublishedResult") -> "Callable[[str], Rerun]":
    """What makes the plan of a rerun by the run id. The code is looked for once."""
    from launcher.bench.cell import COMPUTING, refuse_choices
    from launcher.bench.rerun import accepted_kinds, plan_rerun
    from launcher.bench.restore import restore
    from launcher.bench.worktree import try_image
    from launcher.config.compose import compose
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import absolute

    refuse_choices(arguments.words, (*COMPUTING, "cluster.runtime"))
    cluster, place = compose(arguments.words, CONF).cluster, local_context(PROJECT)
    accepted = accepted_kinds(arguments.accept)
    archive, tree = restore(result, cluster, place, Path(absolute(cluster.root, Path.cwd())) / SCRATCH)
    tree = try_image(archive, tree) if result.site.runtime == "docker" else tree
    return lambda run_id: plan_rerun(archive, (), accepted, tree, place, os.environ, conf=CONF, run_id=run_id)


def carry_rerun(rerun: "Rerun", say: Callable[[str], None]) -> Any:
    from launcher.commands.rerun import carry_out

    record, _ = carry_out(rerun, argparse.Namespace(say=say, detach=False))
    return record


def facts_now(runs: Path, repeats: "tuple[Repeat, ...]") -> dict[str, str]:
    """Of the first repeat; the others have to agree with it."""
    from launcher.bench.measure import facts_in, require_alike
    from launcher.bench.repeats import read_archives
    from launcher.bench.verdict import with_code

    archives = read_archives(runs, repeats)
    require_alike(archives)
    record = archives[0].record
    return with_code(
        facts_in(archives[0]),
        data=record.data_sha256,
        lock=record.lock_sha256,
        image=record.image_id,
        fingerprint=archives[0].plan.image.fingerprint,
    )


# ------------------------------------------------------------------------------------------------------------------- text


def list_bench(arguments: argparse.Namespace, folder: Path) -> int:
    from launcher.bench.cell import list_cells
    from launcher.bench.result import read_results, results_file

    for name in list_cells(CONF):
        results = read_results(results_file(folder, name))
        arguments.say(describe_result(results[-1]) if results else f"{name}: not run")
    return Exit.OK


def write_matrix(arguments: argparse.Namespace, folder: Path) -> int:
    from launcher.bench.matrix import describe_matrix, put_matrix
    from trainer import contract

    contract.write_text(put_matrix(README.read_text(encoding="utf-8"), describe_matrix(CONF, folder)), README)
    arguments.say(str(README))
    return Exit.OK


def describe_result(result: "PublishedResult") -> str:
    """Median, lowest and highest of each figure, one a line."""
    from launcher.bench.matrix import describe_bits
    from launcher.bench.result import is_unsteady

    lines = [f"{result.result_id}: {len(result.repeats)} repeats of {result.steps} steps, the first {result.warm_up_steps} not counted"]
    for name, span in result.summary.items():
        scale, unit = (2**30, " GiB") if name == "peak_bytes" else (1, "")
        median, low, high = (f"{value / scale:,.6g}" for value in (span.median, span.lowest, span.highest))
        lines.append(f"  {name:24} {median:>12}{unit}  ({low} to {high})")
    lines.append(f"  {'equal to the bit':24} {describe_bits(result)}")
    unsteady = (
        ["  the speeds lie further apart than the band that a rerun is held against: the machine was not steady"]
        if is_unsteady(result)
        else []
    )
    return "\n".join((*lines, *unsteady))
