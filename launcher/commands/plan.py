"""`omnilaunch plan`: compose the config and show what `launch` would do, without starting anything."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigRefused
from launcher.redact import show
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.chain import Chain
    from launcher.config.conf_folder import ConfFolder
    from launcher.plan.machine import Machine
    from launcher.plan.plan import Plan

PROJECT = Path(__file__).resolve().parents[2]
SCRATCH = ".cache"  # below cluster.root: worktrees of recorded commits
RUN_ID_HELP = "id of the run; made from the time when omitted"
CONF_HELP = "your own folder with cluster/, model/ ..., searched before the project's conf/; OMNILAUNCH_CONF when omitted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--run-id", default="", help=RUN_ID_HELP)
    parser.add_argument(
        "--full", action="store_true", help="print everything: config, DeepSpeed config, commands of each node, memory by item"
    )
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument("--trace", action="store_true", help="estimate memory by tracing one step; needs the trainer's packages")


def add_overrides(parser: argparse.ArgumentParser, text: str = "an axis (hardware=h200) or a setting (run.steps=100)") -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)
    add_conf(parser)


def add_conf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", default="", metavar="DIR", help=CONF_HELP)


def conf_of(arguments: argparse.Namespace) -> "ConfFolder":
    return conf_named(arguments.conf)


def conf_named(option: str) -> "ConfFolder":
    """`option`: the value of --conf, or ''. Raises ConfigRefused for a folder of the user in which nothing would be found."""
    from launcher.config.conf_folder import find_conf

    return find_conf(PROJECT / "conf", option, os.environ)


def run(arguments: argparse.Namespace) -> int:
    from launcher.plan.plan import plan_json

    if chained := find_chain_of(arguments):
        from launcher.commands.chain import show_chain

        return show_chain(*chained, PROJECT, conf_of(arguments), arguments.say)
    plan, machine = plan_here(arguments.overrides, arguments.run_id, traced=arguments.trace, conf=conf_of(arguments))
    if arguments.json:  # the text has them among its notes
        from launcher.plan.local_context import notes_here

        for line in notes_here(plan):
            show(f"note: {line}", file=sys.stderr)
    if arguments.trace:
        arguments.say(describe_traced(plan, as_json=arguments.json, full=arguments.full))
    else:
        arguments.say(plan_json(plan) if arguments.json else describe_here(plan, machine, full=arguments.full, named=arguments.run_id))
    return Exit.OK


def describe_here(plan: "Plan", machine: "Machine | None" = None, *, full: bool = False, launching: bool = False, named: str = "") -> str:
    """The plan for this terminal: its width, and colours if it takes them. `machine`: where it was asked for the plan. `named`: the run id
    that was typed, which the next command keeps."""
    from shutil import get_terminal_size

    from launcher.plan.full import describe_full
    from launcher.plan.local_context import find_built, notes_here, read_memory, why_not_sent
    from launcher.plan.short import LINES, describe_short
    from launcher.plan.text import wants_colours

    notes, built = notes_here(plan, launching=launching), find_built(plan, machine)
    unsent = why_not_sent(plan, built)
    if full:
        return "\n".join((describe_full(plan, unsent, named), *(f"note: {line}" for line in notes)))
    colours, (columns, rows) = wants_colours(os.environ, terminal=sys.stdout.isatty()), get_terminal_size((100, LINES))
    size = {"width": columns, "height": rows, "own_bytes": read_memory()}
    return describe_short(plan, colours=colours, built=built, launching=launching, notes=notes, unsent=unsent, named=named, **size)


def plan_of(
    overrides: Sequence[str], run_id: str, *, conf: "ConfFolder | None" = None, only_data: bool = False, only_nodes: bool = False
) -> "Plan":
    """The plan of these overrides, for a verb that starts nothing on this machine: what it has is not asked. `only_data`: nothing is
    trained, so neither the memory nor the number of rows matters. `only_nodes`: nor does the batch, for a check of the nodes."""
    return plan_here(overrides, run_id, asks=False, only_data=only_data, only_nodes=only_nodes, conf=conf)[0]


def plan_here(
    overrides: Sequence[str],
    run_id: str,
    *,
    traced: bool = False,
    asks: bool = True,
    only_data: bool = False,
    only_nodes: bool = False,
    conf: "ConfFolder | None" = None,
) -> "tuple[Plan, Machine | None]":
    """The plan, and what this machine has, where the run is on it and it `asks`. `traced`: the memory is judged later, by a traced step.
    `only_data`, `only_nodes`: as of plan_of. `conf`: the project's when omitted."""
    from launcher.config.conf_folder import ConfFolder
    from launcher.plan.visible_devices import naming_devices, with_visible_devices

    conf = conf or ConfFolder(project=PROJECT / "conf")
    used = with_visible_devices(overrides, conf, os.environ) if asks else overrides
    with naming_devices(overrides, used, os.environ):
        return make_plan_here(used, run_id, conf, traced=traced, asks=asks, only_data=only_data, only_nodes=only_nodes)


