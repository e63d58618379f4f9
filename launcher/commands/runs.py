"""`omnilaunch runs`: list the runs of this folder, tag them, and remove those that a rule names."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigRefused, LaunchError, RunEnded
from launcher.record.run_name import PLAN_FILE, find_run
from trainer.contract import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.commands.run_table import TableStyle
    from launcher.record.index import RunEntry

# Action -> the options that belong to it alone. Without an action the runs are listed.
OPTIONS = {"tag": ("remove",), "prune": ("keep", "older-than", "yes")}
LIMIT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """
  omnilaunch runs [KEY=VALUE ...]           list the newest runs; only those with these values, such as stage=lora run.seed=1
  omnilaunch runs tag RUN TAG ...           give a run tags; with --remove take them away
  omnilaunch runs prune [KEY=VALUE ...]     show what a rule would remove; with --yes remove it
  omnilaunch runs prune RUN ...             the same for these runs"""
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="an axis or a key of the config; or an action: tag, prune")
    parser.add_argument("--status", default="", help="finished, stopped, failed, refused, running, open or unreadable")
    parser.add_argument("--model", default="", help="the same as model=NAME")
    parser.add_argument("--tag", default="", help="only runs with this tag")
    parser.add_argument("--limit", type=int, metavar="N", help=f"list at most N runs; {LIMIT} when omitted")
    parser.add_argument("--all", action="store_true", help="list all runs")
    parser.add_argument("--disk", action="store_true", help="show how much disk space they take on this machine")
    parser.add_argument("--json", action="store_true", help="print them all as JSON, with their records")
    parser.add_argument("--remove", action="store_true", help="tag: remove the tags")
    parser.add_argument("--keep", type=int, metavar="N", help="prune: keep the N newest")
    parser.add_argument("--older-than", default="", metavar="AGE", help="prune: only runs that ended more than AGE ago: 36h, 30d, 8w")
    parser.add_argument("--yes", action="store_true", help="prune: remove them, with their checkpoints")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigRefused for an option that belongs to another action."""
    action = arguments.words[0] if arguments.words and arguments.words[0] in OPTIONS else ""
    for owner, names in OPTIONS.items():
        given = [name for name in names if getattr(arguments, name.replace("-", "_")) not in (None, False, "")]
        if given and action != owner:
            raise ConfigRefused(f"--{given[0]} is an option of: omnilaunch runs {owner}")
    if action:
        arguments.words = arguments.words[1:]
    return {"": list_runs, "tag": tag_runs, "prune": prune_runs}[action](arguments)


def list_runs(arguments: argparse.Namespace) -> int:
    from launcher.commands.run_table import count_runs, describe_entries, entries_json
    from launcher.record.record import utc_now

    if arguments.limit is not None and (arguments.limit < 1 or arguments.all):
        raise ConfigRefused(f"--limit {arguments.limit}: at least 1, and not together with --all")
    every, matching = find_entries(arguments)
    most = len(matching) if arguments.all or (arguments.json and arguments.limit is None) else arguments.limit or LIMIT
    if arguments.json:
        arguments.say(entries_json(matching[:most], disk=arguments.disk))
    elif not every:
        arguments.say(f"no runs in {Path.cwd() / 'runs'}; start one with: omnilaunch launch")
    elif not matching:
        arguments.say(f"none of {count_runs(len(every))} matches" if len(every) > 1 else "the only run does not match")
    else:
        arguments.say(describe_entries(matching[:most], style_of(every, disk=arguments.disk), utc_now()))
        if most < len(matching):
            arguments.say(f"the newest {most} of {count_runs(len(matching))}; for all of them: --all")
        say_resumable(matching, arguments.say)
    return Exit.OK


