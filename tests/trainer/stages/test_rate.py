"""Groups that learn at a rate of their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.cell import read_rows, run_cell
from trainer.contract import InputRefused, Lora, StageSpec, TrainSpec
from trainer.distributed.engine import RATE_FACTOR, group_parameters
from trainer.models import find_family
from trainer.stages.group import Staged, apply_stage

PROJECTOR = "model.multi_modal_projector."


def staged(spec: TrainSpec) -> Staged:
    family = find_family("llava")
    model = family.create(spec.model)
    return apply_stage(model, spec, family.unused(model))


def with_rates(spec: TrainSpec, stage: StageSpec, **rates: float) -> TrainSpec:
    return replace(spec, stage=stage, optimizer=replace(spec.optimizer, lr=1e-3, weight_decay=0.1, group_lr=rates))


def test_rates_are_those_of_the_groups_over_the_schedules(tiny_spec: Any) -> None:
    stage = StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head"))
    made = staged(with_rates(tiny_spec(), stage, projector=2e-3, vision=1e-4))
    assert {name.split(".")[1]: rate for name, rate in made.rates.items()} == {
        "multi_modal_projector": pytest.approx(2.0),
        "vision_tower": pytest.approx(0.1),
    }
    assert set(made.rates) <= {name for name, p in made.model.named_parameters() if p.requires_grad}


def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay(tiny_spec: Any) -> None:
    spec = with_rates(tiny_spec(), StageSpec(name="lm", kind="train", trainable=("projector", "lm", "head")), projector=2e-3)
    made = staged(spec)
    names = {id(p): name for name, p in made.model.named_parameters() if p.requires_grad}
    seen = []
    for decay in (0.1, 0.0):
        for group in group_parameters(made.model, replace(spec.optimizer, weight_decay=decay), made.rates):
            for parameter in group["params"]:
                assert group[RATE_FACTOR] == pytest.approx(2.0 if names[id(parameter)].startswith(PROJECTOR) else 1.0)
                assert group["weight_decay"] == (decay if parameter.ndim >= 2 else 0.0)
                seen.append(names[id(parameter)])
    assert sorted(seen) == sorted([*names.values()] * 2)


def test_adapters_take_the_schedules_rate(tiny_spec: Any) -> None:
    """ms-swift's lora_llm_full_vit: adapters at 1e-4, what is trained whole at 1e-5."""
    lora = Lora(r=2, alpha=4, dropout=0.0, targets=("q_proj",))
    made = staged(with_rates(tiny_spec(), StageSpec(name="lora", kind="train", trainable=("projector",), lora=lora), projector=1e-4))
    assert made.rates and all(".modules_to_save." in name and rate == pytest.approx(0.1) for name, rate in made.rates.items())


def test_a_rate_without_effect_is_refused(tiny_spec: Any) -> None:
    with pytest.raises(InputRefused, match=r"group_lr: this stage does not train lm; it trains projector"):
        staged(with_rates(tiny_spec(), StageSpec(name="projector", kind="train", trainable=("projector",)), lm=1e-4))


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_engine_steps_each_group_at_its_rate(zero: int, tiny_spec: Any, process_group: Any) -> None:
    """Adam's first step moves a weight by the learning rate, wherever its gradient is far from zero."""
    stage = StageSpec(name="lm", kind="train", trainable=("projector", "lm", "head"))
    spec = with_rates(tiny_spec(zero=zero), stage, projector=4e-3)
    spec = replace(spec, optimizer=replace(spec.optimizer, weight_decay=0.0))
    torch.manual_seed(spec.seed)
    before = {name: p.detach().numpy() for name, p in find_family("llava").create(spec.model).named_parameters()}
    outcome = run_cell(spec, read_rows(spec), 0)
    assert outcome.weights
    moved = {name: float(abs(after - before[name]).max()) for name, after in outcome.weights.items()}
    for name, most in moved.items():
        assert most == pytest.approx(4e-3 if name.startswith(PROJECTOR) else 1e-3, rel=1e-2), name
