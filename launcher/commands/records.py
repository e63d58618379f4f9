"""What can be done with runs that have ended: compare them, report on them, list, tag and remove them.

Like image_action, imported by every command, so it imports late itself.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused, RunEnded, suggest
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.schema import Bands
    from launcher.record.index import RunEntry
    from launcher.record.run_files import RunFiles

RUN_HELP = "its id, as `omnilaunch runs` shows it, or its folder"


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    sub = verbs.add_parser("compare", help="whether runs are the same, and where they part", allow_abbrev=False)
    sub.add_argument("runs", nargs="+", metavar="RUN", help=f"the reference, then what is held against it: {RUN_HELP}")
    sub.add_argument(
        "--band", action="append", default=[], metavar="NAME=SHARE", help="loss, throughput, memory or evaluation; in place of run.bands"
    )
    sub.add_argument(
        "--allow", action="append", default=[], metavar="WHAT", help="what may differ: hardware, image, code, data, or a pattern of keys"
    )
    sub.add_argument("--unlike", action="store_true", help="compare runs of two experiments all the same")
    sub.add_argument("--weights", action="store_true", help="read the last checkpoints again, however large they are")
    sub.add_argument("--json", action="store_true", help="everything, as JSON")
    sub.set_defaults(verb=compare_runs, say=say)
    sub = verbs.add_parser("report", help="runs as one page that stands by itself, or as Markdown or rows", allow_abbrev=False)
    sub.add_argument("runs", nargs="+", metavar="RUN", help=f"of several, the first is the reference: {RUN_HELP}")
    form = sub.add_mutually_exclusive_group()
    form.add_argument(
        "--markdown", dest="form", action="store_const", const="md", default="html", help="figures, environment and verdicts as text"
    )
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="a row a step")
    sub.add_argument("--out", default="", metavar="FILE", help="report-RUN.html, .md or .csv in this folder when left out; - prints it")
    sub.add_argument("--replace", action="store_true", help="write over a report that is there already")
    sub.add_argument("--band", action="append", default=[], metavar="NAME=SHARE", help="as for compare")
    sub.add_argument("--allow", action="append", default=[], metavar="WHAT", help="as for compare")
    sub.add_argument("--unlike", action="store_true", help="as for compare")
    sub.set_defaults(verb=report_runs, say=say)
    add_runs(verbs, say)


RUNS_TEXT = """
  omnilaunch runs [KEY=VALUE ...]                list them: stage=lora run.seed=1
  omnilaunch runs tag RUN TAG ...                give a run tags; with --remove take them away
  omnilaunch runs prune [KEY=VALUE ...]          say what a rule would remove; with --yes remove it
