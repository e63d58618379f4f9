"""Weights that no run of ours wrote: adapters and checkpoints of peft, TRL, LLaMA-Factory, ms-swift and Unsloth, as their files describe themselves."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.check.rules import check
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.local_context import for_this_machine
from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint
from launcher.record.checkpoint.swift_settings import load_table, make_template, read_swift
from trainer.contract.checkpoint_files import CheckpointState, find_state_file, whole_state
from trainer.contract.weight_files import MANIFEST_FILE

ROOT = Path(__file__).resolve().parents[4]
CONF, STACKS = ROOT / "conf", load_stacks(ROOT / "images")
QWEN = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 64, "vocab_size": 384}, "vision_config": {"hidden_size": 64}}
HUB = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN_7B = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584, "vocab_size": 152064, "num_hidden_layers": 28}}
# trainer_state.json of transformers' Trainer (trainer_callback.py, TrainerState), shortened
TRAINER_STATE = {"best_metric": None, "epoch": 1.0, "global_step": 5, "log_history": [{"loss": 1.0, "step": 5}], "max_steps": 5}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tensors(path: Path, *names: str) -> None:
    """Empty tensors: the plan reads headers only."""
    header = json.dumps({name: {"dtype": "F32", "shape": [0, 8], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_json(tmp_path / "base" / "config.json", QWEN)
    return tmp_path / "base"


Make = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path, base: Path) -> Make:
    """A folder checkpoint-5 of transformers' Trainer with an adapter. `named`: its base."""

    def make(named: str | None = None, layers: tuple[str, ...] = ("q_proj", "v_proj"), **config: Any) -> Path:
        folder = tmp_path / "out" / "checkpoint-5"
        said = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "^(visual|model).*$"}
        write_json(folder / "adapter_config.json", {**said, "base_model_name_or_path": str(base) if named is None else named, **config})
        write_json(folder / "trainer_state.json", TRAINER_STATE)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"")
        keys = (f"base_model.model.model.layers.0.self_attn.{layer}.lora_{part}.weight" for layer in layers for part in "AB")
        write_tensors(folder / "adapter_model.safetensors", *keys, "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight")
        return folder

    return make


def composed(tmp_path: Path, *words: str, **environ: str) -> Config:
    return compose_from_checkpoint(
        (f"cluster.root={tmp_path}", "data=digits", *words), CONF, tmp_path, {"HOME": str(tmp_path / "home"), **environ}
    )


def problems(config: Config) -> str:
    return "\n".join(f"{problem.key}: {problem.what}" for problem in check(config, STACKS).problems)


# ---------------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_from_elsewhere_says_its_model_and_its_settings(make_adapter: Make, tmp_path: Path) -> None:
    config = composed(tmp_path, "stage=lora", f"stage.checkpoint={make_adapter(use_rslora=True)}")
    assert config.model.name == "tiny_qwen2_5_vl" and config.stage.lora and config.stage.recorded
    lora = config.stage.lora
    assert (lora.r, lora.alpha, lora.rank_stabilised, lora.targets) == (8, 32, True, ("q_proj", "v_proj"))
    assert config.stage.recorded.adapter and config.stage.recorded.taken[0] == "model=tiny_qwen2_5_vl"
    assert problems(config) == ""