def make_plan_here(
    overrides: Sequence[str], run_id: str, conf: "ConfFolder", *, traced: bool, asks: bool, only_data: bool, only_nodes: bool
) -> "tuple[Plan, Machine | None]":
    """As plan_here, of all overrides."""
    from launcher.check.nodes import find_placeholders
    from launcher.check.row_count import with_whole_batch
    from launcher.check.rules import RULES, RULES_BUT_MEMORY
    from launcher.config.compose import compose_with_files
    from launcher.config.defaults import keys_of
    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import context_for, find_taken_port, for_this_machine
    from launcher.plan.named_files import find_missing_questions, with_unseen_note
    from launcher.plan.plan import make_plan, with_files, with_problems
    from launcher.plan.rows import find_missing, settle_rows
    from launcher.plan.usable_rows import with_usable_rows
    from launcher.plan.weights_folder import judge_weights, with_found_model
    from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint, find_runs, start_from_checkpoint
    from launcher.record.checkpoint_reference import with_full_ids
    from launcher.record.record import name_run, utc_now, valid_run_id
    from launcher.weights.source import with_weights_folder

    here, overrides = Path.cwd(), with_found_model(overrides, conf)
    config, files = compose_with_files(overrides, conf)
    config = start_from_checkpoint(for_this_machine(config, overrides), overrides, conf, here, os.environ)
    config = config if only_data or not asks else with_usable_rows(config, keys_of(overrides))
    config = with_weights_folder(config if only_data else settle_rows(config, keys_of(overrides), here), os.environ)
    config = with_whole_batch(config) if only_nodes else config
    run_id = valid_run_id(run_id or name_run(config, utc_now(), pid=os.getpid()))
    given = with_full_ids(overrides, *find_runs(config, here))
    rules = RULES_BUT_MEMORY if traced or only_data else RULES
    stacks, compose_again = load_stacks(PROJECT / "images"), partial(compose_from_checkpoint, conf=conf, here=here, environ=os.environ)
    context = context_for(config, stacks, PROJECT, asks=asks)
    context = replace(context, memory_bytes=0) if only_data else context
    plan = make_plan(config, stacks, context, run_id=run_id, overrides=given, rules=rules, conf=conf, compose=compose_again)
    plan = with_unseen_note(judge_weights(plan, conf))
    missing = (*find_missing(config, here), *find_missing_questions(plan))
    found = (*find_placeholders(config), *missing, *find_taken_port(config)) if asks else ()
    plan = with_problems(plan, found)
    return with_files(plan, conf, files), context.machine


def describe_traced(plan: "Plan", *, as_json: bool, full: bool) -> str:
    """The plan with the memory and the verdict of a traced step, and the step itself; in JSON under the key `trace`."""
    import json
    from dataclasses import asdict

    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import to_plain
    from launcher.plan.trace import describe_trace, go_by_trace, trace_plan

    report = trace_plan(plan, local_context(PROJECT), os.environ)
    plan = go_by_trace(plan, report, load_stacks(PROJECT / "images"))
    if as_json:
        return json.dumps(to_plain(plan) | {"trace": asdict(report)}, indent=2, ensure_ascii=False)
    return f"{describe_here(plan, full=full)}\n\n== a traced step\n{describe_trace(report, plan)}"


def find_chain_of(arguments: argparse.Namespace) -> "tuple[Chain, list[str], str] | None":
    """(the chain that the overrides name, the overrides, the id that the ids of its runs begin with); None where they name no chain."""
    from launcher.config.chain import find_chain
    from launcher.record.record import utc_now, valid_run_id

    chain = find_chain(arguments.overrides, conf_of(arguments))
    if chain is None:
        return None
    if refused := [option for option in ("full", "json", "trace", "detach") if getattr(arguments, option, False)]:
        raise ConfigRefused(f"--{refused[0]} works for one run, and experiment={chain.name} is a chain of {len(chain.steps)} runs")
    return chain, arguments.overrides, valid_run_id(arguments.run_id or f"{utc_now():%Y%m%d-%H%M%S}-{chain.name}")
