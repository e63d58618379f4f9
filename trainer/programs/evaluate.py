"""The stage evaluate: a checkpoint's answers to the held-out samples and how right they are, beside those of its base where one is named.

Over all ranks, and resumable: what is done is written down batch by batch.
"""

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.journal import Journal, Row, weights_fingerprints, open_journal, write_rows
from trainer.contract import SAMPLES_FILE, SCHEMA, InputRefused, TrainResult, TrainSpec
from trainer.contract.weight_files import hash_weights
from trainer.data.check import DataPaths
from trainer.data.rows.sample import Sample
from trainer.data.rows.source import hash_sources
from trainer.device.rank import Rank
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.score_change import compare_rows, compare_scores
from trainer.observe.memory import MemoryPeaks
from trainer.programs.dispatch import BuiltModel, prepare_data, load_samples, open_model

BASE_FILE = "samples_base.jsonl"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out samples, and the hash of their file."""

    samples: tuple[Sample, ...]
    sha256: str


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Write samples.jsonl, a row for each held-out sample, in their order. Raises InputRefused."""
    began = time.perf_counter()
    gauge = MemoryPeaks(rank.device)
    places = prepare_data(spec)
    asked = read_held_out(spec, places)
    journals: list[Journal] = []
    base = {}
    if spec.evaluation.base and asked.samples:
        base, journal = answer_with_base(spec_of_base(spec), rank, environ, asked, BASE_FILE)
        journals.append(journal)
        gc.collect()  # of two models only one stands at a time
    made = open_model(spec, rank, environ)
    gauge.enter("evaluation")
    scores: dict[str, float] = {}
    if asked.samples:
        scores, journal = answer(spec, rank, made, asked, SAMPLES_FILE)
        journals.append(journal)
    if base:
        scores = compare_with_base(spec, rank, scores, base)
    for journal in journals:
        journal.remove()
    seconds = time.perf_counter() - began
    lineage = made.lineage
    return TrainResult(
        schema=SCHEMA,
        status="finished",
        steps=0,
        seconds=seconds,
        samples_per_s=scores.get("count", 0.0) / seconds,
        final_loss=None,
        checkpoint="",
        weights_sha256=hash_weights(Path(lineage.path)) if rank.number == 0 and lineage.path else "",
        evaluation=scores,
        peaks=gauge.report(),
    )


def read_held_out(spec: TrainSpec, places: DataPaths) -> HeldOut:
    """Nothing where the run asks for no evaluation or names no held-out file."""
    if not spec.evaluation.enabled or places.evaluation is None:
        return HeldOut(samples=(), sha256="")
    return HeldOut(samples=load_samples(places.evaluation, places), sha256=hash_sources(places.evaluation, places.images))


def spec_of_base(spec: TrainSpec) -> TrainSpec:
    return replace(spec, stage=replace(spec.stage, checkpoint=spec.evaluation.base, needs=()))


def answer_with_base(spec: TrainSpec, rank: Rank, environ: Mapping[str, str], asked: HeldOut, file: str) -> tuple[dict[str, float], Journal]:
    """Of the base, whose model is gone when this returns. Raises InputRefused."""
    try:
        made = open_model(spec, rank, environ)
    except InputRefused as error:
        raise InputRefused(f"run.evaluation.base: {str(error).replace('stage.checkpoint', spec.stage.checkpoint)}") from error
    return answer(spec, rank, made, asked, file)


def answer(spec: TrainSpec, rank: Rank, made: BuiltModel, asked: HeldOut, file: str) -> tuple[dict[str, float], Journal]:
    """The figures, and the journal, which goes when the whole stage is through."""
    journal = open_journal(spec, file, rank.number, *weights_fingerprints(made.lineage), asked.sha256)
    place = {"rank": rank.number, "world_size": rank.world_size, "partitioned": False}
    scores = evaluate(made.staged.model, asked.samples, made.processor, spec, rank.torch_device, file=file, journal=journal, **place)
    return scores, journal


def compare_with_base(spec: TrainSpec, rank: Rank, scores: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Puts the base's answers into samples.jsonl. On rank 0, which has both files; on the others the scores stay as they are."""
    run, rows = Path(spec.output), []
    if rank.number == 0:
        rows = compare_rows(read_rows(run / SAMPLES_FILE), read_rows(run / BASE_FILE), spec.evaluation.metrics)
        scores = compare_scores(scores, base, rows)
        print("against its base: {better:.0f} better, {worse:.0f} worse, {same:.0f} the same".format(**scores), flush=True)
    write_rows(rows, run / SAMPLES_FILE, rank.number)
    return scores


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