@pytest.mark.parametrize("stage", ("convert", "quantize"))
def test_stages_that_need_full_weights_are_refused_by_the_plan(stage: str, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter()
    said = problems(composed(tmp_path, f"stage={stage}", f"stage.checkpoint={folder}"))
    assert (
        f"the checkpoint (of tiny_qwen2_5_vl, from elsewhere) saved an adapter. Merge it first: omnilaunch launch stage=merge stage.checkpoint={folder}"
        in said
    )


def test_settings_that_the_stage_cannot_continue_are_refused_by_the_plan(make_adapter: Make, tmp_path: Path) -> None:
    said = problems(composed(tmp_path, "stage=lora", "stage.lora.r=4", f"stage.checkpoint={make_adapter()}"))
    assert "stage.lora: a LoRA stage continues with the adapter" in said and "r is 4, the adapter has 8" in said


def test_an_id_of_a_hub_is_found_where_this_machine_has_it(make_adapter: Make, tmp_path: Path) -> None:
    folder, fetched = make_adapter(HUB), tmp_path / "models" / "hub" / HUB
    write_json(fetched / "config.json", QWEN_7B)
    write_json(fetched / MANIFEST_FILE, {})
    config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", OMNILAUNCH_MODELS=str(tmp_path / "models"))
    assert config.model.name == "qwen2_5_vl_7b" and config.stage.base == str(fetched)
    assert config.stage.recorded and f"stage.base={fetched}" in config.stage.recorded.taken


def test_an_id_that_the_nodes_download_needs_no_folder(make_adapter: Make, tmp_path: Path) -> None:
    config = composed(tmp_path, "stage=evaluate", "model=qwen2_5_vl_7b", f"stage.checkpoint={make_adapter(HUB)}")
    assert config.model.name == "qwen2_5_vl_7b" and config.stage.base == "" and config.model.source.kind == "hub"


@pytest.mark.parametrize(
    ("named", "said"),
    (
        (
            "llava-hf/llava-1.5-7b-hf",
            r"an adapter of llava-hf/llava-1.5-7b-hf, which is not on this machine\. Fetch it: omnilaunch model fetch llava-hf",
        ),
        ("unsloth/qwen2.5-vl-7b-instruct-unsloth-bnb-4bit", r"a copy in 4 bits\. .*16 bits: stage\.base=FOLDER"),
        ("/moved/away", r"its base /moved/away is not there\. Name the folder that has it now: stage\.base=FOLDER"),
        ("", r"names no base\. Name the folder of the model that it was trained on: stage\.base=FOLDER"),
    ),
)
def test_a_base_that_is_not_here_is_asked_for(named: str, said: str, make_adapter: Make, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(named)
    with pytest.raises(ConfigRefused, match=said):
        composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", "model=tiny_qwen2_5_vl")
    for words in ([f"stage.base={base}"], [f"model.source.path={base}", "model.source.kind=path"]):
        config = composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", "model=tiny_qwen2_5_vl", *words)
        assert config.stage.base == str(base) and config.stage.recorded and config.stage.recorded.model == "tiny_qwen2_5_vl"


def test_the_base_is_mounted_and_copied_with_the_adapter(make_adapter: Make, base: Path, tmp_path: Path) -> None:
    words = ("stage=evaluate", f"stage.checkpoint={make_adapter('/gone')}", f"stage.base={base}", "cluster.runtime=docker")
    assert str(base) in composed(tmp_path, *words).cluster.mounts


def test_what_is_no_base_is_refused(make_adapter: Make, base: Path, tmp_path: Path) -> None:
    folder = make_adapter("/gone")
    with pytest.raises(ConfigRefused, match=r"stage\.base=.* is itself an adapter\. Merge it first"):
        composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", f"stage.base={folder}")
    with pytest.raises(ConfigRefused, match=r"stage\.base=nothing_like_it: there is no folder and no run"):
        composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", "stage.base=nothing_like_it")
    with pytest.raises(ConfigRefused, match=r"stage\.base=.* is the base of an adapter, and stage\.checkpoint=.* holds full weights"):
        composed(tmp_path, "stage=evaluate", f"stage.checkpoint={base}", f"stage.base={base}")


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("{", "is no JSON file"),
        ("[]", "holds no JSON object"),
        (json.dumps({"peft_type": "IA3"}), "peft_type is 'IA3', r is None .* only LoRA is read"),
    ),
)
def test_a_config_that_is_none_is_refused(text: str, said: str, make_adapter: Make, tmp_path: Path, base: Path) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match=said):
        composed(tmp_path, "stage=evaluate", f"stage.checkpoint={folder}", f"stage.base={base}")


# ------------------------------------------------------------------------------------------ checkpoint-N beside full weights


def test_a_checkpoint_of_transformers_trainer_is_a_model_and_no_run_of_ours(base: Path) -> None:
    write_json(base / "trainer_state.json", TRAINER_STATE)
    assert find_state_file(base) is None
    config = composed(base.parent, "stage=full", f"stage.checkpoint={base}", "model=tiny_qwen2_5_vl")
    assert config.stage.recorded is None and config.stage.checkpoint == str(base) and problems(config) == ""


