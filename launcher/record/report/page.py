"""Reports on runs as an HTML page, as Markdown or as CSV, made from their records alone.

The page needs no other file: no script, no font, no URL, which its content security policy enforces. Every value of a record is text: Jinja
escapes it, and nothing in a record becomes markup.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused, RunEnded
from launcher.plan.text import shorten
from launcher.record.comparison import Comparison, Outcome, describe_figures, describe_judgement
from launcher.record.learning import describe_learning, find_standouts
from launcher.record.metrics import COLUMNS, SERIES
from launcher.record.report.answers import ImageBudget, choose_samples
from launcher.record.report.figures import BUCKETS, Line, draw_chart
from launcher.record.report.summary import (
    TONES,
    describe_axes,
    launch_line,
    list_commands,
    list_details,
    list_environment,
    list_evaluations,
    list_figures,
    side_by_side,
    status_of,
)
from launcher.record.report.timeline import Timeline, lay_out
from launcher.record.run_files import RunFiles
from launcher.record.verdict import compare
from launcher.redact import for_file
from trainer import contract

TEMPLATE = Path(__file__).with_name("page.html.j2")
FROM_ZERO = ("learning rate", "samples per second", "memory, GiB")
OUTCOME_TONES = {Outcome.SAME: "good", Outcome.EQUIVALENT: "warn", Outcome.DIFFERENT: "bad"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins with one of these


def compare_for_report(
    runs: Sequence[RunFiles], bands: Bands, *, allow: tuple[str, ...] = (), unlike: bool
) -> tuple[Comparison | None, str]:
    """(the comparison, or the reason why there is none): runs that cannot be compared are still shown side by side."""
    if len(runs) < 2:
        return None, ""
    try:
        return compare(runs[0], runs[1:], bands=bands, allow=allow, unlike=unlike), ""
    except ConfigRefused as error:
        return None, str(error)


def render_html(runs: Sequence[RunFiles], comparison: Comparison | None, refused: str) -> str:
    """One page for all runs. The same records always give the same page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    images = ImageBudget()
    shown = [describe_run(run, images) for run in runs]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title_of(runs),
        subtitle=describe_axes(runs[0]) if len(runs) == 1 else f"{len(runs)} runs",
        runs=shown,
        side_by_side=side_by_side([dict(one["figures"]) for one in shown]),
        reference=runs[0].run_id,
        verdicts=list(describe_verdicts(comparison)) if comparison else [],
        verdict_refused=refused,
        charts=list(draw_charts(runs)),
        banded=any(len(run.curve.step) > BUCKETS for run in runs),
    )
    return for_file(page)


def title_of(runs: Sequence[RunFiles]) -> str:
    names = [run.run_id for run in runs]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more" if len(names) > 3 else ", ".join(names)


def describe_run(run: RunFiles, images: ImageBudget) -> dict[str, Any]:
    status = status_of(run)
    return {
        "name": run.run_id,
        "status": status,
        "tone": TONES.get(status, "warn"),
        "problems": run.problems,
        "figures": list_figures(run),
        "timeline": describe_timeline(lay_out(run)),
        "evaluations": list_evaluations(run),
        "samples": [asdict(sample) for sample in choose_samples(run, images)],
        "matches": sum(answer.get("match") is True for answer in run.answers),
        "answers": len(run.answers),
        "launch": launch_line(run),
        "commands": [{"rank": rank, "host": host, "text": text} for rank, host, text in list_commands(run)],
        "learning": describe_learning(config_of(run), run.data),
        "standouts": find_standouts(config_of(run), run.data, run.curve),
        "environment": list_environment(run),
        "details": list_details(run),
    }


def config_of(run: RunFiles) -> dict[str, Any]:
    config = run.plan.get("config")
    return config if isinstance(config, dict) else {}


def describe_timeline(timeline: Timeline) -> dict[str, Any]:
    """Positions in per cent of the total time."""
    whole = timeline.total_s or 1.0
    rows = [
        (host, [asdict(bar) | {"left": round(100 * bar.begin_s / whole, 2), "width": round(100 * bar.seconds / whole, 2)} for bar in bars])
        for host, bars in timeline.rows
    ]
    ends = dict.fromkeys(bar.end for _, bars in timeline.rows for bar in bars)
    return {
        "rows": rows,
        "ends": list(ends),
        "total": f"{timeline.total_s:,.1f} s",
        "failures": timeline.failures,
        "resumptions": timeline.resumptions,
    }


