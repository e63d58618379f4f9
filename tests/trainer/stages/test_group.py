from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.contract import InputRefused, Lora, StageSpec
from trainer.models import find_family
from trainer.stages.group import Group, apply_stage, assign_groups, trainable_table
from trainer.stages.lora import find_modules

NAMES = ["a.x", "a.y", "b.x"]


def test_each_parameter_is_in_one_group() -> None:
    assert assign_groups({"one": r"^a\.", "two": r"b\."}, NAMES) == {"a.x": "one", "a.y": "one", "b.x": "two"}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"one": r"^a\."}, r"b\.x is in no group"),
        ({"one": r"^a\.", "two": r"^[ab]\.x"}, r"a\.x is in one and two"),
        ({"one": "", "two": r"^c\."}, r"two: '\^c\\\\\.' matches no parameter"),
        ({"one": "x", "two": "^a"}, r"b\.x is in no group.*one: 'x' matches no parameter"),
    ],
)
def test_groups_that_do_not_part_the_model_are_refused(groups: dict[str, str], said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        assign_groups(groups, NAMES)


def test_a_tied_head_has_no_parameter_of_its_own() -> None:
    assert set(assign_groups({"lm": "", "head": "^lm_head"}, NAMES).values()) == {"lm"}


def stage(spec: Any, *trainable: str, lora: Lora | None = None) -> Any:
    return replace(spec, stage=StageSpec(name="s", kind="train", trainable=trainable, lora=lora))


@pytest.fixture
def model(tiny_spec: Any) -> tuple[torch.nn.Module, Any, frozenset[str]]:
    spec = tiny_spec()
    made = find_family("llava").create(spec.model)
    return made, spec, find_family("llava").unused(made)


@pytest.mark.parametrize("trainable", [("projector",), ("projector", "lm", "head"), ("vision", "projector", "lm", "head")])
def test_only_the_groups_of_the_stage_get_gradients(trainable: tuple[str, ...], model: Any) -> None:
    made, spec, unused = model
    staged = apply_stage(made, stage(spec, *trainable), unused)
    prefixes = {
        "vision": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "lm": "model.language_model.",
        "head": "lm_head.",
    }
    for name, parameter in staged.model.named_parameters():
        assert parameter.requires_grad == (name not in unused and any(name.startswith(prefixes[group]) for group in trainable))
    by_name = {group.name: group for group in staged.groups}
    assert sum(group.parameters for group in staged.groups) == sum(p.numel() for p in made.parameters())
    assert sum(group.trainable for group in staged.groups) == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert all(group.trainable == 0 for name, group in by_name.items() if name not in trainable)
    assert (by_name["vision"].unused > 0) == ("vision" in trainable)


def test_a_group_that_the_model_lacks_is_refused(model: Any) -> None:
    made, spec, unused = model
    with pytest.raises(InputRefused, match="the model has no group audio; it has vision, projector, lm, head"):
        apply_stage(made, stage(spec, "audio"), unused)


def test_a_stage_that_trains_nothing_is_refused(model: Any) -> None:
    made, spec, unused = model
    with pytest.raises(InputRefused, match="stage s trains no parameter"):
        apply_stage(made, stage(spec), unused)


def test_lora_is_in_the_language_model_alone_and_may_train_groups_whole(model: Any) -> None:
    made, spec, unused = model
    before = sum(p.numel() for p in made.parameters())
    staged = apply_stage(made, stage(spec, "projector", lora=Lora(r=2, alpha=4, dropout=0.0, targets=("q_proj", "up_proj"))), unused)
    trained = {name: p.numel() for name, p in staged.model.named_parameters() if p.requires_grad}
    adapters = {name: size for name, size in trained.items() if ".lora_" in name}
    assert all(".language_model." in name for name in adapters)
    assert sum(adapters.values()) == 2 * (2 * (32 + 32) + 2 * (32 + 64))
    assert all(".multi_modal_projector.modules_to_save.default." in name for name in trained.keys() - adapters.keys())
    by_name = {group.name: group for group in staged.groups}
    assert by_name["lora"] == Group(name="lora", parameters=sum(adapters.values()), trainable=sum(adapters.values()))
    assert by_name["projector"].trainable == sum(trained.values()) - sum(adapters.values())
    assert sum(group.parameters for group in staged.groups) - by_name["lora"].parameters == before


def test_a_target_that_is_no_linear_layer_is_refused(model: Any) -> None:
    made, spec, unused = model
    with pytest.raises(
        InputRefused, match=r"no linear layer fc1, qkv; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        apply_stage(made, stage(spec, lora=Lora(r=2, alpha=4, dropout=0.0, targets=("q_proj", "fc1", "qkv"))), unused)


def test_a_bare_parameter_cannot_train_whole_beside_lora(model: Any) -> None:
    made, _, _ = model
    tower = "model.vision_tower.embeddings"
    names = {f"{tower}.{name}" for name, _ in made.get_submodule(tower).named_parameters()}
    assert find_modules(made, names) == (tower,)
    with pytest.raises(InputRefused, match="class_embedding are not whole modules"):
        find_modules(made, {f"{tower}.class_embedding"})


def test_the_table_says_what_stays_frozen_and_why() -> None:
    lines: list[str] = []
    trainable_table(
        [Group(name="vision", parameters=1000, trainable=600, unused=400), Group(name="lm", parameters=5, trainable=5)], lines.append
    )
    assert lines[1].split()[:3] == ["vision", "1,000", "600"]
    assert "400 do not affect the output" in lines[1]
    assert lines[2].split() == ["lm", "5", "5"]
