"""Greedy generation over held-out samples, and how many of the answers are exactly right; where it is asked for, their loss."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import GenerationConfig

from trainer.contract import SAMPLES_FILE, TrainSpec, write_text
from trainer.data.collate import collate, collate_prompts
from trainer.data.encode import IGNORED
from trainer.data.sample import Sample
from trainer.models.family import Processor

Row = dict[str, Any]
LossSum = Callable[[dict[str, Tensor]], Tensor]
Halted = Callable[[], bool]  # whether any rank has been asked to stop: a collective


class Interrupted(Exception):
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
    halted: Halted | None = None,
) -> dict[str, float]:
    """Answer the last question of each sample and write `file`, in the run's folder. Returns exact_match (0 to 1) and count, on every rank,
    and with `loss_sum`, which adds up the cross entropy of a micro-batch, loss: the mean over the answers' tokens. {}, and no file, when it
    was `halted` before it was through.

    `partitioned`: ranks hold parts of the weights (ZeRO 3) and must run the model equally often, so every rank gets as many
    batches as any other and goes on generating until all are done.
    """
    chosen = samples[: spec.evaluation.limit or None]
    shares = share(list(enumerate(chosen)), rank, world_size, spec.evaluation.batch)
    answer = make_answerer(model, processor, spec, device, together=partitioned and world_size > 1)
    try:
        with answering(model):
            rows = [row for part in unless(halted, shares) for row in answer(part)]
            own = set(range(rank, len(chosen), world_size))
            losses = [part_loss(part, processor, spec, loss_sum, own) for part in unless(halted, shares)] if loss_sum else []
    except Interrupted:
        return {}
    rows = gather_rows(rows, world_size)
    if rank == 0:
        (Path(spec.output) / file).parent.mkdir(exist_ok=True)
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), Path(spec.output) / file)
    scores = {"exact_match": sum(row["match"] for row in rows) / max(1, len(rows)), "count": float(len(rows))}
    return scores | ({"loss": mean_loss(losses, world_size)} if loss_sum else {})


def unless(halted: Halted | None, shares: list[list]) -> Iterator[list]:
    """The batches, equally many on every rank. Raises Interrupted, on all of them before the same one."""
    for part in shares:
        if halted is not None and halted():
            raise Interrupted
        yield part


@contextmanager
def answering(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within it; then every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def part_loss(part: list[tuple[int, Sample]], processor: Processor, spec: TrainSpec, loss_sum: LossSum, own: set[int]) -> tuple[float, int]:
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


def share(items: list, rank: int, world_size: int, size: int) -> list[list]:
    """This rank's batches: equally many on every rank; where items run out, one is done twice and counted once."""
    own = items[rank::world_size] or items[:1]
    longest = -(-len(items) // world_size)
    own = own + own[-1:] * (longest - len(own))
    return [own[start : start + size] for start in range(0, len(own), size)]


def make_answerer(
    model: torch.nn.Module, processor: Processor, spec: TrainSpec, device: torch.device, *, together: bool
) -> Callable[[list[tuple[int, Sample]]], list[Row]]:
    tokenizer, end_mark = processor.tokenizer, spec.model.template.end_mark
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
    def answer(part: list[tuple[int, Sample]]) -> list[Row]:
        batch, references = collate_prompts([sample for _, sample in part], processor, spec)
        ids = generate(model, {key: value.to(device) for key, value in batch.items()}, config, together=together)
        texts = [read_answer(tokenizer, row, end_mark) for row in ids[:, batch["input_ids"].shape[1] :]]
        prompts = [sample.messages[-2].content for _, sample in part]
        return [
            {
                "row": sample.row,
                "place": place,
                "prompt": prompt,
                "images": name_images(sample, Path(spec.data.root)),
                "expected": expected.strip(),
                "got": got.strip(),
                "match": got.strip() == expected.strip(),
            }
            for (place, sample), prompt, expected, got in zip(part, prompts, references, texts, strict=True)
        ]

    return answer


def name_images(sample: Sample, root: Path) -> list[str]:
    """Below the folder of the data where they are there, so that the answers of a run elsewhere are the same text."""
    return [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in sample.images]


def generate(model: torch.nn.Module, batch: dict[str, Tensor], config: GenerationConfig, *, together: bool) -> Tensor:
    """(samples, prompt + new) int64: the prompts with their greedy continuations, padded on the right."""
    return model.generate(**batch, generation_config=config, synced_gpus=together)


def end_ids(tokenizer: Any, end_mark: str) -> list[int]:
    """What ends an answer: the end mark where it is one token, and the tokenizer's own end."""
    mark = tokenizer(end_mark.strip(), add_special_tokens=False)["input_ids"]
    ends = {mark[0]} if len(mark) == 1 else set()
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def read_answer(tokenizer: Any, ids: Tensor, end_mark: str) -> str:
    """The text up to the end mark, which a tokenizer may spell in several tokens; special tokens are no text."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text.partition(end_mark.strip())[0] if end_mark.strip() else text


def gather_rows(rows: list[Row], world_size: int) -> list[Row]:
    """All ranks' rows in the order of the samples, each once."""
    parts: list[list[Row]] = [rows]
    if world_size > 1:
        parts = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, rows)
    by_place = {row["place"]: row for part in parts for row in part}
    return [{key: value for key, value in by_place[place].items() if key != "place"} for place in sorted(by_place)]
