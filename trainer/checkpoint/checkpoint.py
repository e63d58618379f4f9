"""Checkpoints that are complete or absent: written to a hidden folder, synced, renamed; opened only if every byte is there.

A folder `checkpoints/step-000300` holds the weights in safetensors under the names that transformers publishes (so that the family's
`from_pretrained` opens it; with LoRA peft's adapter instead), the processor's files, and `omnilaunch_state.json`. The weights have the dtype
of the model's parameters: in bf16 or fp16 training the compute weights, not the optimizer's float32 master weights. Before the last step
there is also a folder `resume` with the state that is needed to continue. A checkpoint is on the disk of the first node; the launcher copies
it to the others if they share no disk.
"""

import json
import shutil
import zipfile
from pathlib import Path

from trainer.checkpoint.state import full_state_bytes, weights_bytes
from trainer.contract import CHECKPOINTS, SCHEMA, InputRefused, OtherSchema, SpecError, TrainSpec, read
from trainer.contract.checkpoint_files import STATE_FILE, CheckpointState, find_state_file, missing_files, whole_checkpoints
from trainer.contract.weight_files import is_safetensors, read_header, weight_files
from trainer.distributed.engine import Engine
from trainer.tensor.shard import sync

RESUME_FOLDER = "resume"
MARGIN_BYTES = 64 * 2**20  # for everything except the tensors


def warn_if_disk_is_small(engine: Engine, spec: TrainSpec) -> None:
    """Before the first step: rank 0 warns if the disk will be full before the run ends. Not refused: the user may free space meanwhile."""
    if engine.rank or not (spec.save_every or spec.save_every_s or spec.keep_best):
        return
    kept = max(1, spec.keep_checkpoints) + bool(spec.keep_best)
    more = kept + 1 - len(list_checkpoints(spec))  # the oldest is removed after the newest is complete
    needed, free = more * (weights_bytes(engine) + full_state_bytes(engine) + MARGIN_BYTES), shutil.disk_usage(spec.output).free
    if free < needed:
        print(
            f"{checkpoints_folder(spec)} has {free / 2**30:.2f} GiB free, and {more} more checkpoints need {needed / 2**30:.2f} GiB. Free "
            "that much while the run continues, or set run.keep_checkpoints lower",
            flush=True,
        )


def describe_failure(spec: TrainSpec, step: int, needed: int, problem: str) -> str:
    earlier = list_checkpoints(spec)
    kept = f"The checkpoint {earlier[-1]} is complete." if earlier else "There is no earlier checkpoint."
    return (
        f"the checkpoint of step {step} could not be written to {checkpoints_folder(spec)}: {problem}. The incomplete folder was removed. {kept} "
        f"It needs {needed / 2**30:.2f} GiB: free that much, or set run.keep_checkpoints lower, and start again."
    )


def list_checkpoints(spec: TrainSpec) -> list[Path]:
    """Complete ones, oldest first."""
    return [Path(spec.output) / state.path for state in sorted(whole_checkpoints(Path(spec.output)), key=lambda state: state.step)]


def checkpoints_folder(spec: TrainSpec) -> Path:
    return Path(spec.output) / CHECKPOINTS


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def require_whole(folder: Path, key: str) -> None:
    """Raises InputRefused, naming the config key, unless `folder` is a complete checkpoint: ours, or another one with the same files."""
    try:
        reason = find_defect(folder)
    except OtherSchema as error:
        file = find_state_file(folder) or folder / STATE_FILE
        said = json.loads(file.read_text(encoding="utf-8"))["schema"]
        raise InputRefused(
            f"{key}: {folder} was written by another version of the trainer: the schema of its {file.name} is {said}, this version reads "
            f"{SCHEMA}. Use the version that wrote it, or name a checkpoint of this version."
        ) from error
    if reason:
        raise InputRefused(
            f"{key}: {folder} is not a complete checkpoint: {reason.rstrip('.')}. "
            "Name a folder like runs/<run>/checkpoints/step-<n>, or one that save_pretrained wrote."
        )


def find_defect(folder: Path) -> str:
    """What is missing or broken, or ''. Raises OtherSchema for a checkpoint that this version cannot read."""
    if not folder.is_dir():
        return "there is no such folder"
    if folder.name.endswith(".partial"):
        return "it was being written when its run ended"
    if file := find_state_file(folder):
        try:
            state: CheckpointState = read(CheckpointState, file)
        except OtherSchema:
            raise
        except SpecError as error:
            return str(error)
        wrong = missing_files(folder, state)
        if wrong:
            return f"{', '.join(wrong)} missing or not of the size that {file.name} says"
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"{', '.join(missing) or 'config.json'} missing"
    try:
        for file in weight_files(folder):
            if is_safetensors(file):
                list(read_header(file))
            elif not zipfile.is_zipfile(file):
                return f"{file} is not a file of torch, or is truncated"
    except InputRefused as error:
        return str(error)
    return ""
