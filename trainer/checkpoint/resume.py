"""Where a run continues: at the first step, or at the checkpoint of an earlier attempt of the same run.

Rank 0 decides from its own disk, where checkpoints are written; every other rank must find the same checkpoint.
"""

import socket
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed

from trainer.checkpoint.best import cut_evaluations, read_evaluations, record_best
from trainer.checkpoint.checkpoint import RESUME_FOLDER
from trainer.checkpoint.retention import prune
from trainer.checkpoint.state import NEW_RNG_NOTE, restore_state
from trainer.contract import (
    CHECKPOINTS,
    FAILURE_FILES,
    METRICS_FILE,
    RESULT_FILE,
    EvaluationRow,
    InputRefused,
    RunFailed,
    SpecError,
    TrainResult,
    TrainSpec,
    read,
)
from trainer.contract.checkpoint_files import (
    CHECKPOINT_NAME,
    CheckpointState,
    MetricsSummary,
    broken_checkpoints,
    cut_rows,
    is_newer,
    newest_resumable,
    refuse_other_run,
    whole_checkpoints,
    whole_state,
)
from trainer.contract.listing import list_some
from trainer.contract.row_sets.row_set import describe_entries
from trainer.distributed.collective import broadcast_object
from trainer.distributed.engine import Engine
from trainer.stages.adapter import describe_mismatch, load_layout
from trainer.stages.adapter_layout import SHOWN, AdapterLayout

ENDED = "ended-at-{name}"  # the weights of a last step, after the run was given more steps


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """`checkpoint` None: the first step. `rows`: the metrics rows that are kept, on rank 0 only. `data_sha256`: of the file of training rows.
    `evaluations`: those of earlier attempts that are kept; `best`: the value of keep_best of the best checkpoint."""

    checkpoint: CheckpointState | None
    rows: MetricsSummary
    data_sha256: str
    evaluations: tuple[EvaluationRow, ...] = ()
    best: float | None = None

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def evaluated(self) -> bool:
        """Whether these weights were evaluated."""
        return any(row.step == self.step for row in self.evaluations)


def read_finished_result(spec: TrainSpec) -> TrainResult | None:
    """The result of a run that is already finished, on every rank. Also removes each rank's report of an earlier failure."""
    rank = torch.distributed.get_rank()
    (Path(spec.output) / FAILURE_FILES.format(rank=rank)).unlink(missing_ok=True)
    found: TrainResult | None = None
    if rank == 0:
        try:
            found = read(TrainResult, Path(spec.output) / RESULT_FILE)
        except SpecError:
            found = None  # missing, or written by another version
        if found is not None and found.status != "finished":
            found = None
        if found is not None:
            print(f"{spec.output} is finished, as {RESULT_FILE} says: nothing is left to do", flush=True)
    result: TrainResult | None = broadcast_object(found)
    return result


def choose_resume_point(spec: TrainSpec, data_sha256: str) -> ResumePoint:
    """Every rank must call it. Raises InputRefused on all ranks for a checkpoint of another run, and on a rank whose training rows differ
    from those of rank 0; RunFailed on a rank that lacks the checkpoint."""
    rank, run = torch.distributed.get_rank(), Path(spec.output)
    decision: tuple[CheckpointState | None, str, str] = (None, "", data_sha256)
    if rank == 0:
        try:
            decision = (choose_checkpoint(spec, data_sha256), "", data_sha256)
        except InputRefused as error:
            decision = (None, str(error), data_sha256)
    checkpoint, refusal, rows_sha256 = broadcast_object(decision)
    if refusal:
        raise InputRefused(refusal)
    if data_sha256 != rows_sha256:  # rows are assigned to ranks by number, and each rank reads its own file
        raise InputRefused(
            f"rank {rank} on {socket.gethostname()} has other training rows than rank 0 in {describe_entries(spec.data.train) or spec.data.name}. Let the nodes "
            "share the file, or copy that of the first node to this one, and start again."
        )
    if checkpoint is not None and whole_state(run / checkpoint.path) != checkpoint:
        raise RunFailed(
            f"rank {rank} on {socket.gethostname()} has no complete {run / checkpoint.path}, from which rank 0 resumes. Let the nodes share "
            "the run's folder, or copy that folder from the first node to this one, and start again."
        )
    start = ResumePoint(checkpoint=checkpoint, rows=MetricsSummary(), data_sha256=data_sha256)
    start = replace(start, rows=discard_unfinished(spec, start)) if rank == 0 else start
    evaluations, best = broadcast_object(read_evaluation_state(spec) if rank == 0 else None)
    return replace(start, evaluations=evaluations, best=best)


def read_evaluation_state(spec: TrainSpec) -> tuple[tuple[EvaluationRow, ...], float | None]:
    """ResumePoint.evaluations and ResumePoint.best."""
    best, rows = record_best(spec), read_evaluations(Path(spec.output))
    return tuple(rows[step] for step in sorted(rows)), best.value if best else None


