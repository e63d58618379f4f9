"""One rank of a run, from its spec to its result."""

import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers

from trainer.checkpoint import Saved, adapter_base, hash_weights, require_whole, save_checkpoint, warn_of_room
from trainer.contract import ENVIRONMENT_FILE, RESULT_FILE, SCHEMA, InputRefused, RunFailed, TrainResult, TrainSpec, write
from trainer.data.check import Places, prepare, resolve
from trainer.data.load import batches
from trainer.data.order import rows_of_step
from trainer.data.sample import Sample, read_samples
from trainer.device import Device, open_device, seed_all
from trainer.engine import Engine, start_distributed, start_engine, taken_config
from trainer.evaluate import evaluate
from trainer.loop import Progress, StopFlag, stop_on_signals, train
from trainer.models import find_family
from trainer.models.family import Family, Processor
from trainer.observe.environment import report_environment
from trainer.observe.metric import open_metrics
from trainer.precision import loading_dtype
from trainer.resume import hash_file
from trainer.stages.group import Staged, apply_stage, trainable_table
from trainer.stages.lora import merge_adapter
from trainer.start import Start, choose_start, finished_before, resume_adapter, resume_engine, whole_weights
from trainer.watchdog import end_hung, watch_steps

LOST_PEER = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited|Timed out waiting|Watchdog caught")  # gloo, NCCL
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # never a pickle


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Where this process stands, and its device. `local` counts on its node."""

    number: int
    local: int
    world_size: int
    device: Device
    place: torch.device


def run_stage(spec: TrainSpec, environ: Mapping[str, str]) -> TrainResult:
    """Carry out `spec` as the rank that `environ` names. Raises InputRefused and RunFailed."""
    quieten()
    rank = take_place(spec, environ)
    seed_all(spec.seed, deterministic=spec.deterministic)
    start_distributed(spec.device)
    try:
        before = finished_before(spec)
        result = before or STAGES[spec.stage.kind](spec, rank, environ)
    except RuntimeError as error:
        if LOST_PEER.search(str(error)):
            raise RunFailed(
                f"rank {rank.number} lost another rank, whose own end is the cause. Checkpoints are whole. ({error})"
            ) from error
        raise
    if rank.number == 0 and before is None:
        write(result, Path(spec.output) / RESULT_FILE)
    torch.distributed.destroy_process_group()  # not after a failure: it would wait for ranks that are gone
    return result


def train_stage(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    family = find_family(spec.model.family)
    places = find_places(spec)
    samples = load_samples(places.train, places)
    start = choose_start(spec, hash_file(places.train))
    model, processor = build(spec, family, instead=whole_weights(spec, start))
    if spec.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # the other kind drops gradients behind frozen inputs
    staged = apply_stage(model, spec, family.unused(model))
    resume_adapter(staged.model, spec, start)
    engine = start_engine(staged.model, spec, rank.place)
    describe(spec, rank, staged, {"config": dict(engine.handle.config), "taken": taken_config(engine)}, environ)
    with stop_on_signals() as stop:  # until all stands: where one node hears of a stop first, the others' signal comes while they save
        if start.checkpoint is not None and start.step == spec.steps:  # an earlier attempt did them all, and ended before it had evaluated
            saved = Saved(path=start.checkpoint.path, weights_sha256=start.checkpoint.weights_sha256)
            trained = summarise(spec, progress_of(start), saved)
        else:
            resume_engine(engine, spec, start)
            warn_of_room(engine, spec)
            progress = run_steps(spec, engine, samples, processor, rank.device, start, stop)
            saved = save_checkpoint(engine, processor, spec, progress.step, data_sha256=start.data_sha256)
            trained = summarise(spec, progress, saved)
        if rank.number == 0:  # stands when a signal ends the run while it evaluates
            write(replace(trained, status="stopped"), Path(spec.output) / RESULT_FILE)
    if trained.status == "stopped":
        return trained
    partitioned = spec.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3
    return replace(trained, evaluation=score(spec, rank, engine.model, processor, places, partitioned=partitioned))


def evaluate_stage(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Every rank holds the whole model and answers its share."""
    began = time.perf_counter()
    family = find_family(spec.model.family)
    places = find_places(spec)
    model, processor = build(spec, family)
    staged = apply_stage(model, spec, family.unused(model))
    staged.model.to(rank.place)
    describe(spec, rank, staged, {}, environ)
    scores = score(spec, rank, staged.model, processor, places, partitioned=False)
    seconds = time.perf_counter() - began
    return TrainResult(
        schema=SCHEMA,
        status="finished",
        steps=0,
        seconds=seconds,
        samples_per_s=scores.get("count", 0.0) / seconds,
        final_loss=None,
        checkpoint="",
        weights_sha256=hash_weights(weights_folder(spec)) if rank.number == 0 else "",
        evaluation=scores,
    )


STAGES = {"train": train_stage, "evaluate": evaluate_stage}

# ------------------------------------------------------------------------------------------------------- before the steps


