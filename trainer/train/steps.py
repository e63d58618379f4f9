"""The steps of a stage, with checkpoints, metrics, trackers and the watchdog."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.pending import SavedCheckpoint
from trainer.checkpoint.resume import ResumePoint
from trainer.checkpoint.writer import CheckpointWriter, choose_background
from trainer.contract import StepRow
from trainer.contract.checkpoint_files import CheckpointState
from trainer.data.batch.assign_to_ranks import samples_of_step
from trainer.data.batch.cache import Cache
from trainer.data.batch.length_table import open_table
from trainer.data.batch.load import batches, keep_lengths
from trainer.observe.metric import open_metrics
from trainer.train.loop import Progress, StopFlag, train
from trainer.train.step_hooks import Job, StepHooks
from trainer.train.watchdog import end_hung, watch_steps

TRACKED_FIELDS = ("loss", "lr", "grad_norm", "tokens", "seconds", "peak_bytes", "loss_scale")  # of a step's row, for the trackers


def run_steps(job: Job, stop: StopFlag) -> tuple[Progress, SavedCheckpoint]:
    """All remaining steps, or those until `stop` is set; then a checkpoint of the last one."""
    spec, engine, start = job.spec, job.engine, job.start
    background = choose_background(engine, spec)
    lengths = open_table(spec, len(job.samples), engine.rank)
    writer = CheckpointWriter(engine, job.processor, spec, data_sha256=start.data_sha256, lineage=job.lineage, background=background)
    with (
        watch_steps(spec.hang_timeout_s, rank=engine.rank, stream=sys.stderr, end=lambda why: end_hung(spec, engine.rank, why)) as watchdog,
        open_metrics(Path(spec.output), writes=engine.rank == 0) as write_row,
        closing(batches(job.samples, job.processor, spec, rank=engine.rank, first_step=start.step, lengths=lengths)) as source,
        finish_writing(writer),
        closing(StepHooks(job, writer, watchdog, stop)) as hooks,
    ):

        def write(row: StepRow) -> None:
            write_row(row)
            job.trackers.log(row.step, {name: float(getattr(row, name)) for name in TRACKED_FIELDS})

        if hooks.before_first_step(start.step, evaluated=start.evaluated) and start.checkpoint is not None:
            return finish_early(replace(progress_of(start), stopped=True), hooks), saved_checkpoint(start.checkpoint)
        progress = train(
            engine,
            source,
            spec,
            done=progress_of(start),
            watchdog=watchdog,
            write=write,
            own_requests=hooks.requests,
            after_step=hooks.after_step,
            peak_bytes=job.memory.highest,
            name_samples=lambda step: name_samples(job, step),
            save_last_good=hooks.save_last_good,
        )
        job.memory.enter("saving")
        return finish_early(progress, hooks), writer.save(progress.step)


def finish_early(progress: Progress, hooks: StepHooks) -> Progress:
    """A run that its evaluations have ended is finished, even if a signal came too."""
    if not (progress.stopped and hooks.ended):
        return progress
    if hooks.rank == 0:
        print(hooks.ended, flush=True)
    return replace(progress, stopped=False, ended=hooks.ended, scores=hooks.scores)


@contextmanager
def finish_writing(writer: CheckpointWriter) -> Iterator[None]:
    """If the steps fail, a background checkpoint is still written to its end, if possible."""
    try:
        yield
    except BaseException:
        writer.close()
        raise


def name_samples(job: Job, step: int) -> str:
    measure = keep_lengths(job.samples, job.processor, job.spec, Cache(0))
    chosen = samples_of_step(step - 1, job.spec, count=len(job.samples), measure=measure)
    rows: dict[str, list[int]] = {}
    for number in sorted(chosen):
        rows.setdefault(job.samples[number].file, []).append(job.samples[number].row)
    return "; ".join(f"{file} rows {', '.join(map(str, sorted(own)))}" for file, own in rows.items())


def saved_checkpoint(checkpoint: CheckpointState) -> SavedCheckpoint:
    return SavedCheckpoint(path=checkpoint.path, weights_sha256=checkpoint.weights_sha256)


def progress_of(start: ResumePoint) -> Progress:
    return Progress(step=start.step, seconds=start.rows.seconds, loss=start.rows.loss)
