"""Checkpoints that are whole or not there: written aside, synced, renamed; opened only when every byte of them is there.

A folder `checkpoints/step-000300` holds the weights in safetensors under the names that transformers publishes (so that the
family's `from_pretrained` opens it; with LoRA peft's adapter instead), the processor's files, and `trainer_state.json`. The weights
have the dtype of the model's parameters: in bf16 or fp16 training the compute weights, not the float32 masters of the optimizer.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.contract import CHECKPOINTS, SCHEMA, InputRefused, SpecError, TrainSpec, encode, read, write_text
from trainer.engine import Engine
from trainer.models.family import Processor

STATE_FILE = "trainer_state.json"
NAME = "step-{step:06d}"
NAMES = re.compile(r"step-(\d{6,})")
PARTIAL = ".{name}.partial"
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
ROOM_BYTES = 64 * 2**20  # for everything beside the weights
HEADER_LIMIT_BYTES = 100 * 2**20  # as the safetensors library has it


@dataclass(frozen=True, kw_only=True)
class State:
    """`spec_sha256`: of the spec's JSON text. `files`: name -> bytes of every other file of the checkpoint."""

    schema: int
    step: int
    spec_sha256: str
    weights_sha256: str
    files: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """`path` is relative to the run's folder."""

    path: str
    weights_sha256: str


# ------------------------------------------------------------------------------------------------------------------ saving


def save_checkpoint(engine: Engine, processor: Processor, spec: TrainSpec, step: int) -> Saved:
    """Save `step`, then remove all but the newest `keep_checkpoints`. Every rank must call it; rank 0 writes.

    Raises RunFailed on every rank when the disk is full; nothing of this step is left then, and earlier checkpoints are as they were.
    """
    weights = engine.gather_weights()
    saved, problem = Saved(path="", weights_sha256=""), ""
    if engine.rank == 0:
        try:
            saved = write_checkpoint(engine, processor, spec, step, weights)
        except (OSError, SafetensorError) as error:
            problem = describe_failure(spec, step, size_of(weights), error)
    engine.agree(problem)
    return saved


def write_checkpoint(engine: Engine, processor: Processor, spec: TrainSpec, step: int, weights: dict[str, Tensor]) -> Saved:
    root = Path(spec.output) / CHECKPOINTS
    root.mkdir(exist_ok=True)
    final = root / NAME.format(step=step)
    aside = root / PARTIAL.format(name=final.name)
    shutil.rmtree(aside, ignore_errors=True)  # left by a rank that was killed while it saved
    if final.exists():
        raise FileExistsError(f"{final} is already there")
    try:
        aside.mkdir()
        if shutil.disk_usage(aside).free < size_of(weights) + ROOM_BYTES:
            raise OSError("not enough room on the disk")
        # peft would ask the hub whether the vocabulary has grown; our adapters never touch the embeddings.
        adapter = {"save_embedding_layers": False} if hasattr(engine.model, "peft_config") else {}
        engine.model.save_pretrained(aside, state_dict=weights, **adapter)
        processor.save(aside)
        digest = hash_weights(aside)
        files = {path.relative_to(aside).as_posix(): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
        state = State(schema=SCHEMA, step=step, spec_sha256=hash_spec(spec), weights_sha256=digest, files=files)
        write_text(json.dumps(asdict(state), indent=2) + "\n", aside / STATE_FILE)
        sync_tree(aside)
        aside.rename(final)
        sync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in list_checkpoints(spec)[: -max(1, spec.keep_checkpoints)]:
        shutil.rmtree(old)
    return Saved(path=f"{CHECKPOINTS}/{final.name}", weights_sha256=digest)


def describe_failure(spec: TrainSpec, step: int, weights_bytes: int, error: Exception) -> str:
    earlier = list_checkpoints(spec)
    kept = f"The checkpoint {earlier[-1]} is whole." if earlier else "There is no earlier checkpoint."
    return (
        f"checkpoint of step {step} could not be written to {Path(spec.output) / CHECKPOINTS}: {error}. Nothing of it is left. {kept} It "
        f"needs {(weights_bytes + ROOM_BYTES) / 2**30:.2f} GiB of room: free that much, or set run.keep_checkpoints lower, and start again."
    )


def list_checkpoints(spec: TrainSpec) -> list[Path]:
    """Oldest first."""
    found = [(int(match[1]), path) for path in (Path(spec.output) / CHECKPOINTS).glob("step-*") if (match := NAMES.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def size_of(weights: dict[str, Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_spec(spec: TrainSpec) -> str:
    return hashlib.sha256(encode(spec).encode()).hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, by name: equal for equal weights, however they are cut into files.

    Reads the safetensors layout itself (8 bytes of header length, JSON header, data), because the library gives no bytes for bfloat16.
    """
    digest = hashlib.sha256()
    tensors = {name: (file, entry, start) for file in weight_files(folder) for name, entry, start in read_header(file)}
    for name in sorted(tensors):
        file, entry, start = tensors[name]
        digest.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        first, last = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + first)
            for begin in range(first, last, 2**24):
                digest.update(stream.read(min(2**24, last - begin)))
    return digest.hexdigest()


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


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: one, or those that the index names."""
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(folder / name for name in sorted(set(shards)))
    return (folder / (ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).is_file() else WEIGHTS),)


# ----------------------------------------------------------------------------------------------------------------- opening


def require_whole(folder: Path, key: str) -> None:
    """Raises InputRefused, naming the config key, unless `folder` is a whole checkpoint: ours, or one from elsewhere in the same files."""
    reason = find_gap(folder)
    if reason:
        raise InputRefused(
            f"{key}: {folder} is not a whole checkpoint: {reason}. "
            "Name a folder as runs/<run>/checkpoints/step-<n>, or one that save_pretrained wrote."
        )


def find_gap(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if folder.name.endswith(".partial"):
        return "it was being written when its run ended"
    if (folder / STATE_FILE).is_file():
        try:
            state: State = read(State, folder / STATE_FILE)
        except SpecError as error:
            return str(error)
        wrong = [name for name, size in state.files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]
        if wrong:
            return f"{', '.join(wrong)} missing or not of the size that {STATE_FILE} says"
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"{', '.join(missing) or 'config.json'} missing"
    try:
        for file in weight_files(folder):
            list(read_header(file))
    except InputRefused as error:
        return str(error)
    return ""


def adapter_base(folder: Path) -> Path | None:
    """The folder of the model that an adapter was trained on, or None when `folder` holds a whole model."""
    config = folder / "adapter_config.json"
    return Path(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]) if config.is_file() else None
