"""The stage train: from the data and the model to the trained checkpoint and its evaluation."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.best import record_best
from trainer.checkpoint.checkpoint import warn_if_disk_is_small
from trainer.checkpoint.pending import SavedCheckpoint, update_best_and_prune
from trainer.checkpoint.resume import choose_resume_point, resume_engine
from trainer.contract import RESULT_FILE, SAMPLES_FILE, SCHEMA, TrainResult, TrainSpec, write, write_text
from trainer.contract.checkpoint_files import fixed_settings
from trainer.data.rows.image_form import most_frequent
from trainer.data.rows.sample import questions_of
from trainer.device.rank import Rank
from trainer.distributed.engine import start_engine
from trainer.distributed.zero3 import partition_model
from trainer.evaluation.evaluate import StopCheck, evaluate
from trainer.observe.memory import MemoryPeaks
from trainer.observe.tracker import open_trackers
from trainer.programs.environment import write_environment
from trainer.programs.inputs import begin_samples, finish_samples, load_held_out, prepare_data, wait_for_data_check
from trainer.train.loop import Progress, stop_on_signals
from trainer.train.model import build_model
from trainer.train.step_hooks import Job, make_evaluation_row, record_evaluation, samples_file
from trainer.train.steps import progress_of, run_steps, saved_checkpoint


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    memory = MemoryPeaks(rank.device)
    paths = prepare_data(spec)
    samples, sha256 = begin_samples(spec, paths)
    start = choose_resume_point(spec, sha256)
    spec = replace(spec, earlier_steps=start.checkpoint.window_ends if start.checkpoint else ())
    built = build_model(spec, rank, start)
    if spec.partitioned:
        partition_model(built.staged.model, spec, rank.torch_device)
    engine = start_engine(built.staged.model, spec, rank.torch_device, rates=built.staged.rates)
    write_environment(spec, rank, environ, lineage=built.lineage, built=built, engine=engine)
    samples = finish_samples(spec, paths, rank, samples)
    lineage = replace(built.lineage, images=most_frequent(questions_of(samples)) or built.lineage.images)
    held_out = load_held_out(spec, paths, rank, lineage.images)

    def score(file: str, stop_requested: StopCheck | None) -> dict[str, float]:
        """{} if the run has no evaluation or no held-out file."""
        if not held_out:
            return {}
        ranks = {"rank": rank.number, "world_size": rank.world_size, "partitioned": spec.partitioned}
        options = {"file": file, "loss_sum": engine.loss_sum if spec.evaluation.loss else None, "stop_requested": stop_requested}
        with engine.with_exported_weights():
            return evaluate(engine.model, held_out, built.processor, spec, rank.torch_device, **ranks, **options)  # type: ignore[arg-type]

    wait_for_data_check(Path(spec.output), len(samples))
    with open_trackers(spec, fixed_settings(spec), environ, step=start.step, writes=rank.number == 0) as trackers:
        job = Job(
            spec=spec,
            engine=engine,
            processor=built.processor,
            samples=samples,
            device=rank.device,
            memory=memory,
            start=start,
            lineage=lineage,
            trackers=trackers,
            score=score,
        )
        trained = take_steps(job)
        return trained if trained.status == "stopped" else evaluate_last_step(job, trained)


def take_steps(job: Job) -> TrainResult:
    """The result without an evaluation of the last step, except where that has ended the run. It is also written as that of a stopped run, in
    case a signal ends the run during the evaluation."""
    spec, engine, start = job.spec, job.engine, job.start
    untimed = start.step - start.rows.count  # steps without a metrics row; rank 0 has the rows
    with stop_on_signals() as stop:  # until the result is written: after a stop on one node, other nodes get the signal while they save
        if start.checkpoint is not None and start.step == spec.steps:  # an earlier attempt did all steps, but not the evaluation
            trained = summarize(spec, progress_of(start), saved_checkpoint(start.checkpoint), untimed=untimed)
        else:
            resume_engine(engine, spec, start)
            warn_if_disk_is_small(engine, spec)
            trained = summarize(spec, *run_steps(job, stop), untimed=untimed)
        trained = replace(trained, peaks=job.memory.report())
        if engine.rank == 0:
            trained = replace(trained, best=record_best(spec))
            write(replace(trained, status="stopped"), Path(spec.output) / RESULT_FILE)
    return trained


def evaluate_last_step(job: Job, trained: TrainResult) -> TrainResult:
    """The result with the scores of the final weights. Those of a run that its last evaluation has ended are known already."""
    spec = job.spec
    if trained.evaluation:
        if job.engine.rank == 0:
            answers = (Path(spec.output) / samples_file(trained.steps)).read_text(encoding="utf-8")
            write_text(answers, Path(spec.output) / SAMPLES_FILE)
            trained = replace(trained, best=update_best_and_prune(spec))
        return trained
    began = time.perf_counter()
    job.memory.enter("evaluation")
    scores = job.score(SAMPLES_FILE, None)
    best = trained.best
    if job.engine.rank == 0 and scores:
        row = make_evaluation_row(trained.steps, scores, seconds=time.perf_counter() - began)
        record_evaluation(spec, row, job.trackers, SAMPLES_FILE)
        best = update_best_and_prune(spec)
    return replace(trained, evaluation=scores, peaks=job.memory.report(), best=best)


def summarize(spec: TrainSpec, progress: Progress, saved: SavedCheckpoint, *, untimed: int) -> TrainResult:
    """`untimed`: steps that are not in `progress.seconds`."""
    return TrainResult(
        schema=SCHEMA,
        status="stopped" if progress.stopped else "finished",
        steps=progress.step,
        seconds=progress.seconds,
        samples_per_s=(progress.step - untimed) * spec.batch.global_batch / progress.seconds if progress.seconds else 0.0,
        final_loss=progress.loss,
        checkpoint=saved.path,
        weights_sha256=saved.weights_sha256,
        evaluation=progress.scores,
        ended=progress.ended,
    )
