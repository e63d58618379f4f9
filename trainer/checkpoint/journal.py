"""What a rank has done of a stage, batch by batch on its disk, so that a run that was killed goes on where it was.

Batches are numbered alike whatever ranks there are and however often the run was started, and each is done as a whole: what comes
out at the end is the same file, to the byte, as that of a run that nobody disturbed.
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
from trainer.checkpoint.resume import broadcast_object
from trainer.contract import WeightsLineage, TrainSpec, write_text
from trainer.contract.checkpoint_files import fixed_settings

Row = dict[str, Any]
JOURNAL_FILE = ".{name}.rank{rank}"  # in the run's folder, beside `name`, which they become


class Journal:
    """`done`: rows of a batch by its number. A journal of another `fingerprint` is of another task: it is begun anew."""

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
        """In the file, as far as this process goes, before it returns."""
        self.done[number] = list(rows)
        with self.path.open("ab") as file:
            file.write(json.dumps([number, rows]).encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self, head: bytes) -> int:
        """The bytes of the whole lines, without one that was being written when the run ended; 0 where they are of another task."""
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
    """None for a line that is not whole."""
    try:
        number, rows = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None
    return number, rows


def weights_fingerprints(origin: WeightsLineage) -> tuple[str, ...]:
    """What tells the weights of a model apart, those of an adapter and of its base."""
    return tuple(fingerprint_weights(Path(folder)) for folder in (origin.path, origin.base) if folder)


def open_journal(spec: TrainSpec, name: str, rank: int, *inputs: str) -> Journal:
    """`name`: the file that comes of it. `inputs`: what the answers depend on besides the spec: hashes of weights and of rows."""
    told = {**fixed_settings(spec), "evaluation": asdict(spec.evaluation), "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Journal(Path(spec.output) / JOURNAL_FILE.format(name=name, rank=rank), fingerprint)


def gather_rows(journal: Journal, world_size: int) -> list[Row]:
    """The rows of all ranks, on every rank: a collective."""
    own = [row for rows in journal.done.values() for row in rows]
    parts = [own]
    if world_size > 1:
        parts = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, own)
    return [row for part in parts for row in part]


def write_rows(rows: Sequence[Row], file: Path, rank: int) -> None:
    """By rank 0, whole or not at all; when it returns, the file is there for all: a collective."""
    if rank == 0:
        file.parent.mkdir(exist_ok=True)
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), file)
    if torch.distributed.is_initialized():
        broadcast_object(None)
