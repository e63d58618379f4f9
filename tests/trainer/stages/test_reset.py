"""A group that is reset, in every family."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.stages.tiny import MODELS, tiny_model_spec
from trainer.contract import InputRefused, StageSpec, TrainSpec
from trainer.models import find_family
from trainer.stages.reset import reset_groups


def spec_for(tiny_spec: Any, model: str, *reset: str, trainable: tuple[str, ...] = ("projector",), seed: int = 0) -> TrainSpec:
    stage = StageSpec(name="projector", kind="train", trainable=trainable, reset=reset)
    spec = tiny_spec(f"{model}-{seed}-{len(reset)}")
    return replace(spec, model=tiny_model_spec(model), stage=stage, seed=seed)


def made(spec: TrainSpec) -> torch.nn.Module:
    """A model as it comes out of a checkpoint: its tensors carry the mark that keeps transformers from drawing them again."""
    torch.manual_seed(7)
    model = find_family(spec.model.family).create(spec.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            parameter._is_hf_initialized = True
    return model


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_the_group_is_drawn_from_the_seed_and_nothing_else_moves(model: str, tiny_spec: Any) -> None:
    spec = spec_for(tiny_spec, model, "projector")
    first, again, other = (made(spec) for _ in range(3))
    before, random = state_of(first), torch.get_rng_state()
    reset_groups(first, spec)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(99)
    reset_groups(again, spec)
    reset_groups(other, replace(spec, seed=1))
    a, b, c = state_of(first), state_of(again), state_of(other)
    group = {name for name in before if re.match(spec.model.groups["projector"], name)}
    assert {name for name in before if not torch.equal(before[name], a[name])} == group
    assert all(torch.equal(a[name], b[name]) for name in before)
    matrices = {name for name in group if before[name].ndim >= 2}
    assert matrices == {name for name in group if not torch.equal(a[name], c[name])}, "norms and biases begin as ones and zeros"


@pytest.mark.parametrize("model", MODELS)
def test_it_begins_as_a_random_start_does(model: str, tiny_spec: Any) -> None:
    """The same spread of each matrix as transformers gives it, and the very same norms and biases."""
    spec = spec_for(tiny_spec, model, "projector")
    torch.manual_seed(7)
    fresh, reset = find_family(spec.model.family).create(spec.model), made(spec)
    reset_groups(reset, spec)
    for (name, a), b in zip(fresh.named_parameters(), reset.parameters(), strict=True):
        if not re.match(spec.model.groups["projector"], name):
            continue
        if a.ndim < 2:
            assert torch.equal(a, b), name
        else:
            assert float(b.detach().std()) == pytest.approx(float(a.detach().std()), rel=0.25), name


def test_one_seed_gives_one_start_in_every_precision(tiny_spec: Any) -> None:
    spec = spec_for(tiny_spec, "tiny_llava", "projector")
    wide, narrow = made(spec), made(spec).to(torch.bfloat16)
    reset_groups(wide, spec)
    reset_groups(narrow, spec)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        if name.startswith("model.multi_modal_projector."):
            assert torch.equal(a.to(torch.bfloat16), b)


@pytest.mark.parametrize(
    ("reset", "trainable", "said"),
    [
        (("audio",), ("projector",), r"stage\.reset: the model has no group audio; it has vision, projector, lm, head"),
        (("vision",), ("projector",), r"stage\.reset: vision would be drawn again and never trained: add it to stage\.trainable"),
    ],
)
def test_what_cannot_be_reset(reset: tuple[str, ...], trainable: tuple[str, ...], said: str, tiny_spec: Any) -> None:
    spec = spec_for(tiny_spec, "tiny_llava", *reset, trainable=trainable)
    with pytest.raises(InputRefused, match=said):
        reset_groups(made(spec), spec)


def test_a_parameter_without_a_rule_is_refused(tiny_spec: Any) -> None:
    spec = spec_for(tiny_spec, "tiny_llava", "projector")
    model = made(spec)
    model.model.multi_modal_projector.linear_1.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(InputRefused, match=r"no rule to initialize model\.multi_modal_projector\.linear_1\.gate"):
        reset_groups(model, spec)
