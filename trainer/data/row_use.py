"""The step that first trains on a row: for rows in which the data check finds a problem while the ranks are training."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trainer.contract import DataProblem, InputRefused, RowUse, TrainSpec
from trainer.data.batch.assign_to_ranks import window_around
from trainer.data.batch.order import permute
from trainer.data.check import DataPaths
from trainer.data.kept_folder import kept_folder
from trainer.data.rows.indexed_samples import INDEX_FOLDER, index_samples

LISTED = 1000  # uses of a report: the earliest ones


def find_uses(spec: TrainSpec, paths: DataPaths, problems: Iterable[DataProblem]) -> tuple[RowUse, ...]:
    """The uses of the rows with a problem in the steps of the run, the earliest first. () for a stage that does not train, and for a file without
    an index."""
    rows: dict[str, set[int]] = {}
    for problem in problems:
        if problem.row:
            rows.setdefault(problem.file, set()).add(problem.row)
    file = paths.train
    if spec.stage.kind != "train" or file is None or not rows or spec.data.leaves_rows_out:  # then the ranks wait for the check
        return ()
    try:
        samples = index_samples(file, paths.images_of(file), kept_folder(spec.data, INDEX_FOLDER))
    except (OSError, InputRefused):
        return ()
    return first_uses(spec, len(samples), [(named, row, number) for number, named, row in samples.find_rows(rows)])


def first_uses(spec: TrainSpec, count: int, found: Iterable[tuple[str, int, int]]) -> tuple[RowUse, ...]:
    """`found`: (file, row, number of the sample)."""
    listed = list(found)
    if not listed:
        return ()
    positions = np.empty(count, np.int64)
    positions[permute(count, f"{spec.seed}:0")] = np.arange(count)  # the first epoch has each sample once
    size = spec.batch.global_batch
    windows = spec.data.length_aware == "window" and not spec.data.packing
    uses: dict[tuple[str, int], RowUse] = {}
    for file, row, number in listed:
        position = int(positions[number])
        begin = window_around(position, spec, count)[0] if windows else position
        use = RowUse(file=file, row=row, step=begin // size + 1, earliest=windows)
        if use.step <= spec.steps and ((file, row) not in uses or use.step < uses[file, row].step):
            uses[file, row] = use
    return tuple(sorted(uses.values(), key=lambda use: (use.step, Path(use.file), use.row))[:LISTED])