def choose_checkpoint(spec: TrainSpec, data_sha256: str) -> CheckpointState | None:
    """The newest complete one; None if the run has none. Raises InputRefused for one of another run or of a newer version, and if all are
    broken, or none can be resumed: starting again at step 1 would discard what can be repaired."""
    run = Path(spec.output)
    found, broken = newest_resumable(run, spec.steps), broken_checkpoints(run)
    for folder, reason in broken.items():
        print(f"skipping {folder}: {reason}", flush=True)
    if newer := [folder for folder in broken if is_newer(folder)]:
        raise InputRefused(
            f"{broken[newer[0]]}. To resume from an earlier checkpoint would overwrite that one: resume with the version that wrote it, or "
            f"move {newer[0]} to another folder."
        )
    if found is None and broken:
        said = "; ".join(f"{folder}: {reason}" for folder, reason in broken.items())
        raise InputRefused(
            f"no checkpoint of this run is complete. {said}. Copy the missing files again, or remove the folder to start at step 1, "
            "or start a new run."
        )
    if found is not None:
        refuse_other_run(found, spec, data_sha256)
        refuse_fewer_steps(found, spec)
    elif weights := max((state.step for state in whole_checkpoints(run)), default=0):
        raise InputRefused(
            f"the checkpoint of step {weights} has weights only, since it was the last step of the run: a run of {spec.steps} steps cannot "
            f"resume from it. Start a new run; with stage.checkpoint={run}/{CHECKPOINTS}/{CHECKPOINT_NAME.format(step=weights)} it starts "
            "from these weights."
        )
    return found


def refuse_fewer_steps(found: CheckpointState, spec: TrainSpec) -> None:
    if found.step > spec.steps:
        raise InputRefused(
            f"run.steps={spec.steps}, but the run has a checkpoint of step {found.step}. Set run.steps to {found.step} or more, or start a new "
            "run."
        )


def discard_unfinished(spec: TrainSpec, start: ResumePoint) -> MetricsSummary:
    """Remove what an earlier attempt left half-done, and its rows of steps that will be repeated. Returns the rows that are kept."""
    run = Path(spec.output)
    set_ends_aside(spec, start)
    prune(spec)
    if start.step < spec.steps:
        (run / RESULT_FILE).unlink(missing_ok=True)  # of an attempt that was stopped
    rows = cut_rows(run, start.step)
    cut_evaluations(run, start.step)
    if start.checkpoint is not None:
        print(f"resuming from {start.checkpoint.path}", flush=True)
        if rows.count < start.step:
            print(f"{run / METRICS_FILE} has rows of {rows.count} of these steps only", flush=True)
        if start.checkpoint.world_size not in (0, spec.device.world_size):
            ranks = f"by {start.checkpoint.world_size} ranks, now there are {spec.device.world_size}"
            print(f"the checkpoint was saved {ranks}: {NEW_RNG_NOTE}", flush=True)
    return rows


def set_ends_aside(spec: TrainSpec, start: ResumePoint) -> None:
    """The weights of an earlier last step, of a run that was given more steps, get another name: the step will be saved again, with its state."""
    for state in [state for state in whole_checkpoints(Path(spec.output)) if start.step < state.step < spec.steps and not state.world_size]:
        folder = Path(spec.output) / state.path
        aside = folder.with_name(ENDED.format(name=folder.name))
        if not aside.exists():
            folder.rename(aside)
            print(f"the weights of step {state.step}, which was the last one, are kept in {CHECKPOINTS}/{aside.name}", flush=True)


def resume_weights_folder(spec: TrainSpec, start: ResumePoint) -> Path | None:
    """The folder to load the model from instead of the stage's start; None at the first step, and with LoRA, whose checkpoints hold only an
    adapter. These are the compute weights; `resume_engine` restores the exact master weights."""
    return Path(spec.output) / start.checkpoint.path if start.checkpoint is not None and spec.stage.lora is None else None


def resume_adapter(model: torch.nn.Module, spec: TrainSpec, start: ResumePoint) -> None:
    """Load the checkpoint's adapter into a model without an engine. It is not merged, so that the sums are those of training."""
    if start.checkpoint is not None and spec.stage.lora is not None:
        load_adapter(model, Path(spec.output) / start.checkpoint.path)


def continue_adapter(model: torch.nn.Module, layout: AdapterLayout) -> None:
    """Load the adapter that a LoRA stage starts from into the model that it is trained in. Raises InputRefused if the stage trains other modules
    whole than the adapter has: a module that is not trained would not be saved, and the next stage would have that of the base."""
    saved = tuple(model.peft_config["default"].modules_to_save or ())  # type: ignore[index,union-attr,operator]
    inside = {name for name in layout.whole if any(name.startswith(f"{module}.") for module in saved)}
    missing = [module for module in saved if not any(name.startswith(f"{module}.") for name in layout.whole)]
    if lost := sorted(layout.whole.keys() - inside):
        raise InputRefused(
            f"stage.trainable: the adapter {layout.folder} also has weights that were trained whole, {list_some(lost, SHOWN)}, and this stage does not train "
            "them, so they would not be saved. Add their group to stage.trainable, or merge the adapter first with stage=merge and start from the result."
        )
    if missing:
        raise InputRefused(
            f"{layout.folder} was saved with other trained parameters than this stage has, as {list_some(missing, SHOWN)}. Remove their group from "
            "stage.trainable, or merge the adapter first with stage=merge and start from the result."
        )
    load_layout(model, layout)


def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Load the adapter of `folder` into a model that peft has wrapped. Raises InputRefused if it is for other modules."""
    from peft import load_peft_weights, set_peft_model_state_dict

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        loaded = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except RuntimeError as error:  # other shapes
        raise InputRefused(describe_mismatch(folder, error)) from error
    wrong = sorted((trained & set(loaded.missing_keys)) | set(loaded.unexpected_keys))
    if wrong:
        raise InputRefused(
            f"{folder} was saved with other trained parameters than this stage has, as {', '.join(wrong[:5])}. Start a new run."
        )


def resume_engine(engine: Engine, spec: TrainSpec, start: ResumePoint) -> None:
    """Called last before the steps, since it also restores the random numbers."""
    if start.checkpoint is not None:
        folder = Path(spec.output) / start.checkpoint.path / RESUME_FOLDER
        restore_state(engine, folder, seed=spec.seed, step=start.step, world_size=start.checkpoint.world_size)
