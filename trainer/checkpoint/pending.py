"""A checkpoint that is being written: gathered by all ranks, written by those of the first node, completed and renamed by rank 0."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpoint.best import record_best
from trainer.checkpoint.checkpoint import MARGIN_BYTES, RESUME_FOLDER, checkpoints_folder, describe_failure, sync_tree
from trainer.checkpoint.retention import PARTIAL, prune, remove
from trainer.checkpoint.state import state_bytes, write_state
from trainer.contract import EVALUATIONS_FILE, METRICS_FILE, SCHEMA, Best, TrainSpec, WeightsLineage, write_text
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILE, CheckpointState, fixed_settings, whole_state
from trainer.contract.weight_files import hash_weights
from trainer.distributed.engine import Engine
from trainer.models.family import Processor
from trainer.stages.chain import groups_trained
from trainer.tensor.shard import sync, tensor_bytes

AVERAGE_FOLDER = "average"
UNKNOWN_LINEAGE = WeightsLineage()


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """`path` is relative to the run's folder. Both are empty on all ranks except the first."""

    path: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """`writers`: ranks 0 to writers - 1 write the training state; 0 = there is none. `needed`: bytes of disk space."""

    final: Path
    partial_folder: Path
    state: CheckpointState
    writers: int
    needed: int

    @property
    def step(self) -> int:
        return self.state.step


def plan_checkpoint(
    engine: Engine,
    spec: TrainSpec,
    step: int,
    weights: dict[str, Tensor],
    *,
    averages: dict[str, Tensor],
    data_sha256: str,
    lineage: WeightsLineage,
) -> PendingCheckpoint:
    """`averages`: as of Engine.gather_averages; the weights are written twice then."""
    resumable, copies = step < spec.steps, 2 if averages else 1
    final = checkpoints_folder(spec) / CHECKPOINT_NAME.format(step=step)
    state = CheckpointState(
        schema=SCHEMA,
        step=step,
        weights_sha256="",
        data_sha256=data_sha256,
        world_size=engine.world_size if resumable else 0,
        spec=fixed_settings(spec),
        files={},
        run_id=spec.run_id,
        trained=groups_trained(lineage, spec.stage),
        base=lineage.mark if spec.stage.lora is not None else "",
        window_ends=spec.window_ends if spec.data.length_aware == "window" else (),
        images=lineage.images,
    )
    return PendingCheckpoint(
        final=final,
        partial_folder=final.with_name(PARTIAL.format(name=final.name)),
        state=state,
        writers=min(spec.device.devices_per_node, engine.world_size) if resumable else 0,
        needed=copies * tensor_bytes(weights) + MARGIN_BYTES + (state_bytes(engine) if resumable else 0),
    )


def save_checkpoint(
    engine: Engine, processor: Processor, spec: TrainSpec, step: int, *, data_sha256: str = "", lineage: WeightsLineage = UNKNOWN_LINEAGE
) -> SavedCheckpoint:
    """Save `step`, then remove all but the newest `keep_checkpoints` and the best. Every rank must call it.

    Raises RunFailed on every rank if the disk is full; then nothing of this step is left, and earlier checkpoints are not changed.
    """
    with engine.with_exported_weights():
        pending = save_weights(engine, processor, spec, step, data_sha256=data_sha256, lineage=lineage)

    def agree(problem: str) -> None:
        engine.fail_together(problem and describe_failure(spec, step, pending.needed, problem))

    try:
        if pending.writers:
            agree(write_state(engine, pending.partial_folder / RESUME_FOLDER, writers=pending.writers))
        agree(disk_error_on_first_rank(engine, lambda: complete(pending, spec)))
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(pending.partial_folder, ignore_errors=True)
        raise
    whole = whole_state(pending.final) if engine.rank == 0 else None
    if engine.rank == 0:
        update_best_and_prune(spec)
    return SavedCheckpoint(path=whole.path, weights_sha256=whole.weights_sha256) if whole else SavedCheckpoint()


def save_weights(
    engine: Engine, processor: Processor, spec: TrainSpec, step: int, *, data_sha256: str, lineage: WeightsLineage
) -> PendingCheckpoint:
    """Begin a checkpoint, with the weights that the model has now. Raises RunFailed as `save_checkpoint` does."""
    weights, averages = engine.gather_weights(), engine.gather_averages()
    pending = plan_checkpoint(engine, spec, step, weights, averages=averages, data_sha256=data_sha256, lineage=lineage)

    def write() -> None:
        begin_folder(pending)
        write_weights(engine, processor, pending.partial_folder, weights, averages)

    try:
        problem = disk_error_on_first_rank(engine, write)
        engine.fail_together(problem and describe_failure(spec, step, pending.needed, problem))
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(pending.partial_folder, ignore_errors=True)
        raise
    return pending


def disk_error_on_first_rank(engine: Engine, action: Callable[[], None]) -> str:
    """The error of the disk, or ''. Other ranks do nothing."""
    return disk_error(action) if engine.rank == 0 else ""


def disk_error(action: Callable[[], None]) -> str:
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def begin_folder(pending: PendingCheckpoint) -> None:
    shutil.rmtree(pending.partial_folder, ignore_errors=True)  # left by a rank that was killed while it saved
    (pending.partial_folder / RESUME_FOLDER).mkdir(parents=True)
    if shutil.disk_usage(pending.partial_folder).free < pending.needed:
        raise OSError("not enough room on the disk")


def write_weights(engine: Engine, processor: Processor, partial_folder: Path, weights: dict[str, Any], averages: dict[str, Tensor]) -> None:
    """The files that transformers opens; with `averages` also a folder AVERAGE_FOLDER of the same form, which has them in place of the trained
    weights."""
    if averages:
        write_weights(engine, processor, partial_folder / AVERAGE_FOLDER, {**weights, **averages}, {})
    # Otherwise peft asks the hub whether the vocabulary has grown; our adapters never change the embeddings.
    adapter = {"save_embedding_layers": False} if hasattr(engine.model, "peft_config") else {}
    engine.model.save_pretrained(partial_folder, state_dict=weights, **adapter)
    processor.save(partial_folder)


def complete(pending: PendingCheckpoint, spec: TrainSpec) -> None:
    """List the files, sync them, and rename the folder."""
    partial_folder, final = pending.partial_folder, pending.final
    if not pending.writers:
        (partial_folder / RESUME_FOLDER).rmdir()
    files = {
        path.relative_to(partial_folder).as_posix(): path.stat().st_size for path in sorted(partial_folder.rglob("*")) if path.is_file()
    }
    state = replace(pending.state, weights_sha256=hash_weights(partial_folder), files=files)
    write_text(json.dumps(asdict(state), indent=2) + "\n", partial_folder / STATE_FILE)
    sync_tree(partial_folder)
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        if (Path(spec.output) / name).exists():
            sync(Path(spec.output) / name)  # otherwise a checkpoint could exist without the rows of its steps
    if whole_state(final) is not None:
        raise FileExistsError(f"{final} is already there")
    if final.is_symlink() or final.exists():
        remove(final)  # an incomplete copy, from which no run can resume
    partial_folder.rename(final)
    sync(final.parent)


def update_best_and_prune(spec: TrainSpec) -> Best | None:
    """Write which checkpoint is best, then remove those that are not needed any more. On rank 0 only."""
    best = record_best(spec)
    prune(spec)
    return best
