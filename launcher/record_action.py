"""What can be done with runs that have ended: compare them, report on them, list, tag and remove them.

Like image_action, imported by every command, so it imports late itself.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused, suggest
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.evidence import Evidence
    from launcher.schema import Bands

RUN_HELP = "its id, as `omnilaunch runs` shows it, or its folder"


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    sub = verbs.add_parser("compare", help="whether runs are the same, and where they part", allow_abbrev=False)
    sub.add_argument("runs", nargs="+", metavar="RUN", help=f"the reference, then what is held against it: {RUN_HELP}")
    sub.add_argument(
        "--band", action="append", default=[], metavar="NAME=SHARE", help="loss, throughput, memory or evaluation; in place of run.bands"
    )
    sub.add_argument(
        "--allow", action="append", default=[], metavar="WHAT", help="what may differ: hardware, image, code, or a pattern of keys"
    )
    sub.add_argument("--unlike", action="store_true", help="compare runs of two experiments all the same")
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
    sub.add_argument("--unlike", action="store_true", help="as for compare")
    sub.set_defaults(verb=report_runs, say=say)


def compare_runs(arguments: argparse.Namespace) -> int:
    from launcher.compare import compare
    from launcher.comparison import Outcome, comparison_json, describe_comparison

    reference, *others = read_runs(arguments.runs, at_least=2)
    allow = tuple(arguments.allow)
    refuse_unknown(allow, (reference, *others))
    comparison = compare(reference, others, bands=read_bands(arguments.band, reference), allow=allow, unlike=arguments.unlike)
    arguments.say(comparison_json(comparison) if arguments.json else describe_comparison(comparison))
    return Exit.DIFFERENT if comparison.outcome is Outcome.DIFFERENT else Exit.OK


def report_runs(arguments: argparse.Namespace) -> int:
    from launcher.report import compare_for_report, render_csv, render_html, render_markdown, write_report

    runs = read_runs(arguments.runs)
    path = Path(arguments.out or f"report-{runs[0].run_id}{f'-and-{len(runs) - 1}-more' if len(runs) > 1 else ''}.{arguments.form}")
    comparison, refused = compare_for_report(runs, read_bands(arguments.band, runs[0]), unlike=arguments.unlike)
    render = {"html": render_html, "md": render_markdown, "csv": lambda runs, *_: render_csv(runs)}[arguments.form]
    text = render(runs, comparison, refused)
    if arguments.out == "-":
        arguments.say(text.rstrip("\n"))
        return Exit.OK
    write_report(text, path, replace=arguments.replace)
    arguments.say(f"{path}  {len(text.encode()):,} bytes")
    return Exit.OK


# ------------------------------------------------------------------------------------------------------------------ parts


def read_runs(names: Sequence[str], *, at_least: int = 1) -> "list[Evidence]":
    """Raises ConfigRefused for a run that is not there, or that is named twice."""
    from launcher.evidence import read_evidence

    folders = [find_folder(name) for name in names]
    twice = next((name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigRefused(f"run {twice} is named twice: name different ones")
    if len(folders) < at_least:
        raise ConfigRefused(f"one run cannot be compared: name another one besides {names[0]}. See: omnilaunch runs")
    return [read_evidence(folder) for folder in folders]


def find_folder(name: str) -> Path:
    """Of a run by its id below ./runs, or the folder itself."""
    from launcher.record import PLAN_FILE
    from launcher.run_action import find_run

    folder = Path(name)
    return folder.resolve() if "/" in name or (folder / PLAN_FILE).is_file() else find_run(name)


def read_bands(words: Sequence[str], reference: "Evidence") -> "Bands":
    """The bands that the reference stated, with those of the command line in their place."""
    from dataclasses import asdict

    from launcher.evidence import bands_of
    from launcher.schema import Bands

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


def refuse_unknown(allow: Sequence[str], runs: "Sequence[Evidence]") -> None:
    """Raises ConfigRefused for what is allowed to differ and is no fact of any run: a slip would hide nothing, and be believed to."""
    from launcher.fact import ALLOWANCES, collect_facts, fits

    keys = {key for evidence in runs for key in collect_facts(evidence)} if allow else set()
    for word in allow:
        if word not in ALLOWANCES and not any(fits(key, (word,)) for key in keys):
            raise ConfigRefused(
                f"--allow {word}: no fact of these runs is called so; {suggest(word, ALLOWANCES)}, or patterns of keys as --json has them"
            )
