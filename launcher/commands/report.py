"""`omnilaunch report`: one HTML page, Markdown text or CSV rows, computed from the records of one or several runs."""

import argparse
from pathlib import Path

from launcher.commands.compare import add_limits, read_bands, read_runs, refuse_unknown
from trainer.contract import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="of several, the first is the reference")
    form = parser.add_mutually_exclusive_group()
    text = "figures, environment and verdicts as text"
    form.add_argument("--markdown", dest="form", action="store_const", const="md", default="html", help=text)
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="one row per step")
    parser.add_argument("--out", default="", metavar="FILE", help="report-RUN.html, .md or .csv in this folder when omitted; - prints it")
    parser.add_argument("--replace", action="store_true", help="overwrite an existing report")
    add_limits(parser)


def run(arguments: argparse.Namespace) -> int:
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
