"""Checkpoints that are whole or not there: written aside, synced, renamed; opened only when every byte of them is there.

A folder `checkpoints/step-000300` holds the weights in safetensors under the names that transformers publishes (so that the
family's `from_pretrained` opens it; with LoRA peft's adapter instead), the processor's files, and `trainer_state.json`. The weights
have the dtype of the model's parameters: in bf16 or fp16 training the compute weights, not the float32 masters of the optimizer.
Before the last step there is a folder `resume` besides, with all that going on takes. A checkpoint lies on the disk of the first
node; the launcher brings it to the others where they share none.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.contract import CHECKPOINTS, METRICS_FILE, SCHEMA, InputRefused, SpecError, TrainSpec, read, write_text
from trainer.engine import Engine
from trainer.models.family import Processor
from trainer.resume import NAME, STATE_FILE, CheckpointState, fixed_parts, missing_files, whole_checkpoints, whole_state
from trainer.shard import read_header, size_of, sync
from trainer.state import full_state_bytes, state_bytes, weights_bytes, write_state

RESUME = "resume"
PARTIAL = ".{name}.partial"
REMOVED = ".{name}.removed"
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
ROOM_BYTES = 64 * 2**20  # for everything beside the tensors


@dataclass(frozen=True, kw_only=True)
class Saved:
    """`path` is relative to the run's folder. Both are empty on all ranks but the first."""

    path: str = ""
    weights_sha256: str = ""


# ------------------------------------------------------------------------------------------------------------------ saving


def save_checkpoint(engine: Engine, processor: Processor, spec: TrainSpec, step: int, *, data_sha256: str = "") -> Saved:
    """Save `step`, then remove all but the newest `keep_checkpoints`. Every rank must call it; those of the first node write.

    Raises RunFailed on every rank when the disk is full; nothing of this step is left then, and earlier checkpoints are as they were.
    """
    resumable = step < spec.steps
    weights = engine.gather_weights()
    needed = size_of(weights) + ROOM_BYTES + (state_bytes(engine) if resumable else 0)
    final = checkpoints_of(spec) / NAME.format(step=step)
    aside = final.with_name(PARTIAL.format(name=final.name))
    state = CheckpointState(
        schema=SCHEMA,
        step=step,
        weights_sha256="",
        data_sha256=data_sha256,
        world_size=engine.world_size if resumable else 0,
        spec=fixed_parts(spec),
        files={},
    )

    def agree(problem: str) -> None:
        engine.agree(problem and describe_failure(spec, step, needed, problem))

    try:
        agree(on_first_rank(engine, lambda: write_weights(engine, processor, aside, weights, needed)))
        weights.clear()
        if resumable:
            agree(write_state(engine, aside / RESUME, writers=min(spec.device.devices_per_node, engine.world_size)))
        agree(on_first_rank(engine, lambda: complete(aside, final, state, spec)))
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    whole = whole_state(final) if engine.rank == 0 else None
    if engine.rank == 0:
        prune(spec)
    return Saved(path=whole.path, weights_sha256=whole.weights_sha256) if whole else Saved()


def on_first_rank(engine: Engine, action: Callable[[], None]) -> str:
    """What went wrong with the disk, or ''. The other ranks do nothing."""
    try:
        if engine.rank == 0:
            action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def write_weights(engine: Engine, processor: Processor, aside: Path, weights: dict[str, Any], needed: int) -> None:
    """Begin the folder, with what transformers opens."""
    shutil.rmtree(aside, ignore_errors=True)  # left by a rank that was killed while it saved
    (aside / RESUME).mkdir(parents=True)
    if shutil.disk_usage(aside).free < needed:
        raise OSError("not enough room on the disk")
    # peft would ask the hub whether the vocabulary has grown; our adapters never touch the embeddings.
    adapter = {"save_embedding_layers": False} if hasattr(engine.model, "peft_config") else {}
    engine.model.save_pretrained(aside, state_dict=weights, **adapter)
    processor.save(aside)


