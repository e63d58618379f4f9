"""What a model would have said at each token of an answer that it is given: how likely, and whether it is the likeliest."""

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

CHUNK = 1024  # tokens that have logits at a time: 0.6 GB in float32 of a vocabulary of 150,000
MOST_NATS = 700.0  # of a token; exp of more is beyond what a float holds
FORCED_METRICS = ("token_accuracy", "perplexity")


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Of the last answer and its end mark: tokens, how many of them were the likeliest, the sum of -log p in nats."""

    tokens: int
    right: int
    nats: float

    @property
    def token_accuracy(self) -> float:
        return self.right / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p."""
        return math.exp(min(self.nats / max(1, self.tokens), MOST_NATS))


def add(judged: Sequence[TokenScores]) -> TokenScores:
    """All of them as one, summed in their order."""
    return TokenScores(
        tokens=sum(one.tokens for one in judged), right=sum(one.right for one in judged), nats=sum((one.nats for one in judged), 0.0)
    )


@torch.no_grad()
def judge(model: torch.nn.Module, samples: Sequence[Sample], processor: Processor, spec: TrainSpec, device: torch.device) -> list[TokenScores]:
    """One for each sample, from one forward pass over all of them. Raises InputRefused as `collate` does."""
    batch = collate([only_last(sample) for sample in samples], processor, spec)
    targets = batch.pop("labels")[:, 1:]
    asked = targets != IGNORED
    inputs = {key: value.to(device) for key, value in batch.items()}
    with head_as_judge(find_head(model), targets[asked].to(device)):
        told = model(**inputs, logits_to_keep=pad(asked, (0, 1)).to(device), use_cache=False).logits.double().cpu()
    counts = asked.sum(dim=1).tolist()
    return [
        TokenScores(tokens=count, right=int(part[:, 1].sum()), nats=float(part[:, 0].sum()))
        for count, part in zip(counts, told.reshape(-1, 2).split(counts), strict=True)
    ]


def only_last(sample: Sample) -> Sample:
    """The same conversation, whose last answer alone has labels."""
    *before, last = sample.messages
    return replace(sample, messages=(*(replace(message, in_loss=False) for message in before), replace(last, in_loss=True)))


@contextmanager
def head_as_judge(head: torch.nn.Module, targets: Tensor) -> Iterator[None]:
    """Within it the head answers with (tokens, 2) float32 in place of logits: -log p of each target, and 1 where it is the likeliest.
    Logits of more than CHUNK tokens never exist together."""

    def answer(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        told = []
        for part in slices(len(targets), CHUNK):
            logits = linear(flat[part], head.weight, getattr(head, "bias", None)).float()  # type: ignore[arg-type]
            lost = cross_entropy(logits, targets[part], reduction="none")
            told.append(torch.stack([lost, (logits.argmax(dim=-1) == targets[part]).float()], dim=1))
        return torch.cat(told)

    head.forward = answer  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward  # that of its class is found again


def figures(judged: TokenScores, metrics: Sequence[str]) -> dict[str, Any]:
    """The named figures, of FORCED_METRICS."""
    return {name: getattr(judged, name) for name in metrics if name in FORCED_METRICS}
