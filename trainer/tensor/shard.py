"""Tensors in safetensors files: written in files of bounded size and read in spans, so that no rank ever holds all of them.

We parse the layout (8 bytes of header length, JSON header, data) ourselves: the library gives neither spans of a flattened tensor nor the
bytes of a bfloat16 one. https://huggingface.co/docs/safetensors#format
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.contract import InputRefused

SHARD_BYTES = 2**30  # collected in memory before a file is written; a larger tensor has its own file


class ShardWriter:
    """Writes `<prefix>-00000.safetensors` and so on into a folder; with `hold` only at `flush`. After an error of the disk it accepts tensors
    and drops them, because the ranks that gather them continue together; `problem` then holds the error."""

    def __init__(self, folder: Path, prefix: str, *, hold: bool = False) -> None:
        self.folder, self.prefix, self.hold = folder, prefix, hold
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes = 0
        self.files, self.problem = 0, ""

    def add(self, name: str, tensor: Tensor) -> None:
        """`tensor`: on the CPU; the caller must not change it afterwards."""
        size = tensor.numel() * tensor.element_size()
        if not self.hold and self.waiting and self.waiting_bytes + size > SHARD_BYTES:
            self.flush()
        self.waiting[name] = tensor
        self.waiting_bytes += size

    def flush(self) -> None:
        """Write everything that waits."""
        while self.waiting:
            piece = self._take_piece()
            if not self.problem:
                self._write(piece)
        self.waiting_bytes = 0

    def _take_piece(self) -> dict[str, Tensor]:
        """The first of the waiting tensors, as many as fit in one file."""
        piece: dict[str, Tensor] = {}
        taken = 0
        while self.waiting:
            name, tensor = next(iter(self.waiting.items()))
            taken += tensor.numel() * tensor.element_size()
            if piece and taken > SHARD_BYTES:
                break
            piece[name] = self.waiting.pop(name)
        return piece

    def _write(self, tensors: dict[str, Tensor]) -> None:
        path = self.folder / f"{self.prefix}-{self.files:05d}.safetensors"
        try:
            save_file(tensors, path)
            sync(path)
        except (OSError, SafetensorError) as error:
            self.problem = str(error)
        self.files += 1


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file; its data start at byte `begin`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor: (count,)."""
        if not count:
            return torch.empty(0, dtype=self.dtype)
        buffer = bytearray(count * self.dtype.itemsize)
        with self.file.open("rb") as stream:
            stream.seek(self.begin + start * self.dtype.itemsize)
            if stream.readinto(buffer) != len(buffer):
                raise InputRefused(f"{self.file} became shorter while it was being read. Copy the checkpoint again.")
        return torch.frombuffer(buffer, dtype=self.dtype, count=count)

    def read_whole(self) -> Tensor:
        return self.read(0, torch.Size(self.shape).numel()).view(self.shape)


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
