"""Adapters in the language model alone, of every family."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.stages.tiny import MODELS, tiny_model_spec
from trainer.checkpoint.resume import load_adapter
from trainer.contract import InputRefused, Lora, StageSpec, TrainSpec
from trainer.models import find_family
from trainer.stages.adapter import merge_adapter
from trainer.stages.adapter_layout import base_name
from trainer.stages.group import Staged, apply_stage
from trainer.stages.lora import ADAPTER, find_targets

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # those of conf/stage/lora.yaml


def lora(*targets: str, base: str = "") -> StageSpec:
    settings = Lora(r=2, alpha=4, dropout=0.0, targets=targets, base=base)  # type: ignore[arg-type]
    return StageSpec(name="lora", kind="train", trainable=(), lora=settings)


def staged(tiny_spec: Any, model: str, stage: StageSpec) -> tuple[Staged, TrainSpec]:
    spec = replace(tiny_spec(model), model=tiny_model_spec(model), stage=stage)
    family = find_family(spec.model.family)
    made = family.create(spec.model)
    return apply_stage(made, spec, family.unused(made)), spec


def wrapped(made: Staged) -> set[str]:
    """Names, before peft, of the layers that have an adapter."""
    return {base_name(name).partition(ADAPTER)[0] for name, _ in made.model.named_parameters() if ADAPTER in name}


@pytest.mark.parametrize("model", MODELS)
def test_adapters_are_in_the_language_model_alone(model: str, tiny_spec: Any) -> None:
    """Towers have layers of these names, too: CLIP's and SigLIP's q_proj, Qwen's up_proj."""
    made, spec = staged(tiny_spec, model, lora(*NAMES))
    names = wrapped(made)
    assert names and all(re.match(spec.model.groups["lm"], f"{name}.weight") for name in names)
    assert {name.rpartition(".")[2] for name in names} == set(NAMES)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained and all(ADAPTER in name for name in trained)


@pytest.mark.parametrize("model", MODELS)
def test_a_regex_chooses_among_whole_names_and_stays_in_the_language_model(model: str, tiny_spec: Any) -> None:
    made, spec = staged(tiny_spec, model, lora(r"re:.*\.layers\.1\..*"))
    names = wrapped(made)
    assert names and all(re.match(spec.model.groups["lm"], f"{name}.weight") and ".layers.1." in name for name in names)
    assert "v_proj" in {name.rpartition(".")[2] for name in names}


def test_names_and_regexes_go_together(tiny_spec: Any) -> None:
    made, _ = staged(tiny_spec, "tiny_llava", lora("down_proj", r"re:.*\.layers\.0\.self_attn\.q_proj"))
    assert {name.rpartition(".")[2] for name in wrapped(made)} == {"down_proj", "q_proj"}
    assert sum(name.endswith("q_proj") for name in wrapped(made)) == 1


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ((), r"names no layer of the language model; it has down_proj, gate_proj"),
        (("q_proj", "qkv"), r"no linear layer qkv; it has .* \(a regex is matched against full names, as model\.language_model\.layers\.0"),
        (("re:q_proj",), r"no linear layer re:q_proj; it has"),
        ((r"re:.*vision_tower.*q_proj",), r"no linear layer re:\.\*vision_tower"),
        (("re:(",), r"'re:\(' is not a regular expression"),
    ],
)
def test_a_target_without_effect_is_refused(targets: tuple[str, ...], said: str, tiny_spec: Any) -> None:
    spec = replace(tiny_spec(), model=tiny_model_spec("tiny_llava"))
    with pytest.raises(InputRefused, match=said):
        find_targets(find_family("llava").create(spec.model), targets, spec.model.groups["lm"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="says what to do where bitsandbytes is missing")
def test_four_bits_without_their_package_are_refused(tiny_spec: Any) -> None:
    with pytest.raises(InputRefused, match=r"stage\.lora\.base=nf4: the package bitsandbytes is not installed here"):
        staged(tiny_spec, "tiny_llava", lora("q_proj", base="nf4"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which the CPU's lock leaves out")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of bitsandbytes' own imports
@pytest.mark.parametrize("model", MODELS)
def test_the_language_models_layers_are_packed_and_its_adapters_learn(model: str, tiny_spec: Any) -> None:
    import bitsandbytes

    made, spec = staged(tiny_spec, model, lora("q_proj", "down_proj", base="nf4"))
    made.model.to("cpu")  # where a layer is packed as it is moved
    packed = {base_name(f"{name}.weight") for name, m in made.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert packed and all(re.match(spec.model.groups["lm"], name) for name in packed)
    layers = [m for m in made.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad for layer in layers)
    made.model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    reached = {name for name, p in made.model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in made.model.named_parameters() if p.requires_grad}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which the CPU's lock leaves out")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of bitsandbytes' own imports
@pytest.mark.parametrize("model", MODELS)
def test_the_tower_can_be_packed_too(model: str, tiny_spec: Any) -> None:
    import bitsandbytes

    stage = lora("q_proj", base="nf4")
    assert stage.lora is not None
    made, spec = staged(tiny_spec, model, replace(stage, lora=replace(stage.lora, base_groups=("lm", "vision"))))
    made.model.to("cpu")
    packed = {base_name(f"{name}.weight") for name, m in made.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    groups = {group for group, regex in spec.model.groups.items() if any(re.match(regex, name) for name in packed)}
    assert groups == {"lm", "vision"}


def test_a_group_that_is_trained_is_not_packed(tiny_spec: Any) -> None:
    stage = lora("q_proj", base="nf4")
    assert stage.lora is not None
    trained = replace(stage, trainable=("vision",), lora=replace(stage.lora, base_groups=("lm", "vision")))
    with pytest.raises(InputRefused, match=r"stage\.lora\.base_groups: vision is trained whole, which is not possible in nf4"):
        staged(tiny_spec, "tiny_llava", trained)


def test_an_adapter_of_another_model_is_refused_in_a_few_lines(tiny_spec: Any, tmp_path: Path) -> None:
    """Where nothing tells before: an adapter from elsewhere, whose base_model_name_or_path leads to another model."""
    own, _ = staged(tiny_spec, "tiny_llava", lora(r"re:.*\.layers\.0\..*(q_proj|v_proj)"))
    own.model.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    other, spec = staged(tiny_spec, "tiny_qwen2_5_vl", lora(r"re:.*\.layers\.0\..*(q_proj|v_proj)"))
    plain = find_family(spec.model.family).create(spec.model)
    for take in (lambda: merge_adapter(plain, tmp_path), lambda: load_adapter(other.model, tmp_path)):
        with pytest.raises(InputRefused) as caught:
            take()
        said = str(caught.value)
        assert f"stage.checkpoint: the adapter {tmp_path} does not fit its base" in said
        assert said.count("size mismatch") == 2 and "Name the model that it was trained on in stage.base" in said