def say_resumable(entries: "list[RunEntry]", say: Callable[[str], None]) -> None:
    """How to continue the newest of these runs, if it did not finish."""
    from launcher.commands.live.live_run import load_plan, say_resume
    from launcher.record.index import OPEN
    from launcher.record.run_name import RUN_ID, read_start

    named = (entry for entry in entries if RUN_ID.fullmatch(entry.folder.name))  # no command takes another name of a run
    stopped = [entry for entry in named if entry.status in ("stopped", "failed", OPEN) and (entry.folder / PLAN_FILE).is_file()]
    newest = max(stopped, key=lambda entry: read_start(entry.folder), default=None)
    if newest is None:
        return
    with suppress(LaunchError):  # a plan that this version cannot read
        say_resume(newest.folder, load_plan(newest.folder), say, status="" if newest.status == OPEN else newest.status)


def style_of(every: "Sequence[RunEntry]", *, disk: bool) -> "TableStyle":
    from shutil import get_terminal_size

    from launcher.commands.run_table import COLUMNS, TableStyle
    from launcher.record.run_name import shorten_ids

    return TableStyle(width=get_terminal_size((COLUMNS, 24)).columns, names=shorten_ids(entry.run_id for entry in every), disk=disk)


def tag_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.index import read_entry, tag_run

    if len(arguments.words) < 2:
        raise ConfigRefused("name a run and its tags: omnilaunch runs tag RUN TAG ...")
    name, *tags = arguments.words
    entry = read_entry(find_run(name, Path.cwd() / "runs"))
    try:
        after = tag_run(entry, tags, remove=arguments.remove)
    except OSError as error:
        raise RunEnded(f"the tags of run {entry.run_id} could not be written: {error.strerror}; they are unchanged") from error
    arguments.say(f"{entry.run_id}  {' '.join(f'#{tag}' for tag in after) or 'has no tags'}")
    return Exit.OK


def prune_runs(arguments: argparse.Namespace) -> int:
    from launcher.commands.run_table import describe_entries
    from launcher.record.prune_runs import Rule, choose, parse_age, remove_runs
    from launcher.record.record import utc_now

    named = {find_run(word, Path.cwd() / "runs") for word in arguments.words if "=" not in word}
    arguments.words = [word for word in arguments.words if "=" in word]
    if arguments.keep is None and not arguments.older_than and not named:
        raise ConfigRefused(
            "prune needs a rule or a RUN: --keep N keeps the N newest, --older-than AGE removes what ended longer ago; --keep 0 removes all"
        )
    if arguments.keep is not None and arguments.keep < 0:
        raise ConfigRefused(f"--keep {arguments.keep}: at least 0")
    every, matching = find_entries(arguments)
    rule = Rule(keep=arguments.keep, older_than=parse_age(arguments.older_than) if arguments.older_than else None)
    chosen = choose(every, [entry for entry in matching if not named or entry.folder in named], rule, utc_now())
    for name, why in chosen.kept.items():
        arguments.say(f"kept: {name}: {why}")
    if not chosen.removed:
        arguments.say("there is nothing to remove")
    elif not arguments.yes:
        listed = describe_entries(chosen.removed, style_of(every, disk=True), utc_now())
        arguments.say(f"{listed}\nnothing was removed. To remove these, with their checkpoints: --yes")
    else:
        for name in remove_runs(chosen.removed):
            arguments.say(f"removed {name}")
    return Exit.OK


def find_entries(arguments: argparse.Namespace) -> "tuple[tuple[RunEntry, ...], list[RunEntry]]":
    """(all runs of this folder, those that match the filter), the newest first."""
    from launcher.record.index import list_entries, parse_filter, require_key

    found = (entry for entry in list_entries(Path.cwd() / "runs") if entry.is_run)
    every = tuple(sorted(found, key=lambda entry: (entry.started_at, entry.run_id), reverse=True))
    chosen = parse_filter(arguments.words, status=arguments.status, model=arguments.model, tag=arguments.tag)
    require_key(every, chosen)
    return every, [entry for entry in every if chosen.takes(entry)]
