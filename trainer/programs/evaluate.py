"""The stage evaluate: a checkpoint's answers to the held-out samples and their scores, optionally compared with those of a base.

On all ranks, and resumable: finished batches are recorded.
"""

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.journal import Journal, Row, open_journal, weights_fingerprints, write_rows
from trainer.checkpoint.lineage import find_images
from trainer.contract import SAMPLES_FILE, InputRefused, TrainResult, TrainSpec
from trainer.contract.weight_files import hash_weights
from trainer.data.check import DataPaths
from trainer.data.rows.sample import Sample
from trainer.data.sources.source import hash_sources
from trainer.device.rank import Rank
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.score_change import compare_rows, compare_scores
from trainer.export.derived_checkpoint import finished_result
from trainer.observe.memory import MemoryPeaks
from trainer.programs.inputs import find_left_out, load_samples, open_model, prepare_data
from trainer.train.model import BuiltModel, weights_folder

BASE_FILE = "samples_base.jsonl"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out samples, and the hash of their file."""

    samples: tuple[Sample, ...]
    sha256: str


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Write samples.jsonl, a row for each held-out sample, in their order. Raises InputRefused."""
    began = time.perf_counter()
    memory = MemoryPeaks(rank.device)
    paths = prepare_data(spec)
    held_out = read_held_out(spec, rank, paths)
    journals: list[Journal] = []
    base = {}
    if spec.evaluation.base and held_out.samples:
        base, journal = answer_with_base(spec_of_base(spec), rank, environ, paths, BASE_FILE)
        journals.append(journal)
        gc.collect()  # only one model is in memory at a time
    built = open_model(spec, rank, environ)
    memory.enter("evaluation")
    scores: dict[str, float] = {}
    if held_out.samples:
        scores, journal = answer(spec, rank, built, held_out, SAMPLES_FILE)
        journals.append(journal)
    if base:
        scores = compare_with_base(spec, rank, scores, base)
    for journal in journals:
        journal.remove()
    seconds = time.perf_counter() - began
    sha256 = hash_weights(Path(built.lineage.path)) if rank.number == 0 and built.lineage.path else ""
    return finished_result(seconds, scores, samples_per_s=scores.get("count", 0.0) / seconds, weights_sha256=sha256, peaks=memory.report())


def read_held_out(spec: TrainSpec, rank: Rank, paths: DataPaths) -> HeldOut:
    """Empty if the run has no evaluation or no held-out file. Images without a mark are shown as the weights were trained."""
    if not spec.evaluation.enabled or paths.evaluation is None:
        return HeldOut(samples=(), sha256="")
    return HeldOut(
        samples=load_samples(paths.evaluation, paths, find_images(spec, weights_folder(spec)), find_left_out(spec, rank, "evaluation")),
        sha256=hash_sources(paths.evaluation, paths.images_of(paths.evaluation)),
    )


def spec_of_base(spec: TrainSpec) -> TrainSpec:
    return replace(spec, stage=replace(spec.stage, checkpoint=spec.evaluation.base, base="", needs=()))


def answer_with_base(
    spec: TrainSpec, rank: Rank, environ: Mapping[str, str], paths: DataPaths, file: str
) -> tuple[dict[str, float], Journal]:
    """The base's scores; its model is freed when this returns. Raises InputRefused."""
    try:
        held_out = read_held_out(spec, rank, paths)
        built = open_model(spec, rank, environ)
    except InputRefused as error:
        raise InputRefused(f"run.evaluation.base: {str(error).replace('stage.checkpoint', spec.stage.checkpoint)}") from error
    return answer(spec, rank, built, held_out, file)


def answer(spec: TrainSpec, rank: Rank, built: BuiltModel, held_out: HeldOut, file: str) -> tuple[dict[str, float], Journal]:
    """The scores, and the journal, which is removed when the whole stage is done."""
    journal = open_journal(spec, file, rank.number, *weights_fingerprints(built.lineage), held_out.sha256)
    ranks = {"rank": rank.number, "world_size": rank.world_size, "partitioned": False}
    scores = evaluate(built.staged.model, held_out.samples, built.processor, spec, rank.torch_device, file=file, journal=journal, **ranks)
    return scores, journal


def compare_with_base(spec: TrainSpec, rank: Rank, scores: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Adds the base's answers to samples.jsonl on rank 0, which has both files; on other ranks the scores do not change."""
    run, rows = Path(spec.output), []
    if rank.number == 0:
        rows = compare_rows(read_rows(run / SAMPLES_FILE), read_rows(run / BASE_FILE), spec.evaluation.metrics)
        scores = compare_scores(scores, base, rows)
        print("against its base: {better:.0f} better, {worse:.0f} worse, {same:.0f} the same".format(**scores), flush=True)
    write_rows(rows, run / SAMPLES_FILE, rank.number)
    return scores


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
