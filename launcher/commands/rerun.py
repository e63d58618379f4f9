"""`omnilaunch rerun`: run a recorded run again, from its record alone, or refuse and name what differs."""

import argparse
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.launch import carry_out
from launcher.commands.live.detach import describe_detached, refuse_detach
from launcher.commands.live.live_run import RUN_HELP
from launcher.commands.plan import PROJECT, RUN_ID_HELP, SCRATCH, add_overrides, conf_of
from launcher.record.run_name import find_run, typed_name
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.rerun import Rerun
    from launcher.config.conf_folder import ConfFolder
    from launcher.record.recorded_run import RecordedRun

ACCEPT_HELP = "a kind of difference that is accepted, such as code or package; may be given several times"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"{RUN_HELP} or record")
    add_overrides(parser, "what to change: hardware=h200, run.seed=2")
    parser.add_argument("--accept", action="append", default=[], metavar="KIND", help=ACCEPT_HELP)
    parser.add_argument("--run-id", default="", help=RUN_ID_HELP)
    parser.add_argument("--detach", action="store_true", help="as for launch")


def run(arguments: argparse.Namespace) -> int:
    from launcher.bench.rerun import accepted_kinds
    from launcher.plan.plan import refuse
    from launcher.plan.text import command_line
    from launcher.record.description import describe_record
    from launcher.record.recorded_run import load_recorded_run

    archive = load_recorded_run(find_run(arguments.run, Path.cwd() / "runs"), rows=False)
    accepted = accepted_kinds(arguments.accept)
    rerun = plan_again(archive, tuple(arguments.overrides), accepted, arguments.run_id, conf_of(arguments))
    refuse(rerun.plan.verdict, launching=True, overrides=rerun.plan.overrides)
    refuse_detach(arguments.detach, rerun.plan.config.cluster.runtime)
    gc.enable()  # `main` turned it off; from here on the process may live for days
    for note in rerun.notes:
        arguments.say(note)
    record, plan = carry_out(rerun.plan, arguments.say, project=rerun.project, detach=arguments.detach, original=rerun.original)
    if record is None:
        arguments.say(describe_detached(plan.run_id))
        return Exit.OK
    arguments.say(describe_record(record, plan))
    arguments.say(f"\nrerun of {archive.record.run_id}: weights {describe_weights(archive, record)}")
    if record.status == "finished":
        again = typed_name(Path(plan.folder), Path.cwd() / "runs")
        arguments.say(f"to compare everything: {command_line('compare', archive.record.run_id, again)}")
    return int(record.exit_code)


def plan_again(archive: "RecordedRun", overrides: tuple[str, ...], accepted: tuple[str, ...], run_id: str, conf: "ConfFolder") -> "Rerun":
    from launcher.bench.rerun import plan_rerun
    from launcher.bench.worktree import find_tree, try_image
    from launcher.plan.local_context import context_for, local_context
    from launcher.plan.plan import absolute
    from launcher.record.record import name_run, utc_now, valid_run_id

    root = next((word.partition("=")[2] for word in overrides if word.startswith("cluster.root=")), archive.plan.config.cluster.root)
    tree = find_tree(archive, PROJECT, Path(absolute(root, Path.cwd())) / SCRATCH)
    tree = try_image(archive, tree) if archive.plan.config.cluster.runtime == "docker" else tree
    name = valid_run_id(run_id or name_run(archive.plan.config, utc_now(), pid=os.getpid()))
    place = local_context(PROJECT)
    return plan_rerun(archive, overrides, accepted, tree, place, os.environ, conf=conf, run_id=name, context_for=context_for)


def describe_weights(archive: "RecordedRun", record: Any) -> str:
    now, then = record.weights_sha256, archive.record.weights_sha256
    if not (now and then):
        return "cannot be compared: not saved by both"
    return f"bitwise identical, {now[:12]}" if now == then else f"different: {now[:12]}, recorded {then[:12]}"
