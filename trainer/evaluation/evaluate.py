"""Greedy generation over held-out samples, and how right the answers are; where it is asked for, their loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from transformers import GenerationConfig

from trainer.checkpoint.journal import Journal, Row, write_rows
from trainer.contract import SAMPLES_FILE, TrainSpec
from trainer.data.batch.collate import collate, collate_prompts
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.evaluation.teacher_forcing import TEACHER_FORCED_METRICS, TokenScores, add_scores, figures, score_tokens
from trainer.evaluation.text_metric import TEXT_METRICS, rate
from trainer.generation.text_reader import end_ids, read_answer
from trainer.models.family import Processor

INTERNAL = ("place", "judged")
NumberedBatch = list[tuple[int, Sample]]
LossSum = Callable[[dict[str, Tensor]], Tensor]
StopCheck = Callable[[], bool]  # whether any rank has been asked to stop: a collective


class EvaluationStopped(Exception):
    """A stop was asked for between two batches."""


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
    halted: StopCheck | None = None,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Answer the last question of each sample and write `file`, in the run's folder. Returns exact_match (0 to 1), the other metrics of
    spec.evaluation and count, on every rank, and with `loss_sum`, which adds up the cross entropy of a micro-batch, loss: the mean over the
    answers' tokens. {}, and no file, when it was `halted` before it was through.

    `partitioned`: ranks hold parts of the weights (ZeRO 3) and must run the model equally often, so every rank gets as many
    batches as any other and goes on generating until all are done. `journal`: what is done is written down there and not done again; then
    a batch holds the same samples whatever ranks there are, so that its figures are the same to the bit.
    """
    chosen = list(enumerate(samples[: spec.evaluation.limit or None]))
    size = spec.evaluation.batch if journal is not None else min(spec.evaluation.batch, max(1, -(-len(chosen) // world_size)))
    shares = batches_of_rank(chosen, rank, world_size, size) if journal is None else split_batches(chosen, size)[rank::world_size]
    answer = make_answerer(model, processor, spec, device, together=partitioned and world_size > 1)
    try:
        with evaluation_mode(model):
            rows = answer_batches(until_stopped(halted, shares), answer, journal)
            own = {place for part in split_batches(chosen, size)[rank::world_size] for place, _ in part}
            losses = [batch_loss(part, processor, spec, loss_sum, own) for part in until_stopped(halted, shares)] if loss_sum else []
    except EvaluationStopped:
        return {}
    rows = gather_rows(rows, world_size)
    write_rows([{key: value for key, value in row.items() if key not in INTERNAL} for row in rows], Path(spec.output) / file, rank)
    scores = total_scores(rows, spec.evaluation.metrics)
    return scores | ({"loss": mean_loss(losses, world_size)} if loss_sum else {})


def answer_batches(parts: Iterable[NumberedBatch], answer: Callable[[NumberedBatch], list[Row]], journal: Journal | None) -> list[Row]:
    if journal is None:
        return [row for part in parts for row in answer(part)]
    for part in parts:
        number = part[0][0]  # the place of its first sample
        if number not in journal.done:
            journal.add(number, answer(part))
    return [row for rows in journal.done.values() for row in rows]


def total_scores(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, float]:
    """The figures of all rows, each summed in the order of the samples. token_accuracy and perplexity are over all tokens, not means over
    samples."""
    scores = {"exact_match": sum(row["match"] for row in rows) / max(1, len(rows)), "count": float(len(rows))}
    for name in metrics:
        if name in TEXT_METRICS and name != "exact_match":
            scores[name] = sum((row["scores"][name] for row in rows), 0.0) / max(1, len(rows))
    if any(name in TEACHER_FORCED_METRICS for name in metrics) and rows:
        scores |= figures(add_scores([TokenScores(**row["judged"]) for row in rows]), metrics)
    return scores


def until_stopped(halted: StopCheck | None, shares: list[list]) -> Iterator[list]:
    """The batches, equally many on every rank. Raises Interrupted, on all of them before the same one."""
    for part in shares:
        if halted is not None and halted():
            raise EvaluationStopped
        yield part


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within it; then every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def batch_loss(part: NumberedBatch, processor: Processor, spec: TrainSpec, loss_sum: LossSum, own: set[int]) -> tuple[float, int]:
    """Of the samples at the places in `own`, which is emptied, so that each counts once: the sum of the loss, and the tokens it is over."""
    batch = collate([sample for _, sample in part], processor, spec)
    for row, (place, _) in enumerate(part):
        if place not in own:
            batch["labels"][row] = IGNORED
        own.discard(place)
    return float(loss_sum(batch)), int((batch["labels"][:, 1:] != IGNORED).sum())


def mean_loss(losses: list[tuple[float, int]], world_size: int) -> float:
    """Over all ranks, in the order of the ranks."""
    own = (sum(loss for loss, _ in losses), sum(tokens for _, tokens in losses))
    sums = [own]
    if world_size > 1:
        sums = [own] * world_size
        torch.distributed.all_gather_object(sums, own)
    return sum(loss for loss, _ in sums) / max(1, sum(tokens for _, tokens in sums))


def batches_of_rank(items: list, rank: int, world_size: int, size: int) -> list[list]:
    """This rank's batches: equally many on every rank; where they run out, one is done twice and counted once."""
    batches = split_batches(items, size)
    own = batches[rank::world_size] or batches[:1]
    longest = -(-len(batches) // world_size)
    return own + own[-1:] * (longest - len(own))


def split_batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def make_answerer(
    model: torch.nn.Module, processor: Processor, spec: TrainSpec, device: torch.device, *, together: bool
) -> Callable[[NumberedBatch], list[Row]]:
    tokenizer, end_mark = processor.tokenizer, spec.model.template.end_mark
    forced = any(name in TEACHER_FORCED_METRICS for name in spec.evaluation.metrics)
    # Each value is said: what is left out here comes from the generation config of the checkpoint.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=spec.evaluation.max_new_tokens,
        eos_token_id=end_ids(tokenizer, end_mark),
        pad_token_id=tokenizer.pad_token_id,
    )

    @torch.no_grad()  # not inference_mode: ZeRO 3 gathers weights in place, which that forbids
    def answer(part: NumberedBatch) -> list[Row]:
        batch, references = collate_prompts([sample for _, sample in part], processor, spec)
        ids = generate(model, {key: value.to(device) for key, value in batch.items()}, config, together=together)
        texts = [read_answer(tokenizer, row, end_mark) for row in ids[:, batch["input_ids"].shape[1] :]]
        judged = score_tokens(model, [sample for _, sample in part], processor, spec, device) if forced else [None] * len(part)
        return [
            make_row(place, sample, reference, text.strip(), spec, told)
            for (place, sample), reference, text, told in zip(part, references, texts, judged, strict=True)
        ]

    return answer


def make_row(place: int, sample: Sample, reference: str, got: str, spec: TrainSpec, judged: TokenScores | None) -> Row:
    """`scores`: metrics besides exact_match, where any is asked for. `place` and `judged` are for the sums, and in no file of a reader."""
    metrics = spec.evaluation.metrics
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
    if judged is not None:
        row["judged"] = asdict(judged)
        scores |= figures(judged, metrics)
    return row | ({"scores": scores} if scores else {})


def name_images(sample: Sample, root: Path) -> list[str]:
    """Below the folder of the data where they are there, so that the answers of a run elsewhere are the same text."""
    return [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in sample.images]


def generate(model: torch.nn.Module, batch: dict[str, Tensor], config: GenerationConfig, *, together: bool) -> Tensor:
    """(samples, prompt + new) int64: the prompts with their greedy continuations, padded on the right."""
    return model.generate(**batch, generation_config=config, synced_gpus=together)


def gather_rows(rows: list[Row], world_size: int) -> list[Row]:
    """All ranks' rows in the order of the samples, each once."""
    parts: list[list[Row]] = [rows]
    if world_size > 1:
        parts = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, rows)
    by_place = {row["place"]: row for part in parts for row in part}
    return [by_place[place] for place in sorted(by_place)]
