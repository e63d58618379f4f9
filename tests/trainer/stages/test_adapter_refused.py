"""Stages that continue with an adapter of any origin, and adapters that are refused."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import Made, make_tiny  # noqa: F401
from tests.trainer.peft_adapter import (
    load,
    logits_of,
    merged_logits,
    rename,
    train_by_peft,
    write_config,
)
from trainer.checkpoint.lineage import find_lineage
from trainer.checkpoint.resume import continue_adapter
from trainer.contract import InputRefused, Lora, StageSpec
from trainer.stages.adapter import merge_adapter
from trainer.stages.adapter_layout import read_layout
from trainer.stages.adapter_probe import refuse_idle_logits
from trainer.stages.group import apply_stage

Make = Callable[[str], Made]

# ------------------------------------------------------------------------------------------------ a stage continues with it


def continued(made: Made, folder: Path, *trainable: str, **settings: Any) -> torch.nn.Module:
    lora = Lora(**{"r": 4, "alpha": 8, "dropout": 0.0, "targets": ("q_proj", "up_proj"), **settings})
    spec = replace(made.spec, stage=StageSpec(name="lora", kind="train", trainable=trainable, lora=lora, checkpoint=str(folder)))
    model = load(made)
    layout = read_layout(folder, model)
    staged = apply_stage(model, spec, made.family.unused(model), layout).model
    continue_adapter(staged, layout)
    return staged.eval()


@pytest.mark.parametrize("settings", ({}, {"use_dora": True}, {"target_modules": "all-linear"}, {"rank_pattern": {"q_proj": 2}}), ids=str)
def test_a_lora_stage_continues_with_all_of_an_adapter_from_elsewhere(
    settings: dict[str, Any],
    make_tiny: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Its own targets say less than the adapter has: what is in the tower is trained on too, and saved again."""
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path / "adapter", **settings)
    model = continued(made, tmp_path / "adapter")
    assert torch.allclose(logits_of(model, made), wanted, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained) and any(".visual." in name for name in trained)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)  # type: ignore[operator]
    write_config(tmp_path / "again", base_model_name_or_path=str(made.folder))
    assert torch.allclose(merged_logits(made, tmp_path / "again"), wanted, atol=2e-4)


def test_our_own_adapter_is_wrapped_as_it_was_when_it_was_trained(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """The same targets in the config of peft, so that what is saved is bitwise what it was."""
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path, target_modules=r"(?=^model\.language_model\.).*\.(?:q_proj|up_proj)")
    model = continued(made, tmp_path)
    assert model.peft_config["default"].target_modules == r"(?=^model\.language_model\.).*\.(?:q_proj|up_proj)"  # type: ignore[index,union-attr]


