"""The loss of a micro-batch, float32: plain, or in chunks of tokens, so that the logits of all tokens never exist together.

With a vocabulary of 150,000 the logits of 4,096 trained tokens are 2.5 GB in float32, and their gradient as much again. In chunks the
logits are computed, used and freed, and recomputed in the backward pass: a fourth product with the head's weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def sum_loss(model: torch.nn.Module, run: Callable[[], Tensor], targets: Tensor, *, chunk: int, smoothing: float = 0.0) -> Tensor:
    """Cross entropy summed over the trained tokens, float32, scalar.

    `run()`: the forward pass, which returns logits at trained positions only, (tokens, vocabulary). `targets`: (tokens,) int64.
    `chunk`: the most tokens that have logits at a time; 0 = all. Loss and gradients are the same up to the order of sums. `smoothing`:
    torch's label_smoothing, the share of each target that is spread evenly over the vocabulary.
    """
    if not chunk or len(targets) <= chunk:
        return cross_entropy(run().float(), targets, reduction="sum", label_smoothing=smoothing)
    with head_as_loss(find_head(model), targets, chunk, smoothing):
        return run()


def find_head(model: torch.nn.Module) -> torch.nn.Module:
    """The linear layer that computes the logits; under peft its trained copy, if it is trained whole."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    copies = getattr(head, "modules_to_save", None)
    return copies[head.active_adapters[0]] if copies is not None else head  # type: ignore[no-any-return, index]


@contextmanager
def head_as_loss(head: torch.nn.Module, targets: Tensor, chunk: int, smoothing: float) -> Iterator[None]:
    """Within it the head returns the summed loss instead of logits, (tokens, width) -> ().

    So the loss is computed where the hooks of ZeRO 3 have gathered the head's weight, in the forward pass and again in the backward pass,
    and every family's forward returns it as its logits.
    """

    def answer(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        options = (getattr(head, "bias", None), targets, chunk, smoothing)
        total: Tensor = ChunkedCrossEntropy.apply(flat, head.weight, *options)  # type: ignore[no-untyped-call]
        return total

    head.forward = answer
    try:
        yield
    finally:
        del head.forward  # the method of its class is used again


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T + bias` against `targets`, float32, scalar.

    hidden (tokens, width) and weight (vocabulary, width) of one dtype, bias (vocabulary,) or None, targets (tokens,) int64. The gradient
    of a chunk's logits, softmax - target (one-hot, or smoothed), is computed in float32 and multiplied by the upstream factor (loss scale over tokens) before
    it is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, smoothing: float = 0.0
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk, ctx.smoothing = chunk, smoothing
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in slices(len(targets), chunk):
            logits = linear(hidden[part], weight, bias).float()
            total += cross_entropy(logits, targets[part], reduction="sum", label_smoothing=smoothing)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets = ctx.saved_tensors
        wanted = dict(zip(("hidden", "weight", "bias"), ctx.needs_input_grad, strict=False))
        to_hidden = torch.empty_like(hidden) if wanted["hidden"] else None
        to_weight = torch.zeros_like(weight) if wanted["weight"] else None
        to_bias = torch.zeros_like(bias) if wanted["bias"] else None
        for part in slices(len(targets), ctx.chunk):
            gradient = linear(hidden[part], weight, bias).float().softmax(dim=-1)
            gradient[torch.arange(len(gradient), device=gradient.device), targets[part]] -= 1 - ctx.smoothing
            if ctx.smoothing:
                gradient -= ctx.smoothing / gradient.shape[-1]
            gradient = gradient.mul_(upstream).to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight.addmm_(gradient.T, hidden[part])
            if to_bias is not None:
                to_bias += gradient.sum(dim=0)
        return to_hidden, to_weight, to_bias, None, None, None


def slices(length: int, chunk: int) -> Iterator[slice]:
    for first in range(0, length, chunk):
        yield slice(first, min(first + chunk, length))