def test_the_earlier_name_of_our_own_file_stays_readable(tmp_path: Path) -> None:
    folder = tmp_path / "step-000003"
    state = {"schema": 1, "step": 3, "weights_sha256": "", "data_sha256": "", "world_size": 0, "spec": {}, "files": {}}
    write_json(folder / "trainer_state.json", state)
    found = whole_state(folder)
    assert isinstance(found, CheckpointState) and found.step == 3
    write_json(folder / "omnilaunch_state.json", {**state, "run_id": "new"})
    assert find_state_file(folder) == folder / "omnilaunch_state.json"
    (folder / "omnilaunch_state.json").unlink()
    (folder / "trainer_state.json").write_text("{", encoding="utf-8")
    assert find_state_file(folder) is not None, "a broken one in a folder with the name of our own is reported, and not passed over"


# ----------------------------------------------------------------------------------------------------------------- ms-swift


def write_args(folder: Path, **args: Any) -> None:
    """args.json as BaseArguments.save_args of ms-swift 4.6.0 writes it, shortened."""
    said = {
        "model": HUB,
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "system": None,
        "tuner_type": "full",
        "swift_version": "4.6.0",
    }
    write_json(folder / "args.json", {**said, **args})


def test_the_template_and_the_system_message_of_ms_swift_are_taken(base: Path) -> None:
    write_args(base, system="You read plates.", max_pixels=1024)
    write_json(base / "trainer_state.json", TRAINER_STATE)
    config = composed(base.parent, "stage=evaluate", f"stage.checkpoint={base}")
    assert config.model.name == "tiny_qwen2_5_vl" and config.data.max_pixels == 1024
    assert config.model.template.system == "<|im_start|>system\nYou read plates.<|im_end|>\n"
    assert config.model.chat_template == "conf"
    assert config.stage.recorded and config.stage.recorded.notes == ()
    assert r"model.template.system='<|im_start|>system\nYou read plates.<|im_end|>\n'" in config.stage.recorded.taken


def test_an_adapter_of_ms_swift_brings_its_template_too(make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter()
    write_args(folder, template="internvl3_5", tuner_type="lora")
    config = composed(tmp_path, "stage=serve", f"stage.checkpoint={folder}")
    assert config.model.template.system == "" and config.stage.recorded and config.stage.recorded.adapter


def test_the_same_template_changes_nothing(base: Path) -> None:
    write_args(base)
    config = composed(base.parent, "stage=evaluate", f"stage.checkpoint={base}")
    plain = for_this_machine(compose(["stage=evaluate", "model=tiny_qwen2_5_vl"], CONF), [])
    assert config.model.template == plain.model.template and config.stage.recorded
    assert config.stage.recorded.taken == ("model=tiny_qwen2_5_vl",)


@pytest.mark.parametrize(
    ("args", "words", "said"),
    (
        ({"template": "my_own"}, (), "trained with ms-swift's template my_own, as their args.json says, and omnilaunch does not have it"),
        ({"use_chat_template": False}, (), "trained with no chat template (use_chat_template=false)"),
        (
            {"system": "You read plates."},
            ("model.template.system=''",),
            "model.template.system: these weights were trained with another one, that of ms-swift's template qwen2_5_vl",
        ),
    ),
)
def test_a_template_that_is_not_taken_is_reported(args: dict[str, Any], words: tuple[str, ...], said: str, base: Path) -> None:
    write_args(base, **args)
    config = composed(base.parent, "stage=evaluate", f"stage.checkpoint={base}", *words)
    verdict = check(config, STACKS)
    assert any(said in note for note in verdict.notes), verdict.notes


@pytest.mark.parametrize("text", ("{", "[]", '{"template": 3, "swift_version": "4"}', '{"template": "x"}'))
def test_another_args_json_is_of_no_ms_swift(text: str, base: Path) -> None:
    (base / "args.json").write_text(text, encoding="utf-8")
    assert read_swift(base) is None
    assert composed(base.parent, "stage=evaluate", f"stage.checkpoint={base}", "model=tiny_qwen2_5_vl").stage.recorded is None


def test_every_row_of_the_table_makes_a_template(base: Path) -> None:
    for name in load_table()["templates"]:
        write_args(base, template=name)
        settings = read_swift(base)
        template = make_template(settings) if settings else None
        assert template is not None and "{content}" in template.user and template.end_mark and "{system}" not in template.system
