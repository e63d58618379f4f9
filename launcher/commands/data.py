"""`omnilaunch data check`: check all data that a config names, on this machine, before anything is started."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.commands.plan import add_overrides, conf_of, plan_of
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.plan.data.usable_rows import examine
from launcher.redact import show
from trainer import contract
from trainer.contract import (
    DataReport,
    DataSummary,
    Exit,
    TrainSpec,
    write_text,
)
from trainer.contract.wording import plural

SHOWN_CAUSES = 20
ACTIONS = {
    "check": "read every row and every image, and print everything that is wrong with them",
    "fetch": "download the images that rows name by URL, and write the rows with paths in their place; continues where it was stopped",
}
SHOWN_FAILURES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check, fetch = (actions.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in ACTIONS.items())
    add_overrides(check, "as for plan: data=files data.train=rows.json model=NAME")
    check.add_argument("--json", action="store_true", help="print the report with all problems as JSON")
    check.add_argument("--out", default="", metavar="FILE", help="write all problems, one JSON object per line")
    check.set_defaults(parser=check, run=run_check)
    fetch.add_argument("file", metavar="FILE", help="the rows: a JSON list or JSON Lines; it is only read")
    fetch.add_argument("--to", required=True, metavar="FOLDER", help="where the images and the new file of rows are written")
    fetch.add_argument(
        "--key", action="append", default=[], metavar="NAME", help="a key that has images, as image, images and image_url have"
    )
    fetch.add_argument("--jobs", type=int, default=8, metavar="N", help="images at a time (8)")
    fetch.add_argument("--max-bytes", type=int, default=64 * 2**20, metavar="N", help="of one image (64 MiB)")
    fetch.add_argument("--max-total-bytes", type=int, default=200 * 2**30, metavar="N", help="that this run downloads (200 GiB)")
    fetch.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="without a byte (30); an image takes at most ten times that"
    )
    fetch.add_argument("--allow-private", action="store_true", help="also fetch from this machine and from private networks")
    fetch.set_defaults(parser=fetch, run=run_fetch)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.run(arguments))


def run_fetch(arguments: argparse.Namespace) -> int:
    from launcher.media.fetch import Fetching, fetch_rows
    from launcher.media.row_url import KEYS
    from launcher.media.web_image import Limits

    if min(arguments.jobs, arguments.max_bytes, arguments.max_total_bytes, arguments.timeout) <= 0:
        raise ConfigRefused("--jobs, --max-bytes, --max-total-bytes and --timeout must be above 0")
    limits = Limits(
        most_bytes=arguments.max_bytes,
        timeout_s=arguments.timeout,
        whole_s=10 * arguments.timeout,
        private=arguments.allow_private,
    )
    options = Fetching(limits=limits, most_total_bytes=arguments.max_total_bytes, jobs=arguments.jobs, keys=KEYS | frozenset(arguments.key))
    done = fetch_rows(Path(arguments.file), Path(arguments.to), options, lambda line: show(line, file=sys.stderr))
    arguments.say(
        f"{done.images:,} images by URL in {done.rows:,} rows: {done.fetched:,} fetched ({done.bytes:,} bytes), {done.kept:,} here already"
    )
    for row, url, reason in done.failed[:SHOWN_FAILURES]:
        arguments.say(f"  {arguments.file} row {row}: {url}: {reason}")
    if done.failed:
        rows = len({row for row, _, _ in done.failed})
        more = f", {len(done.failed) - SHOWN_FAILURES:,} of them not shown" if len(done.failed) > SHOWN_FAILURES else ""
        arguments.say(
            f"{len(done.failed):,} images of {rows:,} rows are missing{more}. Run the command again to try them again; these rows keep their URLs"
        )
    arguments.say(f"rows       {done.written}")
    arguments.say(f"next       omnilaunch data check data=files data.train={done.written}")
    return Exit.NODE if done.failed else Exit.OK


def run_check(arguments: argparse.Namespace) -> int:
    plan = plan_of(arguments.overrides, "", conf=conf_of(arguments), only_data=True)
    alone = replace(plan.spec, batch=replace(plan.spec.batch, global_batch=1))  # the batch is judged below
    report, problems, left_out = examine(alone, lambda line: show(line, file=sys.stderr))
    if arguments.out:
        write_text("".join(f"{json.dumps(problem, ensure_ascii=False)}\n" for problem in problems), Path(arguments.out))
    if arguments.json:
        arguments.say(json.dumps(asdict(report) | {"problems": problems, "left_out_rows": left_out}, indent=2, ensure_ascii=False))
    else:
        described = describe_data(report, plan.spec.data.max_length)
        if report.train_rows or report.evaluation_rows:
            arguments.say(described)
            say_learning(plan.config, report, arguments.say)
        else:  # of no rows there is nothing to say but why
            arguments.say(described.splitlines()[0])
        if left_out:
            arguments.say(describe_causes(report, left_out))
        arguments.say(describe_problems(problems, arguments.out, report.train_rows + report.evaluation_rows))
        if not problems and (note := describe_few_rows(report, plan.spec)):
            arguments.say(note)
        if plan.spec.stage.kind == "train":
            arguments.say(name_stage(plan.config.stage.name, arguments.overrides))
        away = [node.host for node in plan.config.cluster.working if not node.is_local]
        if away:
            arguments.say(f"checked on this machine; a launch reads the files on {', '.join(away)}")
    return Exit.USAGE if problems else Exit.OK


def name_stage(stage: str, overrides: Sequence[str]) -> str:
    """The stage whose batch and learning rate were judged, and what to type for another one."""
    typed = any(word.startswith(("stage=", "experiment=")) for word in overrides)
    return f"batch and learning rate are those of stage={stage}" + ("" if typed else "; for another one add it, as in stage=lora")


def say_learning(config: Config, report: DataReport, say: Callable[[str], None]) -> None:
    """What the model will learn from the data, and what stands out about it."""
    from launcher.record.learning import describe_learning, find_standouts

    plain = asdict(config), asdict(report)
    for name, text in describe_learning(*plain):
        say(f"{name:10} {text}")
    standouts = find_standouts(*plain)
    say("\n".join(("what stands out:" if standouts else "what stands out: nothing", *(f"  {line}" for line in standouts))))


# -------------------------------------------------------------------------------------------------------------------- text


def describe_data(report: DataReport, max_length: int) -> str:
    summary = report.summary
    lines = [
        ("rows", f"{report.train_rows:,} to train on, {report.evaluation_rows:,} held out; {summary.rows_with_images:,} with images"),
        ("images", describe_sizes(report)),
        *((("adjusted", describe_counts(summary.adjustments)),) if summary.adjustments else ()),
        *((("ignored", f"keys that are not read: {describe_counts(summary.ignored_keys)}"),) if summary.ignored_keys else ()),
        *((("warnings", describe_counts(summary.warnings)),) if summary.warnings else ()),
        *((("left out", contract.describe_left_out(report.left_out)),) if report.left_out else ()),
        ("converted", ", ".join(f"{count:,} {word}" for word, count in summary.conversions.items()) or "none"),
        ("length", describe_lengths(summary, max_length)),
        ("sha256", report.sha256),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)


def describe_few_rows(report: DataReport, spec: TrainSpec) -> str:
    """The rows may be right, and too few for the batch of a launch."""
    batch = spec.batch.global_batch
    if spec.stage.kind != "train" or spec.data.builtin or not 0 < report.train_rows < batch:
        return ""
    return f"note: a launch needs stage.global_batch={report.train_rows} or less: it is {batch}, and a step uses no row twice"


def describe_counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{name} ({plural(rows, 'row')})" for name, rows in counts.items())


def describe_sizes(report: DataReport) -> str:
    sizes = [f"{width}x{height}" for width, height in filter(None, (report.summary.smallest, report.summary.largest))]
    return f"{report.images:,}, from {sizes[0]} to {sizes[1]} pixels" if sizes else f"{report.images:,}"


def describe_lengths(summary: DataSummary, limit: int) -> str:
    if summary.unmeasured:
        return f"not counted: {summary.unmeasured}"
    share = 100 * summary.image_tokens / summary.tokens if summary.tokens else 0.0
    estimated = f"; {summary.estimated_lengths:,} short rows estimated from their characters" if summary.estimated_lengths else ""
    return (
        f"p50 {summary.length_p50:,}, p95 {summary.length_p95:,}, longest {summary.length_max:,} of {limit:,} tokens; "
        f"{share:.0f} % of all {summary.tokens:,} are images{estimated}"
    )


def describe_causes(report: DataReport, left_out: Sequence[dict[str, Any]]) -> str:
    """Which rows are not used, or not as they are written, and why: rows with the same reason together."""
    rows = [contract.as_problem(contract.decode(contract.LeftOutRow, row)) for row in left_out]
    shown = "\n".join(f"  {text}" for text in contract.describe_groups(rows, SHOWN_CAUSES))
    return f"{'left out':10} {contract.describe_left_out(report.left_out)}\n{shown}"


def describe_problems(problems: Sequence[dict[str, Any]], file: str, good_rows: int) -> str:
    if not problems:
        return f"{'problems':10} none"
    found = [contract.decode(contract.DataProblem, problem) for problem in problems]
    texts = contract.describe_groups(found, SHOWN_CAUSES)
    shown = "\n".join(f"  {text}" for text in texts)
    rest = f"\n  all of them: {file or 'with --out FILE, one JSON object a line'}" if len(problems) > 1 else ""
    whose = "of the model: " if contract.blame(found) == "model" else ""
    skip = f"\n  {way}" if (way := contract.suggest_skip(found, good_rows)) else ""
    return f"{'problems':10} {whose}{len(problems):,}\n{shown}{skip}{rest}"
