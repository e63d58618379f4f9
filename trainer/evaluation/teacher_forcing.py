"""Teacher forcing: how likely a model finds each token of a given answer, and whether it is the most likely one."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad

from trainer.contract import TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.kernels.cross_entropy import find_head, slices
from trainer.models.family import Processor

CHUNK = 1024  # tokens that have logits at a time: 0.6 GB in float32 with a vocabulary of 150,000
MAX_NATS = 700.0  # per token; exp of more overflows a float
TEACHER_FORCED_METRICS = ("token_accuracy", "perplexity")


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Of the last answer and its end mark: number of tokens, how many of them were the most likely ones, the sum of -log p in nats."""

    tokens: int
    right: int
    nats: float

    @property
    def token_accuracy(self) -> float:
        return self.right / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p."""
        return math.exp(min(self.nats / max(1, self.tokens), MAX_NATS))


def add_scores(token_scores: Sequence[TokenScores]) -> TokenScores:
    """The sum of all, in their order."""
    return TokenScores(
        tokens=sum(one.tokens for one in token_scores),
        right=sum(one.right for one in token_scores),
        nats=sum((one.nats for one in token_scores), 0.0),
    )


@torch.no_grad()
def score_tokens(
    model: torch.nn.Module, samples: Sequence[Sample], processor: Processor, spec: TrainSpec, device: torch.device
) -> list[TokenScores]:
    """One for each sample, from one forward pass over all of them. Raises InputRefused like `collate`."""
    batch = collate([label_last_answer(sample) for sample in samples], processor, spec)
    targets = batch.pop("labels")[:, 1:]
    labelled = targets != IGNORED
    inputs = {key: value.to(device) for key, value in batch.items()}
    with head_as_scorer(find_head(model), targets[labelled].to(device)):
        scored = model(**inputs, logits_to_keep=pad(labelled, (0, 1)).to(device), use_cache=False).logits.double().cpu()
    counts = labelled.sum(dim=1).tolist()
    return [
        TokenScores(tokens=count, right=int(part[:, 1].sum()), nats=float(part[:, 0].sum()))
        for count, part in zip(counts, scored.reshape(-1, 2).split(counts), strict=True)
    ]


def label_last_answer(sample: Sample) -> Sample:
    """The same conversation, with labels on the last answer only."""
    *before, last = sample.messages
    return replace(sample, messages=(*(replace(message, in_loss=False) for message in before), replace(last, in_loss=True)))


@contextmanager
def head_as_scorer(head: torch.nn.Module, targets: Tensor) -> Iterator[None]:
    """Within it the head returns (tokens, 2) float32 instead of logits: -log p of each target, and 1 if it is the most likely token.
    Logits of more than CHUNK tokens never exist together."""

    def answer(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        scored = []
        for part in slices(len(targets), CHUNK):
            logits = linear(flat[part], head.weight, getattr(head, "bias", None)).float()  # type: ignore[arg-type]
            lost = cross_entropy(logits, targets[part], reduction="none")
            scored.append(torch.stack([lost, (logits.argmax(dim=-1) == targets[part]).float()], dim=1))
        return torch.cat(scored)

    head.forward = answer  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward  # the method of its class is used again


def figures(token_scores: TokenScores, metrics: Sequence[str]) -> dict[str, Any]:
    """The scores that are in TEACHER_FORCED_METRICS."""
    return {name: getattr(token_scores, name) for name in metrics if name in TEACHER_FORCED_METRICS}