def describe_verdicts(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for judgement in comparison.judgements:
        found = [
            {"key": one.key, "kind": one.kind.value, "left": shorten(one.left, 400), "right": shorten(one.right, 400)}
            for one in judgement.differences
        ]
        yield {
            "run": judgement.run_id,
            "outcome": judgement.outcome.value,
            "tone": OUTCOME_TONES[judgement.outcome],
            "reasons": judgement.reasons,
            "figures": "\n".join(line.strip() for line in describe_figures(judgement)),
            "matching": sum(judgement.matching.values()),
            "differences": found,
        }


def draw_charts(runs: Sequence[RunFiles]) -> Iterator[tuple[str, str]]:
    for name, values_of in SERIES.items():
        lines = [Line(label=run.run_id, steps=run.curve.step, values=values_of(run.curve), colour=place) for place, run in enumerate(runs)]
        if chart := draw_chart(name, lines, from_zero=name in FROM_ZERO):
            yield name, chart


# ------------------------------------------------------------------------------------------------------ Markdown and rows


def render_markdown(runs: Sequence[RunFiles], comparison: Comparison | None, refused: str) -> str:
    """Figures and environment side by side, then the verdicts. Every value of a record is in a code span or a code block."""
    parts = [f"# {code(title_of(runs))}\n"]
    for title, list_rows in (("Figures", list_figures), ("Environment", list_environment)):
        rows = side_by_side([dict(list_rows(run)) for run in runs])
        head = f"| | {' | '.join(code(run.run_id) for run in runs)} |\n|---|{'---|' * len(runs)}"
        parts.append(
            "\n".join((f"## {title}\n", head, *(f"| {label(name)} | {' | '.join(map(code, values))} |" for name, values in rows), ""))
        )
    texts = ["\n".join(describe_judgement(judgement, comparison.reference)) for judgement in comparison.judgements] if comparison else []
    texts += [refused] if refused else []
    parts += [f"## Comparison\n\n{fence(text)}\n" for text in texts]
    for run in runs:
        timeline = lay_out(run)
        lines = "\n".join((launch_line(run), *run.problems, *timeline.resumptions, *timeline.failures))
        parts.append(f"## {code(run.run_id)}\n\n{fence(lines)}\n")
        learning = [f"{name}: {text}" for name, text in describe_learning(config_of(run), run.data)]
        standouts = [f"stands out: {line}" for line in find_standouts(config_of(run), run.data, run.curve)]
        parts += [fence("\n".join((*learning, *standouts))) + "\n"] if learning or standouts else []
    return for_file("\n".join(parts))


def code(text: str) -> str:
    """One line as a code span. A `|` is replaced, since it would end the cell of a table."""
    line = " ".join(text.split()).replace("|", "¦")
    if not line:
        return ""
    ticks = "`" * (longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def label(name: str) -> str:
    """The name of a metric may hold any characters: then it becomes a code span."""
    return name if re.fullmatch(r"[\w ]+", name) else code(name)


def fence(text: str) -> str:
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}\n{text}\n{ticks}"


def longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def render_csv(runs: Sequence[RunFiles]) -> str:
    """One row for each step of each run."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("run", *COLUMNS))
    for run in runs:
        name = cell(run.run_id)
        writer.writerows(zip([name] * len(run.curve.step), *(run.curve.column(column) for column in COLUMNS), strict=True))
    return for_file(stream.getvalue())


def cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


# ----------------------------------------------------------------------------------------------------------------- writing


def write_report(text: str, path: Path, *, replace: bool) -> None:
    """Completely or not at all. Raises ConfigRefused if the file exists, RunEnded if it cannot be written."""
    if path.exists() and not replace:
        raise ConfigRefused(f"{path} exists already and is not overwritten: choose another file with --out, or add --replace")
    try:
        contract.write_text(text, path)
    except OSError as error:
        raise RunEnded(
            f"the report could not be written to {path}: {error.strerror or error}. No file was changed. Free disk space, or choose another "
            "file with --out FILE"
        ) from error
