"""One rank of a run, from its spec to its result."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers

from trainer.checkpoint.best import record_best
from trainer.train.model import CPU, build, weights_folder
from trainer.checkpoint.checkpoint import warn_if_disk_is_small
from trainer.checkpoint.lineage import continues_adapter, find_lineage
from trainer.checkpoint.pending import SavedCheckpoint, update_best_and_prune
from trainer.checkpoint.resume import (
    ResumePoint,
    choose_resume_point,
    read_finished_result,
    load_adapter,
    refuse_on_all_ranks,
    resume_adapter,
    resume_engine,
    resume_weights_folder,
)
from trainer.distributed.zero3 import SOURCE_RANK, partition_model
from trainer.contract import (
    ENVIRONMENT_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    SCHEMA,
    SINGLE_PROCESS_KINDS,
    EnvReport,
    InputRefused,
    WeightsLineage,
    RunFailed,
    TrainResult,
    TrainSpec,
    facts_of,
    kind_of,
    write,
)
from trainer.contract.checkpoint_files import fixed_settings
from trainer.contract.environment_facts import changed_facts, describe_change
from trainer.data.check import DataPaths, prepare, resolve
from trainer.data.rows.sample import Sample, read_samples
from trainer.data.rows.source import hash_sources
from trainer.device.device import require_determinism, seed_all
from trainer.device.log_prefix import report_phase
from trainer.device.rank import Rank, open_rank
from trainer.distributed.effective_config import read_effective_config
from trainer.distributed.engine import Engine, stop_distributed, start_single_process, start_distributed, start_engine
from trainer.evaluation.evaluate import StopCheck, evaluate
from trainer.kernels.fused import use_kernels
from trainer.models import find_family
from trainer.models.family import Processor
from trainer.observe.environment import report_environment
from trainer.observe.memory import MemoryPeaks
from trainer.observe.tracker import open_trackers, refuse_missing
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import Staged, apply_stage, trainable_table
from trainer.train.loop import Progress, stop_on_signals
from trainer.programs.device_map import measure_free_memory, dispatch_over_cards
from trainer.train.step_hooks import make_evaluation_row, record_evaluation
from trainer.train.steps import Job, progress_of, run_steps, saved_checkpoint

LOST_PEER = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited|Timed out waiting|Watchdog caught")  # gloo, NCCL


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model with its stage applied, before any engine. `kernels`: see use_kernels."""

    staged: Staged
    processor: Processor
    lineage: WeightsLineage
    kernels: dict[str, str]


def run_stage(spec: TrainSpec, environ: Mapping[str, str]) -> TrainResult:
    """Carry out `spec` as the rank that `environ` names. Raises InputRefused and RunFailed."""
    silence_libraries()
    refuse_missing(spec)
    refuse_unmeasured(spec)
    rank = open_rank(spec, environ)
    seed_all(spec.seed, deterministic=spec.deterministic)
    if spec.deterministic:
        require_determinism(spec.device.accelerator, os.environ)  # seed_all may have set one there
    report_phase(1)
    if spec.stage.kind in SINGLE_PROCESS_KINDS:
        start_single_process()
    else:
        start_distributed(spec.device)
    try:
        before = read_finished_result(spec)
        result = before or find_program(spec.stage.kind)(spec, rank, environ)
    except RuntimeError as error:
        if LOST_PEER.search(str(error)):
            raise RunFailed(
                f"rank {rank.number} lost another rank, whose own end is the cause. Checkpoints are whole. ({error})"
            ) from error
        raise
    if rank.number == 0 and before is None:
        write(result, Path(spec.output) / RESULT_FILE)
    stop_distributed()  # not after a failure: it would wait for ranks that are gone
    return result


