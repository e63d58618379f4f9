"""A checkpoint in the making: gathered by every rank, written aside by those of the first node, completed and named by rank 0."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpoint.best import record_best
from trainer.checkpoint.checkpoint import (
    PARTIAL,
    RESUME_FOLDER,
    MARGIN_BYTES,
    checkpoints_folder,
    describe_failure,
    prune,
    remove,
    sync_tree,
)
from trainer.checkpoint.state import state_bytes, write_state
from trainer.contract import EVALUATIONS_FILE, METRICS_FILE, SCHEMA, Best, WeightsLineage, TrainSpec, write_text
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILE, CheckpointState, fixed_settings, whole_state
from trainer.contract.weight_files import hash_weights
from trainer.distributed.engine import Engine
from trainer.models.family import Processor
from trainer.stages.chain import groups_trained
from trainer.tensor.shard import tensor_bytes, sync

UNKNOWN_LINEAGE = WeightsLineage()


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """`path` is relative to the run's folder. Both are empty on all ranks but the first."""

    path: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """A checkpoint that is not there yet. `writers`: ranks 0 to writers - 1 write its state, 0 where it has none. `needed`: bytes of room."""

    final: Path
    aside: Path
    state: CheckpointState
    writers: int
    needed: int

    @property
    def step(self) -> int:
        return self.state.step


def plan_checkpoint(engine: Engine, spec: TrainSpec, step: int, weights: dict[str, Tensor], *, data_sha256: str, origin: WeightsLineage) -> PendingCheckpoint:
    resumable = step < spec.steps
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
        trained=groups_trained(origin, spec.stage),
        base=origin.mark if spec.stage.lora is not None else "",
    )
    return PendingCheckpoint(
        final=final,
        aside=final.with_name(PARTIAL.format(name=final.name)),
        state=state,
        writers=min(spec.device.devices_per_node, engine.world_size) if resumable else 0,
        needed=tensor_bytes(weights) + MARGIN_BYTES + (state_bytes(engine) if resumable else 0),
    )


def save_checkpoint(
    engine: Engine, processor: Processor, spec: TrainSpec, step: int, *, data_sha256: str = "", origin: WeightsLineage = UNKNOWN_LINEAGE
) -> SavedCheckpoint:
    """Save `step`, then remove all but the newest `keep_checkpoints` and the best. Every rank must call it.

    Raises RunFailed on every rank when the disk is full; nothing of this step is left then, and earlier checkpoints are as they were.
    """
    weights = engine.gather_weights()
    draft = plan_checkpoint(engine, spec, step, weights, data_sha256=data_sha256, origin=origin)

    def agree(problem: str) -> None:
        engine.agree(problem and describe_failure(spec, step, draft.needed, problem))

    try:
        agree(disk_error_on_first_rank(engine, lambda: begin_folder(draft)))
        agree(disk_error_on_first_rank(engine, lambda: write_weights(engine, processor, draft.aside, weights)))
        weights.clear()
        if draft.writers:
            agree(write_state(engine, draft.aside / RESUME_FOLDER, writers=draft.writers))
        agree(disk_error_on_first_rank(engine, lambda: complete(draft, spec)))
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(draft.aside, ignore_errors=True)
        raise
    whole = whole_state(draft.final) if engine.rank == 0 else None
    if engine.rank == 0:
        update_best_and_prune(spec)
    return SavedCheckpoint(path=whole.path, weights_sha256=whole.weights_sha256) if whole else SavedCheckpoint()


def disk_error_on_first_rank(engine: Engine, action: Callable[[], None]) -> str:
    """What went wrong with the disk, or ''. The other ranks do nothing."""
    return disk_error(action) if engine.rank == 0 else ""


def disk_error(action: Callable[[], None]) -> str:
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def begin_folder(draft: PendingCheckpoint) -> None:
    shutil.rmtree(draft.aside, ignore_errors=True)  # left by a rank that was killed while it saved
    (draft.aside / RESUME_FOLDER).mkdir(parents=True)
    if shutil.disk_usage(draft.aside).free < draft.needed:
        raise OSError("not enough room on the disk")


def write_weights(engine: Engine, processor: Processor, aside: Path, weights: dict[str, Any]) -> None:
    """What transformers opens."""
    # peft would ask the hub whether the vocabulary has grown; our adapters never touch the embeddings.
    adapter = {"save_embedding_layers": False} if hasattr(engine.model, "peft_config") else {}
    engine.model.save_pretrained(aside, state_dict=weights, **adapter)
    processor.save(aside)


def complete(draft: PendingCheckpoint, spec: TrainSpec) -> None:
    """List the files, have them on the disk, give the folder its name."""
    aside, final = draft.aside, draft.final
    if not draft.writers:
        (aside / RESUME_FOLDER).rmdir()
    files = {path.relative_to(aside).as_posix(): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
    state = replace(draft.state, weights_sha256=hash_weights(aside), files=files)
    write_text(json.dumps(asdict(state), indent=2) + "\n", aside / STATE_FILE)
    sync_tree(aside)
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        if (Path(spec.output) / name).exists():
            sync(Path(spec.output) / name)  # a checkpoint without the rows of its steps would be a run with a gap
    if whole_state(final) is not None:
        raise FileExistsError(f"{final} is already there")
    if final.is_symlink() or final.exists():
        remove(final)  # a copy that was cut short: nobody goes on from it
    aside.rename(final)
    sync(final.parent)


def update_best_and_prune(spec: TrainSpec) -> Best | None:
    """Say which checkpoint is best, then remove those that nobody needs any more. Rank 0 alone."""
    best = record_best(spec)
    prune(spec)
    return best