def take_place(spec: TrainSpec, environ: Mapping[str, str]) -> Rank:
    """From the variables that torchrun sets. Raises InputRefused when they are missing or another world than the plan's."""
    try:
        number, local, world_size = (int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise InputRefused(f"{error} is not set by torchrun. Start a run with: torchrun --nproc-per-node N -m trainer run SPEC") from error
    if world_size != spec.device.world_size:
        raise InputRefused(
            f"WORLD_SIZE is {world_size}, the plan (spec.device.world_size) is for {spec.device.world_size} ranks: the batch would be "
            "another one. Start as many ranks as planned, or plan again."
        )
    device, place = open_device(spec.device, local)
    return Rank(number=number, local=local, world_size=world_size, device=device, place=place)


def quieten() -> None:
    """Leave on the terminal what a reader of the run needs."""
    transformers.utils.logging.disable_progress_bar()
    # torch 2.13 renames two collectives that DeepSpeed 0.19.8 calls by their old names, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
    warnings.filterwarnings("ignore", message=".?is_gradient_checkpointing", category=FutureWarning)


def find_places(spec: TrainSpec) -> Places:
    """Writes a builtin set where this node does not have it yet."""
    prepare(spec.data)
    return resolve(spec.data)


def load_samples(file: Path | None, places: Places) -> tuple[Sample, ...]:
    """Raises InputRefused with every problem: rows that are left out quietly would be another data set."""
    if file is None:
        return ()
    samples, problems = read_samples(file, places.images)
    if problems:
        raise InputRefused("\n".join(map(str, problems)))
    return samples


def build(spec: TrainSpec, family: Family, *, instead: Path | None = None) -> tuple[torch.nn.Module, Processor]:
    """Model and processor: from the stage's checkpoint, else from the model's source; the weights from `instead`, where it is given."""
    dtype = loading_dtype(spec.precision)
    folder = weights_folder(spec)
    base = adapter_base(folder) if folder else None
    if base is not None:
        require_whole(base, f"adapter_config.json of {folder}, base_model_name_or_path")
    origin = base or folder
    processor = family.load_processor(origin, spec.model) if origin else family.create_processor(spec.model)
    if instead is not None:
        model = family.load(instead, spec.model, dtype)
        # A random start is rounded with its buffers, as the rotary frequencies, which no file holds; a loaded one keeps them in float32.
        return (model if origin else model.to(dtype)), processor
    if origin is None:
        return family.create(spec.model).to(dtype), processor
    model = family.load(origin, spec.model, dtype)
    return (merge_adapter(model, folder) if folder and base else model), processor


def weights_folder(spec: TrainSpec) -> Path | None:
    """The folder to load from, whole; None for a random start. Raises InputRefused."""
    source = spec.model.source
    if spec.stage.checkpoint:
        require_whole(Path(spec.stage.checkpoint), "stage.checkpoint")
        return Path(spec.stage.checkpoint)
    if source.kind == "path":
        require_whole(Path(source.path), "model.source.path")
        return Path(source.path)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source.id, revision=source.revision or None, allow_patterns=list(HUB_FILES)))
    return None


def describe(spec: TrainSpec, rank: Rank, staged: Staged, deepspeed: dict[str, Any], environ: Mapping[str, str]) -> None:
    """environment.json, and the table of what trains."""
    report = report_environment(rank.device, rank.local, staged.groups, deepspeed, environ)
    if report is not None:
        write(report, Path(spec.output) / ENVIRONMENT_FILE)
        trainable_table(staged.groups, print)
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------------- the steps


def run_steps(
    spec: TrainSpec, engine: Engine, samples: Sequence[Sample], processor: Processor, device: Device, start: Start, stop: StopFlag
) -> Progress:
    """All steps that are not done yet, or those until `stop` is up."""

    def name_samples(step: int) -> str:
        rows = rows_of_step(step - 1, seed=spec.seed, rows=len(samples), global_batch=spec.batch.global_batch)
        numbers = ", ".join(str(samples[row].row) for row in sorted(rows))
        return f"{samples[0].file} rows {numbers}"

    with (
        watch_steps(spec.hang_timeout_s, rank=engine.rank, stream=sys.stderr, end=lambda why: end_hung(spec, engine.rank, why)) as watchdog,
        open_metrics(Path(spec.output), writes=engine.rank == 0) as write_row,
        closing(batches(samples, processor, spec, rank=engine.rank, first_step=start.step)) as source,
    ):
        return train(
            engine,
            source,
            spec,
            done=progress_of(start),
            stop=stop,
            watchdog=watchdog,
            write=write_row,
            save=lambda step: save_checkpoint(engine, processor, spec, step, data_sha256=start.data_sha256),
            peak_bytes=device.peak_bytes,
            name_samples=name_samples,
        )


def progress_of(start: Start) -> Progress:
    return Progress(step=start.step, seconds=start.rows.seconds, loss=start.rows.loss)


def score(
    spec: TrainSpec, rank: Rank, model: torch.nn.Module, processor: Processor, places: Places, *, partitioned: bool
) -> dict[str, float]:
    """{} when the run asks for no evaluation or names no held-out file. `partitioned`: see `evaluate`."""
    held_out = load_samples(places.evaluation, places) if spec.evaluation.enabled else ()
    if not held_out:
        return {}
    return evaluate(model, held_out, processor, spec, rank.place, rank=rank.number, world_size=rank.world_size, partitioned=partitioned)


def summarise(spec: TrainSpec, progress: Progress, saved: Saved) -> TrainResult:
    return TrainResult(
        schema=SCHEMA,
        status="stopped" if progress.stopped else "finished",
        steps=progress.step,
        seconds=progress.seconds,
        samples_per_s=progress.step * spec.batch.global_batch / progress.seconds if progress.seconds else 0.0,  # the rows may be lost
        final_loss=progress.loss,
        checkpoint=saved.path,
        weights_sha256=saved.weights_sha256,
        evaluation={},
    )
