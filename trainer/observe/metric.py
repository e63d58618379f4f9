"""metrics.jsonl: one line a step, written by rank 0."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from trainer.contract import METRICS_FILE, StepRow


@contextmanager
def open_metrics(output: Path, *, writes: bool) -> Iterator[Callable[[StepRow], None]]:
    """Yields the function that appends a row; on ranks that do not write it does nothing.

    A row reaches the file in one write, whole, before the next step begins: a reader never sees half a line but the last.
    """
    if not writes:
        yield lambda _: None
        return
    with (output / METRICS_FILE).open("a", encoding="utf-8", buffering=1) as file:

        def write(row: StepRow) -> None:
            file.write(json.dumps(asdict(row)) + "\n")

        yield write
