"""The weight files of a folder, read without torch: where each tensor is, and the hash of all of them.

Standard library only, so that the launcher can check whether a checkpoint still matches its record. We parse the layout (8 bytes of
header length, JSON header, data) ourselves: the library gives no bytes for bfloat16. https://huggingface.co/docs/safetensors#format
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.contract import InputRefused

TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_for_training"  # its key: the tokens of model.add_tokens
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLED = "adapter_model.bin"  # of peft before 0.7, and of save_safetensors=False
INDEX = "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # published models only; torch loads no code from them
MANIFEST_FILE = "omnilaunch.manifest"  # of a folder that was fetched from a hub: JSON, but no *.json, which are inputs of a run
PIECE_BYTES = 2**24  # read at a time
HEADER_LIMIT_BYTES = 100 * 2**20  # the limit of the safetensors library


def hash_weights(folder: Path, *, most_bytes: int | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, sorted by name: equal for equal weights, however they are split into files.
    `most_bytes`: read only this much of each tensor. A .bin file counts as one tensor. Raises InputRefused for a truncated file."""
    digest = hashlib.sha256()
    files = weight_files(folder)
    for file in (file for file in files if not is_safetensors(file)):
        digest.update(f"{file.name}\0".encode())
        hash_range(digest, file, 0, file.stat().st_size, most_bytes)
    tensors = {name: (file, entry, start) for file in files if is_safetensors(file) for name, entry, start in read_header(file)}
    for name in sorted(tensors):
        file, entry, start = tensors[name]
        digest.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        first, last = (start + offset for offset in entry["data_offsets"])
        hash_range(digest, file, first, last, most_bytes)
    return digest.hexdigest()


def hash_range(digest: "hashlib._Hash", file: Path, first: int, last: int, most: int | None) -> None:
    last = last if most is None else min(last, first + most)
    with file.open("rb") as stream:
        stream.seek(first)
        for begin in range(first, last, PIECE_BYTES):
            digest.update(stream.read(min(PIECE_BYTES, last - begin)))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: one, or those that the index names. Safetensors is preferred, as in transformers."""
    if (folder / ADAPTER_WEIGHTS).is_file() and not (folder / INDEX).is_file():
        return (folder / ADAPTER_WEIGHTS,)
    if (folder / ADAPTER_PICKLED).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)):
        return (folder / ADAPTER_PICKLED,)
    for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return tuple(folder / name for name in sorted(set(shards)))
        if (folder / whole).is_file():
            return (folder / whole,)
    return (folder / WEIGHTS,)


def is_safetensors(file: Path) -> bool:
    """Whether the tensors of the file can be read one by one."""
    return file.suffix == ".safetensors"


def read_header(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, entry, offset of the data) of each tensor. Raises InputRefused when the size of the file does not match its header."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
        header = stream.read(length) if length <= HEADER_LIMIT_BYTES else b""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputRefused(f"{file} is not a safetensors file. Copy the checkpoint again.") from error
    if file.stat().st_size != 8 + length + end:
        raise InputRefused(f"{file} has {file.stat().st_size} bytes, but its header says {8 + length + end}. Copy the checkpoint again.")
    for name, entry in entries.items():
        yield name, entry, 8 + length


def fetched_revision(folder: Path) -> str:
    """The commit of the hub's repository that the folder was fetched from; '' if it was not fetched."""
    try:
        found = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def read_added_tokens(folder: Path) -> tuple[str, ...]:
    """The tokens that runs have added to the tokenizer in `folder`; () also where its file cannot be read, which is reported elsewhere."""
    try:
        found = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))[ADDED_TOKENS]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()