def train_stage(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    gauge = MemoryPeaks(rank.device)
    places = prepare_data(spec)
    samples = load_samples(places.train, places)
    start = choose_resume_point(spec, hash_sources(places.train, places.images))
    made = build_model(spec, rank, start)
    if spec.partitioned:
        partition_model(made.staged.model, spec, rank.torch_device)
    engine = start_engine(made.staged.model, spec, rank.torch_device, rates=made.staged.rates)
    write_environment(spec, rank, made, environ, engine=engine)
    held_out = load_samples(places.evaluation, places) if spec.evaluation.enabled else ()

    def answer(file: str, halted: StopCheck | None) -> dict[str, float]:
        more = {"file": file, "loss_sum": engine.loss_sum if spec.evaluation.loss else None, "halted": halted}
        return score(spec, rank, engine.model, made.processor, held_out, partitioned=spec.partitioned, **more)

    with open_trackers(spec, fixed_settings(spec), environ, step=start.step, tells=rank.number == 0) as audience:
        job = Job(
            spec=spec,
            engine=engine,
            processor=made.processor,
            samples=samples,
            device=rank.device,
            gauge=gauge,
            start=start,
            lineage=made.lineage,
            audience=audience,
            score=answer,
        )
        trained = take_steps(job)
        return trained if trained.status == "stopped" else finish(job, trained)


def build_model(spec: TrainSpec, rank: Rank, start: ResumePoint) -> BuiltModel:
    """The model that a stage trains, as it begins or goes on. Under ZeRO 3 rank 0 alone has its values. Every rank must call it; raises
    InputRefused on all of them."""
    family = find_family(spec.model.family)
    on_meta = spec.partitioned and rank.number != SOURCE_RANK
    with refuse_on_all_ranks():
        lineage = find_lineage(spec, weights_folder(spec))
        model, processor = build(spec, family, lineage, instead=resume_weights_folder(spec, start), device=rank.torch_device, on_meta=on_meta)
    report_phase(4)
    kernels = use_kernels(model, spec)
    with refuse_on_all_ranks():
        if spec.gradient_checkpointing:
            checkpoint_layers(model, spec)
        staged = apply_stage(model, spec, family.unused(model))
        if not on_meta and start.checkpoint is None and continues_adapter(lineage, spec.stage.lora):
            load_adapter(staged.model, Path(lineage.path))
        if not on_meta:
            resume_adapter(staged.model, spec, start)
    return BuiltModel(staged=staged, processor=processor, lineage=lineage, kernels=kernels)


def take_steps(job: Job) -> TrainResult:
    """The result without an evaluation, on the disk as that of a stopped run, for the case that a signal ends it while it evaluates."""
    spec, engine, start = job.spec, job.engine, job.start
    lost = start.step - start.rows.count  # steps of whose time nothing is known; told by rank 0, which has the rows
    with stop_on_signals() as stop:  # until all stands: where one node hears of a stop first, the others' signal comes while they save
        if start.checkpoint is not None and start.step == spec.steps:  # an earlier attempt did them all, and ended before it had evaluated
            trained = summarise(spec, progress_of(start), saved_checkpoint(start.checkpoint), lost=lost)
        else:
            resume_engine(engine, spec, start)
            warn_if_disk_is_small(engine, spec)
            trained = summarise(spec, *run_steps(job, stop), lost=lost)
        trained = replace(trained, peaks=job.gauge.report())
        if engine.rank == 0:
            trained = replace(trained, best=record_best(spec))
            write(replace(trained, status="stopped"), Path(spec.output) / RESULT_FILE)
    return trained


def finish(job: Job, trained: TrainResult) -> TrainResult:
    """Evaluate the weights of the last step."""
    spec = job.spec
    began = time.perf_counter()
    job.gauge.enter("evaluation")
    scores = job.score(SAMPLES_FILE, None)
    best = trained.best
    if job.engine.rank == 0 and scores:
        row = make_evaluation_row(spec.steps, scores, seconds=time.perf_counter() - began)
        record_evaluation(spec, row, job.audience, SAMPLES_FILE)
        best = update_best_and_prune(spec)
    return replace(trained, evaluation=scores, peaks=job.gauge.report(), best=best)


def open_model(spec: TrainSpec, rank: Rank, environ: Mapping[str, str], *, spread: bool = False) -> BuiltModel:
    """The model of a stage that does not train, whole on this rank's device, or `spread` over the rank's cards; described in
    environment.json. Raises InputRefused."""
    family = find_family(spec.model.family)
    lineage = find_lineage(spec, weights_folder(spec))
    model, processor = build(spec, family, lineage, device=CPU if spread else rank.torch_device)
    kernels = use_kernels(model, spec)
    staged = apply_stage(model, spec, family.unused(model))
    staged.model.eval()
    if spread and spec.device.cards > 1:
        cards = measure_free_memory(rank.device, spec.device.cards, rank.local * spec.device.cards)
        placed = dispatch_over_cards(staged.model, spec.model.groups, cards)
        print(f"the model lies on {len(set(placed.values()))} of {spec.device.cards} cards", flush=True)
    else:
        staged.model.to(rank.torch_device)
    made = BuiltModel(staged=staged, processor=processor, lineage=lineage, kernels=kernels)
    write_environment(spec, rank, made, environ, engine=None)
    return made


# Of each, `run_program` does the stage. Imported when it is asked for: a server's packages are nothing that training needs.
AFTER = {
    "evaluate": "trainer.programs.evaluate",
    "merge": "trainer.programs.merge",
    "convert": "trainer.programs.convert",
    "quantize": "trainer.programs.quantize",
    "infer": "trainer.programs.infer",
    "serve": "trainer.programs.serve",
}
Stage = Callable[[TrainSpec, Rank, Mapping[str, str]], TrainResult]


def find_program(kind: str) -> Stage:
    if kind == "train":
        return train_stage
    found: Stage = import_module(AFTER[kind]).run_program
    return found


# ------------------------------------------------------------------------------------------------------- before the steps


def refuse_unmeasured(spec: TrainSpec) -> None:
    """Raises InputRefused where the best checkpoint is to be kept and nothing tells which one that is."""
    if not spec.keep_best or spec.stage.kind != "train":
        return
    evaluation = spec.evaluation
    lacks = [] if evaluation.every and evaluation.enabled else ["run.evaluation.every=N and run.evaluation.enabled=true"]
    lacks += ["run.evaluation.loss=true"] if spec.keep_best == "loss" and not evaluation.loss else []
    if lacks:
        raise InputRefused(
            f"run.keep_best={spec.keep_best}: no evaluation tells it. Set {' and '.join(lacks)}, or leave run.keep_best empty."
        )


def silence_libraries() -> None:
    """Leave on the terminal what a reader of the run needs."""
    transformers.utils.logging.disable_progress_bar()
    # torch 2.13 renames two collectives that DeepSpeed 0.19.8 calls by their old names, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
    warnings.filterwarnings("ignore", message=".?is_gradient_checkpointing", category=FutureWarning)


def prepare_data(spec: TrainSpec) -> DataPaths:
    """Writes a builtin set where this node does not have it yet."""
    report_phase(2)
    prepare(spec.data)
    return resolve(spec.data)


def load_samples(file: Path | None, places: DataPaths) -> tuple[Sample, ...]:
    """Raises InputRefused with every problem: rows that are left out quietly would be another data set."""
    if file is None:
        return ()
    samples, problems = read_samples(file, places.images)
    if problems:
        raise InputRefused("\n".join(map(str, problems)))
    return samples


def write_environment(spec: TrainSpec, rank: Rank, made: BuiltModel, environ: Mapping[str, str], *, engine: Engine | None) -> None:
    """environment.json, the table of what trains, and the kernels that are not the plain ones. Raises InputRefused where a rerun finds
    another environment than that of its record."""
    deepspeed = {"config": dict(engine.handle.config), "taken": read_effective_config(engine)} if engine is not None else {}
    report = report_environment(rank.device, rank.local, made.staged.groups, deepspeed, environ)
    if report is not None:
        write(replace(report, origin=made.lineage, kernels=made.kernels), Path(spec.output) / ENVIRONMENT_FILE)
        refuse_other_environment(spec, report)
        trainable_table(made.staged.groups, print)
        for name, where in made.kernels.items():
            print(f"kernel {name}: {where}")
        sys.stdout.flush()


def write_environment_of_files(spec: TrainSpec, rank: Rank, lineage: WeightsLineage, environ: Mapping[str, str]) -> None:
    """environment.json of a stage that works on files and holds no model, before its long work begins: by it the launcher knows that the
    stage has begun, however long it takes, and comparisons and reruns what it ran in. Raises InputRefused as `write_environment` does."""
    report = report_environment(rank.device, rank.local, (), {}, environ)
    if report is not None:
        write(replace(report, origin=lineage), Path(spec.output) / ENVIRONMENT_FILE)
        refuse_other_environment(spec, report)


def refuse_other_environment(spec: TrainSpec, report: EnvReport) -> None:
    """Raises InputRefused that names each fact."""
    if spec.expects is None:
        return
    changes = {key: change for key, change in changed_facts(spec.expects.facts, facts_of(report)).items() if key not in spec.expects.free}
    if changes:
        said = "\n".join(f"  {describe_change(key, change)}" for key, change in changes.items())
        kinds = ",".join(dict.fromkeys(map(kind_of, changes)))
        raise InputRefused(
            f"this is not the environment of run {spec.expects.run_id}:\n{said}\nBring it back; or say that it may differ: --accept {kinds}"
        )


# ---------------------------------------------------------------------------------------------------------- after the steps


def score(
    spec: TrainSpec, rank: Rank, model: torch.nn.Module, processor: Processor, held_out: Sequence[Sample], *, partitioned: bool, **more: Any
) -> dict[str, float]:
    """{} when the run asks for no evaluation or names no held-out file. `partitioned` and `more`: see `evaluate`."""
    if not (spec.evaluation.enabled and held_out):
        return {}
    place = {"rank": rank.number, "world_size": rank.world_size, "partitioned": partitioned}
    return evaluate(model, held_out, processor, spec, rank.torch_device, **place, **more)


def summarise(spec: TrainSpec, progress: Progress, saved: SavedCheckpoint, *, lost: int) -> TrainResult:
    """`lost`: steps that are not in `progress.seconds`."""
    return TrainResult(
        schema=SCHEMA,
        status="stopped" if progress.stopped else "finished",
        steps=progress.step,
        seconds=progress.seconds,
        samples_per_s=(progress.step - lost) * spec.batch.global_batch / progress.seconds if progress.seconds else 0.0,
        final_loss=progress.loss,
        checkpoint=saved.path,
        weights_sha256=saved.weights_sha256,
        evaluation={},
    )
