"""What a rank has done of a stage, batch by batch on its disk, so that a run that was killed goes on where it was.

Batches are numbered alike whatever ranks there are and however often the run was started, and each is done as a whole: what comes
out at the end is the same file, to the byte, as that of a run that nobody disturbed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed

from trainer.contract import TrainSpec, write_text
from trainer.resume import fixed_parts
from trainer.start import tell_all

Row = dict[str, Any]
FILES = ".{name}.rank{rank}"  # in the run's folder, beside `name`, which they become


class Journal:
    """`done`: rows of a batch by its number. A journal of another `fingerprint` is of another task: it is begun anew."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self.path = file
        self.done: dict[int, list[Row]] = {}
        head = json.dumps({"of": fingerprint}) + "\n"
        whole = self._read(head) or head.encode()
        self.path.parent.mkdir(exist_ok=True)
        self.file = self.path.open("r+b" if self.path.exists() else "w+b")
        self.file.truncate(0)
        self.file.write(whole)
        self.file.flush()

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """On the disk, as far as this process goes, before it returns."""
        self.done[number] = list(rows)
        self.file.write((json.dumps([number, rows], ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        self.file.flush()

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _read(self, head: str) -> bytes:
        """The whole lines, without one that was being written when the run ended; nothing where they are of another task."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines(keepends=True)
        if not lines or lines[0] != head.encode():
            return b""
        kept = [lines[0]]
        for line in lines[1:]:
            try:
                number, rows = json.loads(line) if line.endswith(b"\n") else (None, None)
            except (ValueError, TypeError):
                break
            if number is None:
                break
            self.done[number] = rows
            kept.append(line)
        return b"".join(kept)


def open_journal(spec: TrainSpec, name: str, rank: int, *inputs: str) -> Journal:
    """`name`: the file that comes of it. `inputs`: what the answers depend on besides the spec: hashes of weights and of rows."""
    told = {**fixed_parts(spec), "evaluation": asdict(spec.evaluation), "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Journal(Path(spec.output) / FILES.format(name=name, rank=rank), fingerprint)


def gather(journal: Journal, rank: int, world_size: int) -> dict[int, list[Row]]:
    """The batches of all ranks by number, on every rank: a collective."""
    parts: list[dict[int, list[Row]]] = [journal.done]
    if world_size > 1:
        parts = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, journal.done)
    return {number: rows for part in parts for number, rows in part.items()}


def write_rows(rows: Sequence[Row], file: Path, rank: int) -> None:
    """By rank 0, whole or not at all; when it returns, the file is there for all: a collective."""
    if rank == 0:
        file.parent.mkdir(exist_ok=True)
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), file)
    if torch.distributed.is_initialized():
        tell_all(None)
