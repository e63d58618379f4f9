"""metrics.jsonl: one line per step, written by rank 0."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from trainer.contract import METRICS_FILE, RunFailed, StepRow


@contextmanager
def open_metrics(output: Path, *, writes: bool) -> Iterator[Callable[[StepRow], None]]:
    """Yields the function that appends a metrics row; on other ranks it does nothing. It raises RunFailed if the disk is full.

    A row is written in one call, completely, before the next step begins: only the last line can be incomplete for a reader.
    """
    if not writes:
        yield lambda _: None
        return
    path = output / METRICS_FILE
    with path.open("ab", buffering=0) as file:

        def write(row: StepRow) -> None:
            line = f"{json.dumps(asdict(row))}\n".encode()
            try:
                wrong = "" if file.write(line) == len(line) else "No space left on device"
            except OSError as error:
                wrong = str(error)
            if wrong:
                fix = "Complete checkpoints are kept: free disk space there, and start again."
                raise RunFailed(f"{path}: {wrong}, for the row of step {row.step}. {fix}")

        yield write
