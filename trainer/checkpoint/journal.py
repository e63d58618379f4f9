"""A record of finished batches, per rank and on disk, so that a killed stage continues where it was.

Batches have the same numbers on any number of ranks and in every attempt, and each is done as a whole: the final file is bitwise
identical to that of a run without interruption.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed

from trainer.checkpoint.lineage import fingerprint_weights
from trainer.contract import TrainSpec, WeightsLineage, write_text
from trainer.contract.checkpoint_files import fixed_settings
from trainer.distributed.collective import broadcast_object, gather_objects

Row = dict[str, Any]
JOURNAL_FILE = ".{name}.rank{rank}"  # in the run's folder, beside the file `name` that is made of it


class Journal:
    """`done`: rows of a batch by its number. A journal with another `fingerprint` belongs to another task and is started again."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self.path = file
        self.done: dict[int, list[Row]] = {}
        head = json.dumps({"of": fingerprint}).encode() + b"\n"
        self.path.parent.mkdir(exist_ok=True)
        whole = self._read(head)
        if whole:
            os.truncate(self.path, whole)
        else:
            self.path.write_bytes(head)

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """When it returns, the batch is written."""
        self.done[number] = list(rows)
        with self.path.open("ab") as file:
            file.write(json.dumps([number, rows]).encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self, head: bytes) -> int:
        """The number of bytes in complete lines; 0 for a journal of another task. The last line may be incomplete if the run was killed."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if not lines or lines[0] != head:
            return 0
        whole = len(head)
        for line in lines[1:]:
            batch = parse_batch(line)
            if batch is None:
                break
            self.done[batch[0]] = batch[1]
            whole += len(line)
        return whole


def parse_batch(line: bytes) -> tuple[int, list[Row]] | None:
    """None for an incomplete line."""
    try:
        number, rows = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None
    return number, rows


def weights_fingerprints(lineage: WeightsLineage) -> tuple[str, ...]:
    """Hashes that identify the weights of a model, or of an adapter and of its base."""
    return tuple(fingerprint_weights(Path(folder)) for folder in (lineage.path, lineage.base) if folder)


def open_journal(spec: TrainSpec, name: str, rank: int, *inputs: str) -> Journal:
    """`name`: the file to be written. `inputs`: what the answers depend on in addition to the spec: hashes of weights and of rows."""
    task = {**fixed_settings(spec), "evaluation": asdict(spec.evaluation), "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()
    return Journal(Path(spec.output) / JOURNAL_FILE.format(name=name, rank=rank), fingerprint)


def gather_rows(journal: Journal) -> list[Row]:
    """The rows of all ranks, on every rank: a collective."""
    return [row for part in gather_objects([row for rows in journal.done.values() for row in rows]) for row in part]


def write_rows(rows: Sequence[Row], file: Path, rank: int) -> None:
    """Rank 0 writes the file atomically; it exists when this returns on any rank: a collective."""
    if rank == 0:
        file.parent.mkdir(exist_ok=True)
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), file)
    if torch.distributed.is_initialized():
        broadcast_object(None)
