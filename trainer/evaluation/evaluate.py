"""Greedy generation over held-out samples, and scores of the answers; optionally also their loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from trainer.checkpoint.journal import Journal, Row, write_rows
from trainer.contract import SAMPLES_FILE, TrainSpec
from trainer.data.batch.collate import collate, collate_prompts, reads_truncated
from trainer.data.encode import IGNORED
from trainer.data.grounding.placement import Placement, make_placement
from trainer.data.media.image import read_size
from trainer.data.processor import template_of
from trainer.data.rows.sample import Sample
from trainer.distributed.collective import gather_objects
from trainer.evaluation.box_metric import BOX_METRICS, as_shares, rate_boxes
from trainer.evaluation.teacher_forcing import TEACHER_FORCED_METRICS, TokenScores, add_scores, figures, score_tokens
from trainer.evaluation.text_metric import TEXT_METRICS, rate
from trainer.generation.text_reader import end_ids, read_answer
from trainer.models.family import Processor

INTERNAL = ("place", "judged")  # keys of a row that are used for the totals only, and are in the journal but in no result file
NumberedBatch = list[tuple[int, Sample]]
LossSum = Callable[[dict[str, Tensor]], Tensor]
StopCheck = Callable[[], bool]  # whether any rank was asked to stop: a collective


class EvaluationStopped(Exception):
    """A stop was requested between two batches."""


def evaluate(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    processor: Processor,
    spec: TrainSpec,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    partitioned: bool,
    file: str = SAMPLES_FILE,
    loss_sum: LossSum | None = None,
    stop_requested: StopCheck | None = None,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Answer the last question of each sample and write `file` in the run's folder. Returns, on every rank, exact_match (0 to 1), the other
    metrics of spec.evaluation, count, and with `loss_sum` (which sums the cross entropy of a micro-batch) loss: the mean over the answers'
    tokens. Returns {} and writes no file if `stop_requested` returned True before the end.

    `partitioned`: ranks hold parts of the weights (ZeRO 3) and must run the model equally often, so every rank gets the same number of
    batches and generates until all are done. `journal`: finished batches are recorded there and not repeated; then a batch holds the same
    samples on any number of ranks, so that the scores are bitwise identical.
    """
    chosen = list(enumerate(samples[: spec.evaluation.limit or None]))
    size = spec.evaluation.batch if journal is not None else min(spec.evaluation.batch, max(1, -(-len(chosen) // world_size)))
    shares = batches_of_rank(chosen, rank, world_size, size) if journal is None else split_batches(chosen, size)[rank::world_size]
    answer = make_answerer(model, processor, spec, device, together=partitioned and world_size > 1)
    try:
        with evaluation_mode(model):
            rows = answer_batches(until_stopped(stop_requested, shares), answer, journal)
            own = {place for batch in split_batches(chosen, size)[rank::world_size] for place, _ in batch}
            losses = (
                [batch_loss(batch, processor, spec, loss_sum, own) for batch in until_stopped(stop_requested, shares)] if loss_sum else []
            )
    except EvaluationStopped:
        return {}
    rows = merge_rows(rows)
    write_rows([{key: value for key, value in row.items() if key not in INTERNAL} for row in rows], Path(spec.output) / file, rank)
    scores = total_scores(rows, spec.evaluation.metrics)
    return scores | ({"loss": mean_loss(losses)} if loss_sum else {})


def answer_batches(batches: Iterable[NumberedBatch], answer: Callable[[NumberedBatch], list[Row]], journal: Journal | None) -> list[Row]:
    if journal is None:
        return [row for batch_samples in batches for row in answer(batch_samples)]
    for batch_samples in batches:
        number = batch_samples[0][0]  # the index of its first sample
        if number not in journal.done:
            journal.add(number, answer(batch_samples))
    return [row for rows in journal.done.values() for row in rows]


def total_scores(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, float]:
    """The scores of all rows, each summed in the order of the samples; those of boxes over the rows that have some. token_accuracy and
    perplexity are over all tokens, not means over samples."""
    scores = {"exact_match": sum(row["match"] for row in rows) / max(1, len(rows)), "count": float(len(rows))}
    for name in metrics:
        if name in TEXT_METRICS and name != "exact_match":
            scores[name] = sum((row["scores"][name] for row in rows), 0.0) / max(1, len(rows))
        if name in BOX_METRICS:
            found = [row["scores"][name] for row in rows if name in row.get("scores", {})]
            scores |= {name: sum(found, 0.0) / max(1, len(found)), f"{name}_count": float(len(found))}
    if any(name in TEACHER_FORCED_METRICS for name in metrics) and rows:
        scores |= figures(add_scores([TokenScores(**row["judged"]) for row in rows]), metrics)
    return scores


def until_stopped(stop_requested: StopCheck | None, shares: list[list]) -> Iterator[list]:
    """The batches, equally many on every rank. Raises EvaluationStopped on all ranks, before the same batch."""
    for batch_samples in shares:
        if stop_requested is not None and stop_requested():
            raise EvaluationStopped
        yield batch_samples


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Sets evaluation mode; afterwards every module is in its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def batch_loss(batch_samples: NumberedBatch, processor: Processor, spec: TrainSpec, loss_sum: LossSum, own: set[int]) -> tuple[float, int]:
    """Sum of the loss and number of tokens, of the samples whose index is in `own`; the indices are removed, so that each counts once."""
    batch = collate([sample for _, sample in batch_samples], processor, spec)
    for row, (place, _) in enumerate(batch_samples):
        if place not in own:
            batch["labels"][row] = IGNORED
        own.discard(place)
    return float(loss_sum(batch)), int((batch["labels"][:, 1:] != IGNORED).sum())


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Over all ranks, in the order of the ranks."""
    sums = gather_objects((sum(loss for loss, _ in losses), sum(tokens for _, tokens in losses)))
    return sum(loss for loss, _ in sums) / max(1, sum(tokens for _, tokens in sums))


def batches_of_rank(items: list, rank: int, world_size: int, size: int) -> list[list]:
    """This rank's batches: equally many on every rank; if they run out, one is repeated and counted once."""
    batches = split_batches(items, size)
    own = batches[rank::world_size] or batches[:1]
    longest = -(-len(batches) // world_size)
    return own + own[-1:] * (longest - len(own))


def split_batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def make_answerer(
    model: torch.nn.Module, processor: Processor, spec: TrainSpec, device: torch.device, *, together: bool
) -> Callable[[NumberedBatch], list[Row]]:
    tokenizer, end_mark = processor.tokenizer, template_of(processor, spec).end_mark
    placement = make_placement(spec, processor.scaled)
    forced = any(name in TEACHER_FORCED_METRICS for name in spec.evaluation.metrics)
    # Every value is set: a missing one would be taken from the generation config of the checkpoint.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=spec.evaluation.max_new_tokens,
        eos_token_id=end_ids(tokenizer, end_mark),
        pad_token_id=tokenizer.pad_token_id,
    )

    @torch.no_grad()  # not inference_mode: it forbids the in-place gathers of ZeRO 3
    def answer(batch_samples: NumberedBatch) -> list[Row]:
        batch, references = collate_prompts([sample for _, sample in batch_samples], processor, spec)
        ids = generate(model, {key: value.to(device) for key, value in batch.items()}, config, together=together)
        texts = [read_answer(tokenizer, row, end_mark) for row in ids[:, batch["input_ids"].shape[1] :]]
        token_scores = (
            score_tokens(model, [sample for _, sample in batch_samples], processor, spec, device) if forced else [None] * len(batch_samples)
        )
        return [
            make_row(place, sample, reference, text.strip(), spec, scores_of_sample, placement)
            for (place, sample), reference, text, scores_of_sample in zip(batch_samples, references, texts, token_scores, strict=True)
        ]

    return answer


def make_row(
    place: int, sample: Sample, reference: str, got: str, spec: TrainSpec, token_scores: TokenScores | None, placement: Placement
) -> Row:
    """`scores`: the metrics other than exact_match, if there are any. `boxes`: of both answers, where a metric of boxes is asked for."""
    metrics = spec.evaluation.metrics
    if placement.wanted(sample):
        sample = placement.place(sample, read_sizes(sample, spec))
    accepted = tuple(dict.fromkeys((reference, *sample.accepted)))
    row: Row = {
        "row": sample.row,
        "place": place,
        "prompt": sample.messages[-2].content,
        "images": name_images(sample, Path(spec.data.root)),
        "expected": reference.strip(),
        "got": got,
        "match": rate("exact_match", got, accepted) == 1,
    }
    if sample.accepted:
        row["accepted"] = list(sample.accepted)
    scores = {name: rate(name, got, accepted) for name in metrics if name in TEXT_METRICS and name != "exact_match"}
    if any(name in BOX_METRICS for name in metrics):
        scores |= {name: score for name in metrics if name in BOX_METRICS and (score := rate_boxes(name, got, accepted)) is not None}
        row |= shown_boxes(sample, reference, got, spec, placement)
    if token_scores is not None:
        row["judged"] = asdict(token_scores)
        scores |= figures(token_scores, metrics)
    return row | ({"scores": scores} if scores else {})


def read_sizes(sample: Sample, spec: TrainSpec) -> list[tuple[int, int]]:
    return [read_size(path, truncated=reads_truncated(spec)) for path in sample.images]


def shown_boxes(sample: Sample, reference: str, got: str, spec: TrainSpec, placement: Placement) -> Row:
    """{"boxes": {"expected", "got"}}: for each box or point its numbers as shares of width and height. Only of a sample with one image."""
    if len(sample.images) != 1:
        return {}
    size = placement.target(read_sizes(sample, spec)[0])
    return {"boxes": {"expected": as_shares(reference, size), "got": as_shares(got, size)}}


def name_images(sample: Sample, root: Path) -> list[str]:
    """Relative to the data folder if possible, so that a run on another machine writes the same text."""
    return [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in sample.images]


def generate(model: torch.nn.Module, batch: dict[str, Tensor], config: GenerationConfig, *, together: bool) -> Tensor:
    """(samples, prompt + new) int64: the prompts with their greedy continuations, padded on the right."""
    return model.generate(**batch, generation_config=config, synced_gpus=together)


def merge_rows(rows: list[Row]) -> list[Row]:
    """All ranks' rows in the order of the samples, each once."""
    by_place = {row["place"]: row for batch_samples in gather_objects(rows) for row in batch_samples}
    return [by_place[place] for place in sorted(by_place)]
