"""The weights in the safetensors files of a folder, told from the files alone: where each tensor lies, and the hash of all.

Standard library only, so that the launcher can ask whether a checkpoint still holds what its record says. The layout (8 bytes of header
length, JSON header, data) is read by ourselves: the library gives no bytes for bfloat16. https://huggingface.co/docs/safetensors#format
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.contract import InputRefused

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100 * 2**20  # as the safetensors library has it


def hash_weights(folder: Path, *, most_bytes: int | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, by name: equal for equal weights, however they are cut into files. With
    `most_bytes` only so many of each tensor are read. Raises InputRefused for a file that is not whole."""
    digest = hashlib.sha256()
    tensors = {name: (file, entry, start) for file in weight_files(folder) for name, entry, start in read_header(file)}
    for name in sorted(tensors):
        file, entry, start = tensors[name]
        digest.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        first, last = entry["data_offsets"]
        last = last if most_bytes is None else min(last, first + most_bytes)
        with file.open("rb") as stream:
            stream.seek(start + first)
            for begin in range(first, last, 2**24):
                digest.update(stream.read(min(2**24, last - begin)))
    return digest.hexdigest()


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: one, or those that the index names."""
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(folder / name for name in sorted(set(shards)))
    return (folder / (ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).is_file() else WEIGHTS),)


def read_header(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, entry, where the data begins) of each tensor. Raises InputRefused when the file is not as long as its header says."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
        header = stream.read(length) if length <= HEADER_LIMIT_BYTES else b""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputRefused(f"{file} is not a safetensors file. Copy the checkpoint again.") from error
    if file.stat().st_size != 8 + length + end:
        raise InputRefused(f"{file} has {file.stat().st_size} bytes where its header says {8 + length + end}. Copy the checkpoint again.")
    for name, entry in entries.items():
        yield name, entry, 8 + length
