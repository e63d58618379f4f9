"""Compares the logits of a model with and without its adapter: equal ones mean that the adapter did nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.probe import make_probes
from trainer.data.processor import Processor
from trainer.stages.adapter import describe_idle
from trainer.stages.adapter_layout import AdapterLayout

TEXT, IMAGE = 1, 0  # numbers of a probe
PORTABLE = "sdpa"  # attention that every device has; flash attention has no kernel for the CPU, where the model is loaded


def refuse_idle_logits(
    model: torch.nn.Module,
    without: Callable[[], AbstractContextManager[Any]],
    layout: AdapterLayout,
    *,
    spec: TrainSpec,
    processor: Processor,
) -> None:
    """Raises InputRefused if no logit of a short text, and of an image after it, changes with the adapter. `model`: wrapped by peft, on any device;
    `without()`: switches the adapter off. It takes two forward passes over some 30 tokens, and leaves model and random numbers as they were. Rows of tokens
    that are not in these inputs do something too."""
    if any(changes_rows(module) for module in model.modules() if hasattr(module, "trainable_tokens_delta")):
        return
    before = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), portable_attention(model):
            for number in (TEXT, IMAGE):
                batch = make_probes(spec, processor, 1, first=number)
                adapted = compute(model, batch)
                with without():
                    if not torch.equal(adapted, compute(model, batch)):
                        return
    finally:
        model.train(before)
    raise InputRefused(
        f"{describe_idle(layout.folder)}: with and without it the logits of {spec.model.name} are bitwise identical, for a text and for an image. Its "
        f"{len(layout.factors)} modules are in parts that do not affect the output, or its update is lost in {spec.precision.weights}. Name another "
        "checkpoint, or the base itself."
    )


def changes_rows(layer: Any) -> bool:
    """Whether a layer of peft has other rows than its base."""
    return any(not torch.equal(rows, layer.trainable_tokens_original[name]) for name, rows in layer.trainable_tokens_delta.items())


def compute(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the last tokens."""
    device = next(model.parameters()).device
    logits: Tensor = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
    return logits if logits.ndim < 3 else logits[batch["logits_to_keep"].to(logits.device)]


@contextmanager
def portable_attention(model: torch.nn.Module) -> Iterator[None]:
    """Compute attention with PORTABLE while the block runs, if the model is on the CPU."""
    configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    flash = [one for one in configs.values() if "flash" in str(getattr(one, "_attn_implementation", ""))]
    if next(model.parameters()).device.type != "cpu":
        flash = []
    named = [one._attn_implementation for one in flash]
    for one in flash:
        one._attn_implementation = PORTABLE
    try:
        yield
    finally:
        for one, name in zip(flash, named, strict=True):
            one._attn_implementation = name
