"""What ran where: the table of README.md, drawn from conf/experiment and docs/results. Nobody marks a cell by hand."""

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
HEAD = ("cell", "hardware", "what", "ran", "samples/s", "memory", "final loss", "exact match", "repeats equal to the bit")
NOT_RUN = "not run"


def describe_matrix(conf: Path, results: Path) -> str:
    """A row for each cell, with the newest result of its name where there is one. Raises ConfigRefused for a cell that is not pinned,
    RecordRefused for results that were cut short or edited."""
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
    return (cell.name, f"{config.hardware.title}: {describe_devices(results[-1])}", what, *describe_result(results[-1], config))


def describe_result(result: PublishedResult, config: Config) -> tuple[str, ...]:
    summary = result.summary
    speed, memory, loss = (summary[name] for name in ("samples_per_s", "peak_bytes", "final_loss"))
    score = summary.get("evaluation.exact_match")
    return (
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
    doubts += ["speeds further apart than the band"] if is_unsteady(result) else []
    doubts += ["as the cell was then"] if has_changed(result, config) else []
    count = len(result.repeats)
    return ", ".join((f"{result.made_at[:10]}, {count} repeats", f"commit {result.code.commit[:12] or 'none'}", *busy, *doubts))


def describe_bits(result: PublishedResult) -> str:
    rows, weights = ("yes" if equal else "no" for equal in (result.rows_equal, result.weights_equal))
    return f"rows {rows}, weights {weights}"


def describe_devices(result: PublishedResult) -> str:
    """Of the running ranks, each kind once."""
    titles = [value for key, value in result.facts.items() if key.startswith("device ")]
    return ", ".join(f"{titles.count(title)} x {title}" for title in dict.fromkeys(titles))


def has_changed(result: PublishedResult, config: Config) -> bool:
    """Whether the cell of now would compute something else. A key that only one of the two has is of a version that did not know it."""
    facts = [dict(flatten(plain, "config")) for plain in (result.config, published_config(config))]
    return any(found.known and kind_of(found.key) is not ComparableKind.FREE for found in find_differences(facts[0], facts[1]))


def put_matrix(text: str, table: str) -> str:
    """`text` with the table between its two marks. Raises ConfigRefused where they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigRefused(f"README.md has no place for the table: it needs the lines\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
