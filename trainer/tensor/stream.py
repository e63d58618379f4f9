"""Weights read and written in pieces, so that no process ever holds a whole model: every tensor of a folder as a source to read from, and
new tensors, computed while they are written, in safetensors files of bounded size with transformers' index.

Files are read with `read`, never mapped: mapped pages would count as this process's memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.contract import InputRefused, write_text
from trainer.contract.weight_files import INDEX, PICKLED_INDEX, WEIGHTS, is_safetensors, read_header, weight_files
from trainer.tensor.shard import StoredTensor, sync

# https://huggingface.co/docs/safetensors#format
DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_CODE.items()}
PIECE_ELEMENTS = 2**24  # processed at a time: 64 MiB in float32
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class PickledTensor:
    """A tensor of a .bin file, which torch maps into memory."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int, count: int) -> Tensor:
        return self.tensor.reshape(-1)[start : start + count]

    def read_whole(self) -> Tensor:
        return self.tensor


class TensorSource(Protocol):
    """A tensor on the disk. `read`: elements [start, start + count) of the flattened tensor: (count,)."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, count: int) -> Tensor: ...

    def read_whole(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """`pieces`: yields the elements in order, in tensors of `dtype`, when the tensor is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def open_tensors(folder: Path) -> dict[str, TensorSource]:
    """Every tensor of the checkpoint or adapter in `folder` by name, in the order of the files. Raises InputRefused for a shard that is
    missing, truncated or of another revision than the index, and for a dtype that torch does not have."""
    found: dict[str, TensorSource] = {}
    files = weight_files(folder)
    for file in files:
        if not file.is_file():
            raise InputRefused(f"{folder}: the weight file {file.name} is missing. Copy the checkpoint again.")
        found |= open_safetensors(file) if is_safetensors(file) else open_pickled(file)
    index = folder / (INDEX if is_safetensors(files[0]) else PICKLED_INDEX)
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    if lost := sorted(set(named) - set(found)):
        raise InputRefused(
            f"{folder}: {index.name} names {len(lost)} tensors that are in none of its files, as {', '.join(lost[:3])}: the files are of "
            "another revision than the index. Copy the checkpoint again."
        )
    return found


def find_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of a folder, by name. Raises InputRefused for a truncated file."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in open_safetensors(file).items()}


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    entries = sorted(read_header(file), key=lambda one: one[1]["data_offsets"][0])
    unknown = [f"{name} ({entry['dtype']})" for name, entry, _ in entries if entry["dtype"] not in DTYPE_OF_CODE]
    if unknown:
        raise InputRefused(f"{file}: {', '.join(unknown[:3])}: torch has no such dtype; known are {', '.join(DTYPE_OF_CODE)}.")
    return {
        name: StoredTensor(
            file=file, dtype=DTYPE_OF_CODE[entry["dtype"]], shape=tuple(entry["shape"]), begin=start + entry["data_offsets"][0]
        )
        for name, entry, start in entries
    }


def open_pickled(file: Path) -> dict[str, TensorSource]:
    """With torch's loader for tensors only: code in the file is never run. Raises InputRefused if the file contains any."""
    from pickle import UnpicklingError

    from transformers.modeling_utils import load_state_dict

    try:
        tensors = load_state_dict(str(file), map_location="cpu", weights_only=True)
    except (UnpicklingError, OSError, RuntimeError, ValueError) as error:
        raise InputRefused(
            f"{file} is not a file of tensors, or is truncated: {error}. Use the published file, or copy it again."
        ) from error
    return {name: PickledTensor(tensor=tensor) for name, tensor in tensors.items()}


def read_pieces(source: TensorSource) -> Iterator[Tensor]:
    """(rows, the other dimensions flattened) each, in order."""
    width = torch.Size(source.shape[1:]).numel()
    total = torch.Size(source.shape).numel()
    step = max(1, PIECE_ELEMENTS // max(1, width)) * width
    for start in range(0, total, max(1, step)):
        yield source.read(start, min(step, total - start)).view(-1, width)


def read_float32(source: TensorSource) -> Tensor:
    """The tensor in float32, converted in pieces: a 16-bit tensor is never whole in memory beside it."""
    whole = torch.empty(source.shape, dtype=torch.float32)
    flat, start = whole.view(-1), 0
    for piece in read_pieces(source):
        flat[start : start + piece.numel()] = piece.reshape(-1)
        start += piece.numel()
    return whole


def copy_tensor(name: str, source: TensorSource) -> TensorToWrite:
    """Unchanged, bitwise identical."""
    return TensorToWrite(name=name, dtype=source.dtype, shape=source.shape, pieces=lambda: read_pieces(source))


def write_shards(tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int, report: Callable[[str], None] = print) -> None:
    """Write `tensors` in files of at most `shard_bytes` (a larger tensor has its own file), with an index if there are several files, and
    sync them. Raises OSError if the disk is full."""
    shards = list(split_into_shards(tensors, shard_bytes)) if tensors else []
    file_of_tensor: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else SHARD.format(number=number, count=len(shards))
        write_file(shard, folder / file)
        file_of_tensor |= {tensor.name: file for tensor in shard}
        report(f"wrote {file}: {len(shard)} tensors, {sum(tensor.nbytes for tensor in shard) / 2**30:.2f} GiB")
    if len(shards) > 1:
        size = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = {"metadata": size, "weight_map": dict(sorted(file_of_tensor.items()))}
        write_text(json.dumps(index, indent=2) + "\n", folder / INDEX)


def split_into_shards(tensors: Sequence[TensorToWrite], shard_bytes: int) -> Iterator[list[TensorToWrite]]:
    """In their order, as many as fit in a file."""
    shard: list[TensorToWrite] = []
    taken = 0
    for tensor in tensors:
        if shard and taken + tensor.nbytes > shard_bytes:
            yield shard
            shard, taken = [], 0
        shard.append(tensor)
        taken += tensor.nbytes
    yield shard


def write_file(tensors: Sequence[TensorToWrite], path: Path) -> None:
    """Wide elements first, so that each tensor is aligned to its element size, as the safetensors library does."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": CODE_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in ordered:
            write_tensor(tensor, stream)
    sync(path)


def write_tensor(tensor: TensorToWrite, stream: Any) -> None:
    written = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise TypeError(f"{tensor.name}: a piece is {piece.dtype}, the tensor {tensor.dtype}")
        written += stream.write(piece.contiguous().view(-1).view(torch.uint8).numpy())
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes were written, not {tensor.nbytes}")