def complete(aside: Path, final: Path, state: CheckpointState, spec: TrainSpec) -> None:
    """List the files, have them on the disk, give the folder its name."""
    if not state.world_size:
        (aside / RESUME).rmdir()
    files = {path.relative_to(aside).as_posix(): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
    state = replace(state, weights_sha256=hash_weights(aside), files=files)
    write_text(json.dumps(asdict(state), indent=2) + "\n", aside / STATE_FILE)
    sync_tree(aside)
    rows = Path(spec.output) / METRICS_FILE
    if rows.exists():
        sync(rows)  # a checkpoint without the rows of its steps would be a run with a gap
    if whole_state(final) is not None:
        raise FileExistsError(f"{final} is already there")
    if os.path.lexists(final):
        remove(final)  # a copy that was cut short: nobody goes on from it
    aside.rename(final)
    sync(final.parent)


def prune(spec: TrainSpec) -> None:
    """Remove all but the newest `keep_checkpoints`, and what ranks that were killed have left half-written or half-removed. What does not
    go away is said: it takes room, and is no reason to end a run."""
    for old in list_checkpoints(spec)[: -max(1, spec.keep_checkpoints)]:
        remove(old)
    for pattern in (PARTIAL, REMOVED):
        for left in checkpoints_of(spec).glob(pattern.format(name="step-*")):
            discard(left)


def remove(folder: Path) -> None:
    """Under another name first, so that a half-removed checkpoint is never taken for one from elsewhere."""
    gone = folder.with_name(REMOVED.format(name=folder.name))
    discard(gone)
    try:
        folder.rename(gone)
    except OSError as error:
        print(f"{folder} stays: {error}. Nothing needs it any more: remove it by hand", flush=True)
        return
    discard(gone)


def discard(folder: Path) -> None:
    """All of it that goes away. A link goes, not what it leads to; on NFS a file that some process has open stays under another name."""
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        print(f"{folder} could not be removed whole. Nothing needs it any more: remove it by hand", flush=True)


def warn_of_room(engine: Engine, spec: TrainSpec) -> None:
    """Before the first step rank 0 says when the disk will be full before the run has ended. Not refused: others may make room."""
    if engine.rank or not spec.save_every:
        return
    more = max(1, spec.keep_checkpoints) + 1 - len(list_checkpoints(spec))  # the oldest goes when the newest is whole
    needed, free = more * (weights_bytes(engine) + full_state_bytes(engine) + ROOM_BYTES), shutil.disk_usage(spec.output).free
    if free < needed:
        print(
            f"{checkpoints_of(spec)} has {free / 2**30:.2f} GiB of room, and {more} more checkpoints need {needed / 2**30:.2f} GiB. Free "
            "that much while the run goes on, or set run.keep_checkpoints lower",
            flush=True,
        )


def describe_failure(spec: TrainSpec, step: int, needed: int, problem: str) -> str:
    earlier = list_checkpoints(spec)
    kept = f"The checkpoint {earlier[-1]} is whole." if earlier else "There is no earlier checkpoint."
    return (
        f"checkpoint of step {step} could not be written to {checkpoints_of(spec)}: {problem}. Nothing of it is left. {kept} It "
        f"needs {needed / 2**30:.2f} GiB of room: free that much, or set run.keep_checkpoints lower, and start again."
    )


def list_checkpoints(spec: TrainSpec) -> list[Path]:
    """Whole ones, oldest first."""
    return [Path(spec.output) / state.path for state in sorted(whole_checkpoints(Path(spec.output)), key=lambda state: state.step)]


def checkpoints_of(spec: TrainSpec) -> Path:
    return Path(spec.output) / CHECKPOINTS


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


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
            state: CheckpointState = read(CheckpointState, folder / STATE_FILE)
        except SpecError as error:
            return str(error)
        wrong = missing_files(folder, state)
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
