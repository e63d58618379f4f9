"""The table of docs/status.md that shows what was measured where, generated from conf/experiment and docs/results."""

from collections.abc import Sequence
from pathlib import Path

from launcher.bench.cell import Cell, list_cells, load_cell
from launcher.bench.measure import published_config
from launcher.bench.result import PublishedResult, is_unsteady, read_results, results_file
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.image.docs import markdown
from launcher.record.comparable import ComparableKind, find_differences, flatten, kind_of

BEGIN, END = "<!-- omnilaunch bench --matrix: begin -->", "<!-- omnilaunch bench --matrix: end -->"
HEAD = ("cell", "hardware", "what", "ran", "samples/s", "memory", "final loss", "exact match", "repeats bitwise identical")
NOT_RUN = "not run"


def describe_matrix(conf: Path, results: Path) -> str:
    """One row for each cell, with its newest result. Raises ConfigRefused for a cell that is not pinned, RecordRefused for damaged results."""
    rows = [describe_row(load_cell(name, (), conf), read_results(results_file(results, name))) for name in list_cells(conf)]
    return "\n".join(markdown((HEAD, *rows)))


def describe_row(cell: Cell, results: Sequence[PublishedResult]) -> tuple[str, ...]:
    config = cell.config
    what = (
        f"{config.model.name} {config.stage.name} {config.precision.name} {config.strategy.name}, "
        f"{config.data.name}, {config.run.steps} steps of {config.stage.global_batch}"
    )
    if not results:
        return (cell.name, config.hardware.title, what, NOT_RUN, "", "", "", "", "")
    result, summary = results[-1], results[-1].summary
    speed, memory, loss = (summary[name] for name in ("samples_per_s", "peak_bytes", "final_loss"))
    score = summary.get("evaluation.exact_match")
    return (
        cell.name,
        f"{config.hardware.title}: {describe_devices(result)}",
        what,
        describe_run(result, config),
        f"{speed.median:,.1f} ({speed.lowest:,.1f} to {speed.highest:,.1f})",
        f"{memory.median / 2**30:.2f} GiB",
        f"{loss.median:.4f}",
        f"{score.median:.4f}" if score else "",
        describe_bits(result),
    )


def describe_run(result: PublishedResult, config: Config) -> str:
    loads = [repeat.load for repeat in result.repeats if repeat.load is not None]
    busy = [f"load of the machine {min(loads):.1f} to {max(loads):.1f}"] if loads else []
    doubts = ["on a tree with changes"] if result.code.dirty else []
    doubts += ["speeds vary more than the band"] if is_unsteady(result) else []
    doubts += ["the cell has changed since"] if has_changed(result, config) else []
    count = len(result.repeats)
    return ", ".join((f"{result.made_at[:10]}, {count} repeats", f"commit {result.code.commit[:12] or 'none'}", *busy, *doubts))


def describe_bits(result: PublishedResult) -> str:
    rows, weights = ("yes" if equal else "no" for equal in (result.rows_equal, result.weights_equal))
    return f"rows {rows}, weights {weights}"


def describe_devices(result: PublishedResult) -> str:
    """Each kind of device once, with its count."""
    titles = [value for key, value in result.facts.items() if key.startswith("device ")]
    return ", ".join(f"{titles.count(title)} x {title}" for title in dict.fromkeys(titles))


def has_changed(result: PublishedResult, config: Config) -> bool:
    """Whether the cell of today computes something else. A key that only one of the two has is unknown to the other version."""
    then, now = (dict(flatten(plain, "config")) for plain in (result.config, published_config(config)))
    return any(found.known and kind_of(found.key) is not ComparableKind.FREE for found in find_differences(then, now))


def put_matrix(text: str, table: str) -> str:
    """`text` with the table between BEGIN and END. Raises ConfigRefused if they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigRefused(f"docs/status.md has no place for the table. It needs these two lines:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
