"""`omnilaunch data check`: the data that a config names, looked at whole on this machine, before anything is started.

Imported by every command, so it imports late itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused, LaunchError
from trainer.contract import DATA_FILE, DATA_PROBLEMS_FILE, SPEC_FILE, DataReport, DataSummary, Exit, TrainSpec, read, write, write_text

if TYPE_CHECKING:
    from launcher.plan.plan import Plan

PROJECT = Path(__file__).resolve().parents[2]
SHOWN_PROBLEMS = 50
MakePlan = Callable[[Sequence[str], str], "Plan"]


def add_to(parser: argparse.ArgumentParser, make_plan: MakePlan) -> None:
    text = "read every row and every image, and tell everything that is wrong with them"
    sub = parser.add_subparsers(required=True, metavar="ACTION").add_parser("check", help=text, description=text, allow_abbrev=False)
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for plan: data=files data.train=rows.json model=NAME")
    sub.add_argument("--json", action="store_true", help="the report with all problems as JSON")
    sub.add_argument("--out", default="", metavar="FILE", help="all problems, one JSON object a line")
    sub.set_defaults(verb=check_data, make_plan=make_plan)


def check_data(arguments: argparse.Namespace) -> int:
    plan = arguments.make_plan(arguments.overrides, "")
    report, problems = examine(plan.spec)
    if arguments.out:
        write_text("".join(f"{json.dumps(problem, ensure_ascii=False)}\n" for problem in problems), Path(arguments.out))
    if arguments.json:
        print(json.dumps(asdict(report) | {"problems": problems}, indent=2, ensure_ascii=False))
    else:
        print(describe_data(report, plan.spec.data.max_length))
        print(describe_problems(problems, arguments.out))
        away = [node.host for node in plan.config.cluster.working if not node.is_local]
        if away:
            print(f"read on this machine; a launch reads what lies on {', '.join(away)}")
    return Exit.USAGE if problems else Exit.OK


def examine(spec: TrainSpec) -> tuple[DataReport, list[dict[str, Any]]]:
    """The trainer's own check, in a process of its own: it needs packages that the launcher does without. Raises LaunchError."""
    with tempfile.TemporaryDirectory(prefix="omnilaunch-data-") as name:
        folder = Path(name)
        write(replace(spec, output=name), folder / SPEC_FILE)
        argv = (sys.executable, "-m", "trainer", "data", str(folder / SPEC_FILE))
        done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, errors="replace", check=False)
        if not (folder / DATA_FILE).is_file():
            raise refusal(done.returncode, done.stderr.strip())
        report: DataReport = read(DataReport, folder / DATA_FILE)
        listed = folder / DATA_PROBLEMS_FILE
        lines = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
    return report, [json.loads(line) for line in lines if line]


def refusal(code: int, said: str) -> LaunchError:
    if "ModuleNotFoundError" in said:
        return ConfigRefused(
            f"{sys.executable} lacks what reads the data: {said.splitlines()[-1]}\n  Next: pip install 'omnilaunch[trainer]' there, or let "
            "a launch check it: cluster.runtime=docker does so in the image"
        )
    if code == Exit.USAGE:
        return ConfigRefused(said)
    return LaunchError(f"the check of the data ended with exit code {code}:\n{said}")


# ------------------------------------------------------------------------------------------------------------- what is said


def describe_data(report: DataReport, max_length: int) -> str:
    summary = report.summary
    lines = [
        ("rows", f"{report.train_rows:,} to train on, {report.evaluation_rows:,} held out; {summary.rows_with_images:,} with images"),
        ("images", describe_sizes(report)),
        ("converted", ", ".join(f"{count:,} {word}" for word, count in summary.conversions.items()) or "none"),
        ("length", describe_lengths(summary, max_length)),
        ("sha256", report.sha256),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


def describe_sizes(report: DataReport) -> str:
    sizes = [f"{width}x{height}" for width, height in filter(None, (report.summary.smallest, report.summary.largest))]
    return f"{report.images:,}, from {sizes[0]} to {sizes[1]} pixels" if sizes else f"{report.images:,}"


def describe_lengths(summary: DataSummary, limit: int) -> str:
    if summary.unmeasured:
        return f"not counted: {summary.unmeasured}"
    share = 100 * summary.image_tokens / summary.tokens if summary.tokens else 0.0
    return (
        f"p50 {summary.length_p50:,}, p95 {summary.length_p95:,}, longest {summary.length_max:,} of {limit:,} tokens; "
        f"{share:.0f} % of all {summary.tokens:,} are images"
    )


def describe_problems(problems: Sequence[dict[str, Any]], file: str) -> str:
    if not problems:
        return f"{'problems':10} none"
    shown = "\n".join(f"  {describe_problem(problem)}" for problem in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    rest = f"\n  ... and {more:,} more{f' in {file}' if file else ': --out FILE writes all'}" if more > 0 else ""
    return f"{'problems':10} {len(problems):,}\n{shown}{rest}"


def describe_problem(problem: dict[str, Any]) -> str:
    from trainer.contract import DataProblem, decode

    return str(decode(DataProblem, problem))