"""


def add_runs(verbs: Any, say: Callable[[str], None]) -> None:
    sub = verbs.add_parser(
        "runs",
        help="the runs of this folder",
        description=RUNS_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument("words", nargs="*", metavar="KEY=VALUE", help="an axis or a key of the config, of those to take")
    sub.add_argument("--status", default="", help="finished, stopped, failed, refused, or open: without a record")
    sub.add_argument("--model", default="", help="as model=NAME")
    sub.add_argument("--tag", default="", help="those that have it")
    sub.add_argument("--disk", action="store_true", help="what they take on this machine")
    sub.add_argument("--json", action="store_true", help="all records, as JSON")
    sub.add_argument("--remove", action="store_true", help="of tag: take the tags away")
    sub.add_argument("--keep", type=int, metavar="N", help="of prune: leave the N newest")
    sub.add_argument("--older-than", default="", metavar="AGE", help="of prune: only what ended longer ago: 36h, 30d, 8w")
    sub.add_argument("--yes", action="store_true", help="of prune: remove them, with their checkpoints")
    sub.set_defaults(verb=manage_runs, say=say)


def compare_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.comparison import Outcome, comparison_json, describe_comparison
    from launcher.record.verdict import compare

    reference, *others = read_runs(arguments.runs, at_least=2, every_weight=arguments.weights)
    allow = tuple(arguments.allow)
    refuse_unknown(allow, (reference, *others))
    comparison = compare(reference, others, bands=read_bands(arguments.band, reference), allow=allow, unlike=arguments.unlike)
    arguments.say(comparison_json(comparison) if arguments.json else describe_comparison(comparison))
    return Exit.DIFFERENT if comparison.outcome is Outcome.DIFFERENT else Exit.OK


def report_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.report.page import compare_for_report, render_csv, render_html, render_markdown, write_report

    runs = read_runs(arguments.runs)
    path = Path(arguments.out or f"report-{runs[0].run_id}{f'-and-{len(runs) - 1}-more' if len(runs) > 1 else ''}.{arguments.form}")
    allow = tuple(arguments.allow)
    refuse_unknown(allow, runs)
    comparison, refused = compare_for_report(runs, read_bands(arguments.band, runs[0]), allow=allow, unlike=arguments.unlike)
    render = {"html": render_html, "md": render_markdown, "csv": lambda runs, *_: render_csv(runs)}[arguments.form]
    text = render(runs, comparison, refused)
    if arguments.out == "-":
        arguments.say(text.rstrip("\n"))
        return Exit.OK
    write_report(text, path, replace=arguments.replace)
    arguments.say(f"{path}  {len(text.encode()):,} bytes")
    return Exit.OK


# ------------------------------------------------------------------------------------------------------------------- runs


def manage_runs(arguments: argparse.Namespace) -> int:
    """List, or what the first word says. Raises ConfigRefused for an option that the word does not take."""
    action = arguments.words[0] if arguments.words and arguments.words[0] in OPTIONS else ""
    for word, names in OPTIONS.items():
        given = [name for name in names if getattr(arguments, name.replace("-", "_")) not in (None, False, "")]
        if given and action != word:
            raise ConfigRefused(f"--{given[0]} is an option of: omnilaunch runs {word}")
    if action:
        arguments.words = arguments.words[1:]
    return {"": list_runs, "tag": tag_runs, "prune": prune_runs}[action](arguments)


OPTIONS = {"tag": ("remove",), "prune": ("keep", "older-than", "yes")}


def list_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.index import describe_entries, entries_json

    every, matching = find_entries(arguments)
    if arguments.json:
        arguments.say(entries_json(matching, disk=arguments.disk))
    elif not every:
        arguments.say(f"no runs in {Path.cwd() / 'runs'}; start one with: omnilaunch launch")
    else:
        arguments.say(describe_entries(matching, disk=arguments.disk) or f"none of {len(every)} runs is one of those")
    return Exit.OK


def tag_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.index import read_entry, tag_run

    if len(arguments.words) < 2:
        raise ConfigRefused("name a run and its tags: omnilaunch runs tag RUN TAG ...")
    name, *tags = arguments.words
    entry = read_entry(find_folder(name))
    try:
        after = tag_run(entry, tags, remove=arguments.remove)
    except OSError as error:
        raise RunEnded(f"the tags of run {entry.run_id} could not be written: {error.strerror}; they are as they were") from error
    arguments.say(f"{entry.run_id}  {' '.join(f'#{tag}' for tag in after) or 'has no tags'}")
    return Exit.OK


def prune_runs(arguments: argparse.Namespace) -> int:
    from launcher.record.index import describe_entries
    from launcher.record.prune import Rule, choose, parse_age, remove_runs
    from launcher.record.record import utc_now

    if arguments.keep is None and not arguments.older_than:
        raise ConfigRefused(
            "a rule is wanted: --keep N leaves the N newest, --older-than AGE takes what ended longer ago; --keep 0 takes all"
        )
    if arguments.keep is not None and arguments.keep < 0:
        raise ConfigRefused(f"--keep {arguments.keep}: at least 0")
    every, matching = find_entries(arguments)
    rule = Rule(keep=arguments.keep, older_than=parse_age(arguments.older_than) if arguments.older_than else None)
    chosen = choose(every, matching, rule, utc_now())
    for name, why in chosen.kept.items():
        arguments.say(f"stays: {name}: {why}")
    if not chosen.removed:
        arguments.say("nothing is to be removed")
    elif not arguments.yes:
        arguments.say(
            f"{describe_entries(chosen.removed, disk=True)}\nnothing was removed; to remove these, with their checkpoints, add --yes"
        )
    else:
        for name in remove_runs(chosen.removed):
            arguments.say(f"removed {name}")
    return Exit.OK


def find_entries(arguments: argparse.Namespace) -> "tuple[tuple[RunEntry, ...], list[RunEntry]]":
    """(all runs of this folder, those that the filter takes)."""
    from launcher.record.index import list_entries, parse_filter, require_key

    every = list_entries(Path.cwd() / "runs")
    chosen = parse_filter(arguments.words, status=arguments.status, model=arguments.model, tag=arguments.tag)
    require_key(every, chosen)
    return every, [entry for entry in every if chosen.takes(entry)]


# ------------------------------------------------------------------------------------------------------------------ parts


def read_runs(names: Sequence[str], *, at_least: int = 1, every_weight: bool = False) -> "list[RunFiles]":
    """Raises ConfigRefused for a run that is not there, or that is named twice."""
    from launcher.record.run_files import read_run_files

    folders = [find_folder(name) for name in names]
    twice = next((name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigRefused(f"run {twice} is named twice: name different ones")
    if len(folders) < at_least:
        raise ConfigRefused(f"one run cannot be compared: name another one besides {names[0]}. See: omnilaunch runs")
    return [read_run_files(folder, every_weight=every_weight) for folder in folders]


def find_folder(name: str) -> Path:
    """Of a run by its id below ./runs, or the folder itself."""
    from launcher.commands.live_run import find_run
    from launcher.record.record import PLAN_FILE

    folder = Path(name)
    return folder.resolve() if "/" in name or (folder / PLAN_FILE).is_file() else find_run(name)


def read_bands(words: Sequence[str], reference: "RunFiles") -> "Bands":
    """The bands that the reference stated, with those of the command line in their place."""
    from dataclasses import asdict

    from launcher.config.schema import Bands
    from launcher.record.run_files import bands_of

    values = asdict(bands_of(reference))
    for word in words:
        name, _, text = word.partition("=")
        if name not in values:
            raise ConfigRefused(f"--band {word}: unknown name {name!r}; {suggest(name, values)}")
        values[name] = read_share(text, f"--band {word}")
    return Bands(**values)


def read_share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ConfigRefused(f"{where}: {text!r} is no share; write 0.05 for 5 %")
    return share


def refuse_unknown(allow: Sequence[str], runs: "Sequence[RunFiles]") -> None:
    """Raises ConfigRefused for what is allowed to differ and is no fact of any run: a slip would hide nothing, and be believed to."""
    from launcher.record.comparable import ALLOWANCES, collect_comparables, matches

    keys = {key for run in runs for key in collect_comparables(run)} if allow else set()
    for word in allow:
        if word not in ALLOWANCES and not any(matches(key, (word,)) for key in keys):
            raise ConfigRefused(
                f"--allow {word}: no fact of these runs is called so; {suggest(word, ALLOWANCES)}, or patterns of keys as --json has them"
            )
