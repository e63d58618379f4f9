"""For every family: the chunked loss, gradient checkpointing, and norms in float16 and bfloat16."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.trainer.kernels.test_cross_entropy import assert_equal
from tests.trainer.models.conftest import Made, to_arguments
from trainer.contract import InputRefused
from trainer.data.batch.collate import collate
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.kernels.cross_entropy import find_head
from trainer.stages.gradient_checkpointing import checkpoint_layers

Forward = tuple[Callable[[], Tensor], Tensor]


def prepare(made: Made, model: Any, samples: tuple[Sample, ...]) -> Forward:
    """A forward pass to the logits at positions in the loss, as in Engine.loss_sum, and their targets."""
    batch = collate(samples, made.processor, made.spec)
    in_loss = batch["labels"][:, 1:] != IGNORED
    positions = torch.nn.functional.pad(in_loss, (0, 1))
    arguments = to_arguments(batch, "labels")
    return lambda: model(**arguments, logits_to_keep=positions, use_cache=False).logits, batch["labels"][:, 1:][in_loss]


def test_the_chunked_loss_equals_the_plain_one(tiny: Made, samples: tuple[Sample, ...]) -> None:
    run, targets = prepare(tiny, tiny.model, samples)
    assert isinstance(find_head(tiny.model), torch.nn.Linear) and len(targets) > 8
    assert_equal(tiny.model, run, targets, 4)
    tiny.model.zero_grad()


@contextmanager
def training(model: torch.nn.Module) -> Iterator[None]:
    """Restores the shared model at the end."""
    model.train()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]
        model.zero_grad()
        model.eval()


@pytest.mark.parametrize(("every", "groups"), [(1, ()), (2, ("lm",)), (1, ("vision",))])
def test_checkpointed_layers_have_the_same_gradients(every: int, groups: tuple[str, ...], tiny: Made, samples: tuple[Sample, ...]) -> None:
    spec = replace(tiny.spec, gradient_checkpointing=True, checkpoint_every=every, checkpoint_groups=groups)
    run, targets = prepare(tiny, tiny.model, samples)
    with training(tiny.model):
        plain = gradients(tiny.model, run, targets)
        chosen = checkpoint_layers(tiny.model, spec)
        passes: list[str] = []
        hooks = [
            child.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
            for name in chosen
            for child in [next(iter(tiny.model.get_submodule(name).children()))]
        ]
        checkpointed = gradients(tiny.model, run, targets)
        for hook in hooks:
            hook.remove()
    reached = [name for name in chosen if any(parameter.startswith(f"{name}.") for parameter in plain)]
    assert reached and {name: passes.count(name) for name in reached} == dict.fromkeys(reached, 2)
    assert plain.keys() == checkpointed.keys() and all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    if groups:
        assert all(re.match(tiny.spec.model.groups[groups[0]], f"{name}.") for name in chosen)
        others = [name for name, module in tiny.model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
        assert len(chosen) < len(others)


def gradients(model: torch.nn.Module, run: Callable[[], Tensor], targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.nn.functional.cross_entropy(run(), targets, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_group_without_layers_is_refused(make_tiny: Callable[[str], Made]) -> None:
    made = make_tiny("tiny_llava")
    with pytest.raises(InputRefused, match=r"strategy.checkpoint_groups: head has no layers .* vision and lm have"):
        checkpoint_layers(made.model, replace(made.spec, checkpoint_groups=("head",)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_compute_in_float32(dtype: torch.dtype, tiny: Made) -> None:
    """transformers' RMSNorm converts to float32, torch's layer_norm accumulates in float32. Compared with the same norm in float32, for inputs
    whose squares overflow float16, only the rounding of the result remains, and that of RMSNorm before its weight."""
    torch.manual_seed(0)
    kinds = {type(module): module for module in tiny.model.modules() if "Norm" in type(module).__name__}
    assert kinds
    for kind, module in kinds.items():
        exact = copy.deepcopy(module).float()
        for parameter in exact.parameters():
            parameter.data = torch.randn_like(parameter).to(dtype).float()
        rounded = copy.deepcopy(exact).to(dtype)
        width = next(iter(exact.parameters())).shape[-1]
        inputs = (torch.randn(16, width) * 300).to(dtype)
        gate = (inputs,) if "gate" in inspect.signature(module.forward).parameters else ()
        found = rounded(inputs, *gate).detach().float()
        wanted = exact(inputs.float(), *(each.float() for each in gate)).detach()
        ulp = torch.finfo(dtype).eps
        error = float(((found - wanted).abs() / (wanted.abs() + wanted.abs().max() * 0.05)).max())
        print(kind.__name__, dtype, f"{error / ulp:.2f} ulp")
        assert error <= 1.6 * ulp, kind
