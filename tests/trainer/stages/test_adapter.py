"""An adapter of any origin on its base: the logits are those that peft gave when it was trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.models.conftest import Made, make_tiny  # noqa: F401
from tests.trainer.peft_adapter import (
    OLDER,
    assert_equal,
    load,
    logits_of,
    merged_logits,
    rename,
    train_by_peft,
    write_config,
)
from trainer.stages.adapter import merge_adapter
from trainer.stages.adapter_layout import read_layout

Make = Callable[[str], Made]


@pytest.mark.parametrize("name", [*OLDER, "tiny_minicpm_v_4_6", "tiny_minicpm_v_2_6"])
def test_an_adapter_of_tower_projector_and_language_model(name: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny(name)
    wanted = train_by_peft(made, tmp_path)
    layout = read_layout(tmp_path, load(made))
    groups = {group for group, regex in made.spec.model.groups.items() for name in layout.factors if re.match(regex, f"{name}.weight")}
    assert {"vision", "lm"} <= groups
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))


@pytest.mark.parametrize("name", OLDER)
def test_names_of_older_versions_land_on_the_same_modules(name: str, make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """Its target_modules also name layers of the tower by their leaf, as in most published configs: today they would be wrapped and left untrained."""
    made = make_tiny(name)
    wanted = train_by_peft(made, tmp_path)
    before = set(read_layout(tmp_path, load(made)).factors)
    rename(tmp_path, *OLDER[name])
    write_config(tmp_path, target_modules=["q_proj", "k_proj", "up_proj", "qkv", "fc1", "linear_1", "out_proj"])
    assert set(read_layout(tmp_path, load(made)).factors) == before
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))


@pytest.mark.parametrize(
    "settings",
    (
        {"target_modules": "all-linear"},
        {"use_dora": True},
        {"use_rslora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["visual.merger"], "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
        {"exclude_modules": r".*visual.*", "target_modules": ["qkv", "q_proj", "up_proj"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"bias": "all", "target_modules": ["q_proj"]},
    ),
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor", "ignore:Careful, disabling adapter layers")
def test_variants_give_the_logits_of_training(settings: dict[str, Any], make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path, **settings)
    rename(tmp_path, *OLDER["tiny_qwen2_5_vl"])
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))


@pytest.mark.parametrize(
    "settings",
    (
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True},
    ),
    ids=("lora-head", "lora-embeddings", "whole-head", "whole-both", "kept-tied"),
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer tied")
def test_a_tied_head_is_changed_where_training_changed_it(settings: dict[str, Any], make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    made = make_tiny("tiny_minicpm_v_4_6")
    assert load(made).config.text_config.tie_word_embeddings or load(made).config.tie_word_embeddings
    wanted = train_by_peft(made, tmp_path / "adapter", **settings)
    merged = merge_adapter(load(made), tmp_path / "adapter")
    assert_equal(logits_of(merged, made), wanted, logits_of(load(made), made))
    merged.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    made.processor.save(tmp_path / "saved")
    again = made.family.load(tmp_path / "saved", made.spec.model, torch.float32).eval()
    assert torch.equal(logits_of(again, made), logits_of(merged, made)), "a full run that starts from it saves what it has"


# As each project writes adapter_config.json beside the tensors of peft; the rest of the fields are peft's own.
PEERS: dict[str, dict[str, Any]] = {
    # LLaMA-Factory 0.9.5, model/model_utils/visual.py: patch_target_modules: full names, of any layer whose name holds a target
    "llamafactory": {
        "target_modules": [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)],
        "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "task_type": "CAUSAL_LM",
    },
    # ms-swift 4.6.0, utils/transformers_utils.py: get_multimodal_target_regex; before 3.0 tuners/lora.py wrote its own fields into the same file
    "ms-swift": {
        "target_modules": r"^(language_model(?=\.).*\.(q_proj|k_proj|up_proj)|visual(?=\.).*\.(qkv))$",
        "base_model_name_or_path": "/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-VL-7B-Instruct",
        "swift_type": "LORA",
        "lora_dtype": "fp32",
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
        "model_key_mapping": None,
    },
    # TRL 1.16.0 gives the user's LoraConfig to peft; its documentation has all-linear, which peft resolves and saves as leaves
    "trl": {"target_modules": ["q_proj", "k_proj", "down_proj", "proj", "linear_fc1"], "task_type": "CAUSAL_LM", "revision": None},
    # Unsloth 2026.10.9, unsloth_zoo/peft_utils.py: get_peft_regex, and hf_utils.py: fix_lora_auto_mapping
    "unsloth": {
        "target_modules": r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|qkv|up_proj))",
        "auto_mapping": {"base_model_class": "Qwen2_5_VLForConditionalGeneration", "parent_library": "transformers", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/qwen2.5-vl-7b-instruct-unsloth-bnb-4bit",
        "task_type": None,
    },
}


@pytest.mark.parametrize("older", (True, False), ids=("older names", "names of today"))
@pytest.mark.parametrize("project", PEERS)
def test_the_config_of_a_peer_says_how_it_was_trained_and_not_what_it_changes(
    project: str,
    older: bool,
    make_tiny: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path)
    if older:
        rename(tmp_path, *OLDER["tiny_qwen2_5_vl"])
    write_config(tmp_path, **PEERS[project])
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))


def test_tensors_in_a_bin_file_with_the_adapters_own_name(make_tiny: Make, tmp_path: Path) -> None:  # noqa: F811
    """As peft before 0.7 saved, and as a state of ZeRO is turned into one file."""
    made = make_tiny("tiny_qwen2_5_vl")
    wanted = train_by_peft(made, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(
        {key.replace(".weight", ".default.weight"): tensor for key, tensor in load_file(file).items()}, tmp_path / "adapter_model.bin"
    )
    file.unlink()
    assert_equal(merged_logits(made, tmp_path), wanted, logits_of(load(made), made))
