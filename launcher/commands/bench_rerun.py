"""`omnilaunch bench-rerun`: run a published benchmark again, from its published line alone, and say whether it reproduces."""

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.bench import RESULTS, join_command, require_devices
from launcher.commands.launch import carry_out
from launcher.commands.plan import PROJECT, SCRATCH, add_conf, conf_of
from launcher.commands.rerun import ACCEPT_HELP
from launcher.errors import ConfigRefused
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.rerun import Rerun
    from launcher.bench.result import PublishedResult, Repeat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    result = "id of a published result, a unique prefix of one, the name of a benchmark for its newest result, or `last`"
    parser.add_argument("result", metavar="RESULT", help=result)
    parser.add_argument("words", nargs="*", metavar="cluster=...", help="where it runs")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="as many as were published when omitted")
    parser.add_argument("--reason", default="", help="why there are fewer than 5 repeats")
    parser.add_argument("--accept", action="append", default=[], metavar="KIND", help=ACCEPT_HELP)
    parser.add_argument("--results", default="", metavar="FOLDER", help="where results are published; docs/results when omitted")
    add_conf(parser)


def run(arguments: argparse.Namespace) -> int:
    from launcher.bench.repeats import Series, lock_runs, name_series, run_repeats
    from launcher.bench.result import find_result
    from launcher.bench.verdict import bands_of, describe_reproduction, judge, with_all_facts
    from launcher.record.record import utc_now

    result = find_result(arguments.result, Path(arguments.results) if arguments.results else RESULTS)
    bands_of(result)  # refuses a result without bands, before hours of runs that could not be judged
    wanted, fewer = count_repeats(arguments, result)
    plan_run = restore_plan(arguments, result)
    first = plan_run("planned")
    for note in first.notes:
        arguments.say(note)
    runs = Path(first.plan.folder).parent
    gc.enable()
    with lock_runs(runs):
        require_devices(first.plan, arguments.say)
        series = Series(name=name_series(f"rerun-{result.experiment}", utc_now(), pid=os.getpid()), runs=runs)
        options = ("repeats", "reason", "accept", "results", "conf")
        again = f"{join_command('bench-rerun', result.result_id, arguments.words, arguments, *options)} (from its first repeat)"
        tags, here = (result.experiment, "bench-rerun"), first.plan.config.cluster.is_local

        def carry(run_id: str) -> Any:
            rerun = plan_run(run_id)
            return carry_out(rerun.plan, arguments.say, project=rerun.project, original=rerun.original)[0]

        repeats = run_repeats(series, wanted, carry, tags=tags, again=again, say=arguments.say, here=here)
    found = judge(with_all_facts(result), repeats, collect_comparables(runs, repeats), fewer=fewer)
    arguments.say(f"\n{describe_reproduction(found, with_all_facts(result))}")
    return Exit.OK if found.reproduced else Exit.DIFFERENT


def count_repeats(arguments: argparse.Namespace, result: "PublishedResult") -> tuple[int, str]:
    """(number of repeats, why they are fewer than usual). Raises ConfigRefused for fewer without a reason."""
    from launcher.bench.cell import LEAST_REPEATS

    wanted = arguments.repeats or max(LEAST_REPEATS, len(result.repeats))
    if wanted < 1:
        raise ConfigRefused(f"--repeats {wanted}: at least 1")
    if wanted < LEAST_REPEATS and not arguments.reason:
        raise ConfigRefused(f"--repeats {wanted}: fewer than {LEAST_REPEATS} repeats do not show the spread. Say why: --reason TEXT")
    return wanted, arguments.reason if wanted < LEAST_REPEATS else ""


def restore_plan(arguments: argparse.Namespace, result: "PublishedResult") -> "Callable[[str], Rerun]":
    """Run id -> the plan of a rerun. The code of the result is looked up once."""
    from launcher.bench.cell import COMPUTING, refuse_choices
    from launcher.bench.rerun import accepted_kinds, plan_rerun
    from launcher.bench.restore import restore
    from launcher.bench.worktree import try_image
    from launcher.config.compose import compose
    from launcher.plan.local_context import context_for, local_context
    from launcher.plan.plan import absolute

    refuse_choices(arguments.words, (*COMPUTING, "cluster.runtime"))
    conf = conf_of(arguments)
    cluster, context = compose(arguments.words, conf).cluster, local_context(PROJECT)
    accepted = accepted_kinds(arguments.accept)
    archive, tree = restore(result, cluster, context, Path(absolute(cluster.root, Path.cwd())) / SCRATCH)
    tree = try_image(archive, tree) if result.site.runtime == "docker" else tree
    return lambda run_id: plan_rerun(archive, (), accepted, tree, context, os.environ, conf=conf, run_id=run_id, context_for=context_for)


def collect_comparables(runs: Path, repeats: "tuple[Repeat, ...]") -> dict[str, str]:
    """The facts of the first repeat; the others must agree with it."""
    from launcher.bench.measure import facts_in, require_alike
    from launcher.bench.repeats import load_repeats
    from launcher.bench.verdict import add_code_facts

    archives = load_repeats(runs, repeats)
    require_alike(archives)
    record, plan = archives[0].record, archives[0].plan
    code = {"data": record.data_sha256, "lock": record.lock_sha256, "image": record.image_id, "fingerprint": plan.image.fingerprint}
    return add_code_facts(facts_in(archives[0]), **code)
