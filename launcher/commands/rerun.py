"""`omnilaunch rerun RUN [overrides]`: the run of a record once more, from nothing but that record.

Like run_action, imported by every command, so it imports late itself.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.rerun import Rerun
    from launcher.record.reader import Archive

PROJECT = Path(__file__).resolve().parents[2]
TEXT = "the run of a record once more: the same code, data, weights and environment, or a refusal that names what differs"
SCRATCH = ".cache"


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    sub = verbs.add_parser("rerun", help="the run of a record once more", description=TEXT, allow_abbrev=False)
    sub.add_argument("run", metavar="RUN", help="its id, as `omnilaunch runs` shows it, or the folder of its record")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what is to be otherwise: hardware=h200, run.seed=2")
    sub.add_argument(
        "--accept", action="append", default=[], metavar="KIND", help="a kind of difference that does not stop it: code,package"
    )
    sub.add_argument("--run-id", default="", help="name of the run; made from the time when left out")
    sub.add_argument("--detach", action="store_true", help="as for launch")
    sub.set_defaults(verb=rerun_run, say=say)


def rerun_run(arguments: argparse.Namespace) -> int:
    from launcher.bench.rerun import accepted_kinds
    from launcher.record.description import describe_record
    from launcher.record.reader import load_archive

    archive = load_archive(find_record(arguments.run), rows=False)
    accepted = accepted_kinds(arguments.accept)
    rerun = make_rerun(archive, tuple(arguments.overrides), accepted, arguments.run_id)
    if arguments.detach and rerun.plan.config.cluster.runtime != "docker":
        raise ConfigRefused("--detach leaves containers behind that go on by themselves, and cluster.runtime=process has none")
    gc.enable()  # from here on it may be days
    for note in rerun.notes:
        arguments.say(note)
    record, plan = carry_out(rerun, arguments)
    if record is None:
        arguments.say(f"it goes on by itself; to take it up again: omnilaunch attach {plan.run_id}")
        return Exit.OK
    arguments.say(describe_record(record, plan))
    arguments.say(f"\nrerun of {archive.record.run_id}: weights {describe_weights(archive, record)}")
    return int(record.exit_code)


def find_record(text: str) -> Path:
    """The folder of a run's record: a path, or an id below this folder's runs."""
    from launcher.commands.live_run import find_run
    from launcher.record.record import PLAN_FILE

    folder = Path(text)
    return folder if (folder / PLAN_FILE).is_file() or "/" in text else find_run(text)


def make_rerun(archive: "Archive", overrides: tuple[str, ...], accepted: tuple[str, ...], run_id: str) -> "Rerun":
    from launcher.bench.rerun import plan_rerun
    from launcher.bench.worktree import find_tree, try_image
    from launcher.plan.local_context import local_context
    from launcher.plan.plan import absolute
    from launcher.record.record import name_run, utc_now, valid_run_id

    root = next((word.partition("=")[2] for word in overrides if word.startswith("cluster.root=")), archive.plan.config.cluster.root)
    tree = find_tree(archive, PROJECT, Path(absolute(root, Path.cwd())) / SCRATCH)
    tree = try_image(archive, tree) if archive.plan.config.cluster.runtime == "docker" else tree
    name = valid_run_id(run_id or name_run(archive.plan.config, utc_now(), pid=os.getpid()))
    return plan_rerun(archive, overrides, accepted, tree, local_context(PROJECT), os.environ, conf=PROJECT / "conf", run_id=name)


def carry_out(rerun: "Rerun", arguments: argparse.Namespace) -> Any:
    """(record or None, plan as it was carried out)."""
    from launcher.plan.local_context import local_context
    from launcher.record.source import read_source
    from launcher.run.launch import launch
    from launcher.run.session import open_examined

    opened = open_examined(rerun.plan, local_context(rerun.project), os.environ, say=arguments.say, terminal=sys.stdout.isatty())
    with opened as (plan, desk):
        record = launch(plan, read_source(rerun.project), desk, detach=arguments.detach, precedent=rerun.precedent)
        return record, plan


def describe_weights(archive: "Archive", record: Any) -> str:
    if not (record.weights_sha256 and archive.record.weights_sha256):
        return "not saved by both"
    same = record.weights_sha256 == archive.record.weights_sha256
    return (
        f"the same, {record.weights_sha256[:12]}"
        if same
        else f"others: {record.weights_sha256[:12]}, {archive.record.weights_sha256[:12]} there"
    )
