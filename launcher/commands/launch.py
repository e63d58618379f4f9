"""`omnilaunch launch`: plan a run, check its nodes, and start it; or resume one (`resume`)."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.live.detach import describe_detached, refuse_detach
from launcher.commands.plan import PROJECT, RUN_ID_HELP, add_overrides, conf_of, describe_here, find_chain_of, plan_here
from launcher.errors import ConfigRefused
from trainer.contract import Exit

RESUME_HELP = "continue a run that was stopped, killed or failed, from its newest checkpoint; RUN as everywhere: an id, `last`, a path"
ACCEPT_HELP = "with --resume: a kind of difference that is accepted, such as steps, data or nodes; may be given several times"

if TYPE_CHECKING:
    from launcher.config.conf_folder import ConfFolder
    from launcher.plan.plan import Plan
    from launcher.record.record import OriginalRun, Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--run-id", default="", help=RUN_ID_HELP)
    parser.add_argument(
        "--detach", action="store_true", help="return when all ranks are started and the data is checked; the run continues"
    )
    parser.add_argument("--resume", metavar="RUN", help=RESUME_HELP)
    parser.add_argument("--accept", action="append", default=[], metavar="KIND", help=ACCEPT_HELP)


def run(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        from launcher.commands.live.resume import resume_run

        if arguments.run_id:
            raise ConfigRefused("--run-id and --resume exclude each other: a run that is resumed keeps its id. Leave out --run-id")
        return resume_run(
            arguments.resume, arguments.overrides, arguments.accept, say=arguments.say, detach=arguments.detach, conf=conf_of(arguments)
        )
    if arguments.accept:
        raise ConfigRefused(
            "--accept is for --resume: it accepts what differs from a run that is resumed. Leave it out, or add --resume RUN"
        )
    if chained := find_chain_of(arguments):
        from launcher.commands.chain import launch_chain
        from launcher.commands.live.resume import resume_run

        conf = conf_of(arguments)
        launch = partial(launch_one, say=arguments.say, conf=conf, following=False)
        resume = partial(resume_run, overrides=(), accept=(), say=arguments.say, detach=False, conf=conf, following=False)
        return launch_chain(*chained, PROJECT, conf, launch, lambda folder: resume(str(folder)), arguments.say)
    return launch_one(arguments.overrides, arguments.run_id, say=arguments.say, detach=arguments.detach, conf=conf_of(arguments))


def launch_one(
    overrides: Sequence[str],
    run_id: str,
    *,
    say: Callable[[str], None],
    detach: bool = False,
    conf: "ConfFolder | None" = None,
    following: bool = True,
) -> int:
    """`following`: print the next commands, which a chain carries out itself."""
    from launcher.plan.plan import refuse
    from launcher.plan.visible_devices import naming_devices
    from launcher.record.description import describe_record

    plan, machine = plan_here(overrides, run_id, conf=conf)
    with naming_devices(overrides, plan.overrides, os.environ):
        refuse(plan.verdict, launching=True, overrides=plan.overrides)
    refuse_detach(detach, plan.config.cluster.runtime)
    say(describe_here(plan, machine, launching=True))
    gc.enable()  # `main` turned it off; from here on the process may live for days
    if not plan.is_local:
        say(f"checking {', '.join(node.host for node in plan.config.cluster.working)}")
    record, plan = carry_out(plan, say, detach=detach)
    say(describe_record(record, plan, following=following) if record else describe_detached(plan.run_id))
    return record.exit_code if record else Exit.OK


def carry_out(
    plan: "Plan", say: Callable[[str], None], *, project: Path = PROJECT, detach: bool = False, original: "OriginalRun | None" = None
) -> "tuple[Record | None, Plan]":
    """Check the nodes and run the plan. (record, None where it is detached; the plan with what was found on the nodes)."""
    from launcher.plan.local_context import local_context
    from launcher.record.source import read_source
    from launcher.run.launch import launch
    from launcher.run.session import open_session
    from launcher.ssh.background import in_background

    source = in_background(lambda: read_source(project, plan.files))  # git runs while the nodes are checked
    with open_session(plan, local_context(project), os.environ, say=say, terminal=sys.stdout.isatty()) as (plan, session):
        return launch(plan, source.result(), session, detach=detach, original=original), plan
