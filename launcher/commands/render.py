"""`omnilaunch render`: write a run as a folder of scripts, to carry to nodes that SSH does not reach."""

import argparse
from pathlib import Path

from launcher.commands.plan import PROJECT, RUN_ID_HELP, add_overrides, conf_of, plan_of
from launcher.record.run_name import find_run
from trainer.contract import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "as for plan; or one RUN that was planned earlier")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--run-id", default="", help=RUN_ID_HELP)


def run(arguments: argparse.Namespace) -> int:
    from launcher.commands.live.live_run import load_plan
    from launcher.image.stack import load_stacks
    from launcher.plan.local_context import with_own_licence
    from launcher.record.reader import read_if_there
    from launcher.record.record import SOURCE_FILE, SourceState
    from launcher.record.source import read_source
    from launcher.run.offline.render import write_bundle

    words = arguments.overrides
    recorded = find_run(words[0], Path.cwd() / "runs") if len(words) == 1 and "=" not in words[0] else None
    stacks = load_stacks(PROJECT / "images")
    plan = with_own_licence(load_plan(recorded), stacks) if recorded else plan_of(words, arguments.run_id, conf=conf_of(arguments))
    source = read_if_there(SourceState, recorded / SOURCE_FILE) if recorded else None
    folder = write_bundle(plan, Path(arguments.to), project=PROJECT, source=source or read_source(PROJECT, plan.files).state)
    arguments.say(f"run {plan.run_id} is written to {folder}. Next: read README.txt in it")
    return Exit.OK