def test_modules_that_the_stage_would_not_save_are_refused(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path, modules_to_save=["visual.merger"], target_modules=["q_proj", "up_proj"])
    with pytest.raises(InputRefused, match=r"trained whole, model\.visual\.merger\..*Add their group to stage\.trainable, or merge"):
        continued(made, tmp_path)
    model = continued(made, tmp_path, "projector")
    assert any("merger" in name and "modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    train_by_peft(made, tmp_path / "plain", target_modules=["q_proj", "up_proj"])
    with pytest.raises(InputRefused, match=r"other trained parameters than this stage has, as model\.visual\.merger"):
        continued(made, tmp_path / "plain", "projector")


# ----------------------------------------------------------------------------------------------------------- what is refused


def test_a_key_of_no_module_is_refused_with_what_was_looked_for(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path)
    rename(tmp_path, ("model.language_model.layers.", "model.decoder.blocks."), ("model.visual.", "model.visual."))
    with pytest.raises(InputRefused) as caught:
        merge_adapter(load(made), tmp_path)
    said = str(caught.value)
    assert "8 tensors of the adapter" in said and " and 5 more. Looked for: model.decoder.blocks.0." in said
    assert said.count("lora_") == 3 and ", which has model." in said and "stage.base=FOLDER" in said


def test_an_adapter_with_other_shapes_is_refused_in_a_few_lines(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made, other = make_tiny("tiny_qwen2_5_vl"), make_tiny("tiny_llava")
    train_by_peft(other, tmp_path, target_modules=r".*language_model.*layers\.0.*(q_proj|v_proj)")
    with pytest.raises(InputRefused, match=r"does not fit its base: .*size mismatch.*stage\.base") as caught:
        merge_adapter(load(made), tmp_path)
    assert str(caught.value).count("size mismatch") == 2


IDLE = {
    "zero B": lambda tensors: {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in tensors.items()},
    "zero A": lambda tensors: {key: tensor * 0 if "lora_A" in key else tensor for key, tensor in tensors.items()},
    "too small": lambda tensors: {key: tensor * 1e-30 for key, tensor in tensors.items()},
}


@pytest.mark.parametrize("harm", IDLE)
def test_an_adapter_that_did_nothing_is_refused(harm: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(IDLE[harm](load_file(file)), file)
    with pytest.raises(InputRefused, match=r"did nothing: (B A is zero in all 9 modules|with and without it the logits)"):
        merged_logits(made, tmp_path)


def test_an_adapter_of_layers_that_the_output_does_not_use_did_nothing(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """LLaVA takes the features of an inner layer of its tower."""
    made = make_tiny("tiny_llava")
    last = max(
        int(found[1]) for name, _ in load(made).named_modules() if (found := re.fullmatch(r"model\.vision_tower\..*layers\.(\d+)", name))
    )
    train_by_peft(made, tmp_path, target_modules=rf".*vision_tower.*layers\.{last}\..*fc1")
    with pytest.raises(InputRefused, match=r"did nothing: with and without it the logits of tiny_llava are bitwise identical"):
        merged_logits(made, tmp_path)


def test_the_probe_leaves_the_model_and_the_random_numbers_as_they_were(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path)
    states = []
    for probe in (None, partial(refuse_idle_logits, spec=made.spec, processor=made.processor)):
        torch.manual_seed(3)
        model = merge_adapter(load(made).train(), tmp_path, probe)
        states.append((model.state_dict(), torch.get_rng_state(), model.training))
    (plain, before, training), (probed, after, still) = states
    assert torch.equal(before, after) and training == still and plain.keys() == probed.keys()
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"peft_type": "OFT"}, "peft_type is 'OFT'"),
        ({"use_dora": True}, "use_dora is set, and there is no magnitude"),
        ({"use_merged_linear": True}, "use_merged_linear is True"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters is"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ),
)
def test_another_kind_is_refused_by_name(changes: dict[str, Any], said: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(InputRefused, match=said):
        merge_adapter(load(made), tmp_path)


@pytest.mark.parametrize("harm", ("half", "unknown", "empty", "text", "list"))
def test_a_broken_adapter_is_refused(harm: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path)
    file, tensors = tmp_path / "adapter_model.safetensors", load_file(tmp_path / "adapter_model.safetensors")
    if harm == "half":
        tensors.pop(next(key for key in tensors if "lora_B" in key))
    elif harm == "unknown":
        tensors["base_model.model.model.visual.blocks.0.attn.qkv.hada_w1_a"] = torch.ones(2)
    elif harm == "empty":
        tensors = {}
    else:
        (tmp_path / "adapter_config.json").write_text("{" if harm == "text" else "[]", encoding="utf-8")
    save_file(tensors, file)
    said = {
        "half": "only one of its two factors",
        "unknown": "cannot be read, only LoRA",
        "empty": "no tensors",
        "text": "no JSON file",
        "list": "no JSON object",
    }
    with pytest.raises(InputRefused, match=said[harm]):
        merge_adapter(load(made), tmp_path)


# ----------------------------------------------------------------------------------------------------------------- its base


def test_a_base_that_is_named_by_an_id_or_moved_is_given_in_stage_base(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    train_by_peft(made, tmp_path / "adapter")
    stage = StageSpec(name="evaluate", kind="evaluate", trainable=(), checkpoint=str(tmp_path / "adapter"))
    spec = replace(made.spec, stage=stage)
    for named, said in (
        ("Qwen/Qwen2.5-VL-7B-Instruct", r"omnilaunch model fetch Qwen/Qwen2.5-VL-7B-Instruct --to FOLDER; then stage\.base=FOLDER"),
        (
            "unsloth/qwen2.5-vl-7b-instruct-unsloth-bnb-4bit",
            r"a copy in 4 bits. Name the folder of the same model in 16 bits: stage\.base=FOLDER",
        ),
        ("/gone/base", r"its base /gone/base is not there. Name the folder that has it now: stage\.base=FOLDER"),
        (None, r"names no base. Name the folder .*stage\.base=FOLDER"),
    ):
        write_config(tmp_path / "adapter", base_model_name_or_path=named)
        with pytest.raises(InputRefused, match=said):
            find_lineage(spec, tmp_path / "adapter")
        found = find_lineage(replace(spec, stage=replace(stage, base=str(made.folder))), tmp_path / "adapter")
        assert found.base == str(made.folder)
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(InputRefused, match=r"the base of .* is itself an adapter"):
        find_lineage(replace(spec, stage=replace(stage, base=str(tmp_path / "other"))), tmp_path / "adapter")
