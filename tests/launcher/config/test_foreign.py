"""Every argument of the tools that users come from is answered: with a key or a value, or with why there is none and what to do."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from launcher.cli import main
from launcher.config.compose import compose, judge, options
from launcher.config.conf_folder import as_conf_folder
from launcher.config.hint import Known, explain_key, explain_value
from launcher.config.key import list_settings
from launcher.config.schema import AXES
from launcher.config.search import search
from launcher.config.synonym import Typed, is_typing_error
from launcher.errors import ConfigRefused

CONF = Path(__file__).parents[3] / "conf"
LISTS = yaml.safe_load(Path(__file__).with_name("foreign_names.yaml").read_text(encoding="utf-8"))
# Words of single letters or of no meaning by themselves, for which looking further is the right answer.
SAYS_SO = re.compile(
    r"says too little by itself|not available|leave it out|not needed|not a setting|not a key|another tool|only images are|never;"
    r"|omnilaunch |cluster\.environment\.|cluster file"
)
NAMES_A_KEY = re.compile(r"\b(run|stage|data|model|cluster|hardware|precision|strategy|experiment)(\.[a-z_0-9]+|=)")


@cache
def known() -> Known:
    conf, settings = as_conf_folder(CONF), tuple(list_settings())
    return Known(list_keys=lambda: settings, groups=options(CONF), conf=conf, judge=lambda override: judge(override, conf))


def answer(name: str, value: str = "") -> str:
    typed = Typed(value=value, overrides=(f"{name}={value}",), judge=known().judge)
    return explain_key(name, "", {*AXES, "run", *known().groups}, typed, known())


@pytest.mark.parametrize("tool", LISTS)
def test_every_argument_is_answered(tool: str) -> None:
    unanswered = {}
    for name in LISTS[tool]["names"].split():
        if name in known().groups or name in AXES:
            continue
        said = answer(name)
        if "no key here" in said or not (SAYS_SO.search(said) or NAMES_A_KEY.search(said)):
            unanswered[name] = said
    assert not unanswered


def test_the_lists_are_whole() -> None:
    assert len({name for each in LISTS.values() for name in each["names"].split()}) > 4000 and all(
        each["version"] for each in LISTS.values()
    )


# A word that a rule must not turn into its opposite, or into a key of another meaning.
MEANING = {
    "vision_tower=openai/clip": ("the parts and the processor come with the model", "group_lr"),
    "unfreeze_language_model=true": ("stage=full", "stage=projector,"),
    "min_new_tokens=1": ("stage.inference.sampling.max_new_tokens", "did you mean"),
    "generation_config=x": ("stage.inference.sampling", "experiment"),
    "min_length=1": ("", "did you mean"),
    "modules=a": ("", "stage.trainable=[projector]"),
    "max_completion_length=512": ("not available", "max_new_tokens"),
    "generation_batch_size=8": ("not available", "global_batch"),
    "data_flatten=true": ("write data.padding_free=true", "write data.packing"),
    "data_packing=true": ("write data.packing=true", "padding_free"),
    "force_image_size=448": ("comes with the model; leave it out. data.max_tiles is how many tiles", "write data"),
    "no_packing=true": ("write data.packing=false", "packing=true"),
    "disable_gradient_checkpointing=true": ("gradient_checkpointing=false", "gradient_checkpointing=true"),
    "disable_gradient_checkpointing=false": ("gradient_checkpointing=true", "gradient_checkpointing=false"),
    "peft_use_dora=true": ("the nearest is stage=lora", "did you mean"),
    "zero_hpz_partition_size=8": ("leave it out; the DeepSpeed config is made from the strategy", "did you mean"),
    "stage3_gather_16bit_weights_on_model_save=true": ("leave it out; the DeepSpeed config", "did you mean"),
    "fsdp_transformer_layer_cls_to_wrap=X": ("the nearest is strategy=zero3", "did you mean"),
    "finetune_vision_layers=true": ("stage.trainable=[vision,projector,lm,head]", "did you mean"),
    "finetune_language_layers=false": ("write stage=projector", "did you mean"),
    "save_only_model=true": ("run.keep_checkpoints=1 limits them", "not needed"),
    "ignore_data_skip=true": ("--resume RUN always goes on at its position", "not needed"),
    "saves_per_epoch=2": ("run.save_every is in steps", "evaluation"),
    "dataset_prepared_path=x": ("not needed", "data.train"),
    "accumulative_counts=4": ("set by stage.global_batch", "did you mean"),
    "exit_duration_in_mins=60": ("there is no time limit", "did you mean"),
    "mm_vision_select_layer=-2": ("comes with the model", "did you mean"),
    "mm_tunable_parts=mm_mlp_adapter": ("stage=projector trains the projector alone", "did you mean"),
    "ROOT_IMAGE_DIR=/d": ("write data.images=/d", "did you mean"),
    "max_prompt_length=512": ("not available", "data.max_length="),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": ("set by stage.global_batch", "did you mean"),
    "MY_OWN_VARIABLE=1": ("cluster.environment.MY_OWN_VARIABLE=1", "did you mean"),
    "DASHSCOPE_API_KEY=abc": ("cluster.secrets=[DASHSCOPE_API_KEY]", "abc"),
}


@pytest.mark.parametrize("word", MEANING)
def test_meaning(word: str) -> None:
    right, wrong = MEANING[word]
    said = answer(*word.split("=", 1))
    assert right in said and wrong not in said


VALUES = {
    "model=OpenGVLab/InternVL3-8B-Instruct": "model=internvl3_8b is OpenGVLab/InternVL3-8B-hf, which has other weights",
    "model=InternVL3_5-8B-Instruct": "which has other weights",
    "model=OpenGVLab/InternVL3-8B": "write model=internvl3_8b",
    "model=Qwen/Qwen2.5-VL-7B-Instruct-AWQ": "which has other weights",
    "model=openbmb/MiniCPM-V-2_6-int4": "which has other weights",
    "model=qwen2.5-vl-7b-instruct": "write model=qwen2_5_vl_7b",
    "hardware=A100-SXM4-80GB": "no file describes it",
    "hardware=a100-80g": "no file describes it",
    "hardware=NVIDIA A100-SXM4-80GB": "no file describes it",
    "hardware=NVIDIA GeForce RTX 3090 Ti": "no file describes it",
    "hardware=L20": "no file describes it",
    "hardware=NVIDIA H200 NVL": "write hardware=h200",
    "hardware=NVIDIA H200 141GB HBM3e": "write hardware=h200",
    "hardware=Tesla P4 8GB": "write hardware=p4",
    "hardware=昇腾910B3": "write hardware=ascend910b",
    "hardware=Ascend910B3": "write hardware=ascend910b",
    "hardware=昇腾910B": "write hardware=ascend910b",
    "hardware=昇腾910B4": "write hardware=ascend910b hardware.memory_gib=32",
    "hardware=昇腾": "write hardware=ascend910b or hardware=ascend910c",
    "hardware=Atlas 800T A2": "write hardware=ascend910b",
    "hardware=Ascend910_9392": "write hardware=ascend910c",
    "strategy=fsdp_full_shard": "write strategy=zero3",
    "strategy=deepspeed_stage_3_offload": "strategy.offload_parameters=true",
    "strategy=ddp_spawn": "write strategy=ddp",
    "precision=bf16-true": "write precision=pure_bf16",
    "precision=16-mixed": "write precision=fp16",
}


@pytest.mark.parametrize("override", VALUES)
def test_values(override: str) -> None:
    axis, _, name = override.partition("=")
    assert VALUES[override] in explain_value(axis, name, known().groups[axis], Typed(value=name, judge=known().judge), known())


def test_every_published_model_is_known_by_its_names() -> None:
    for file in (CONF / "model").glob("*.yaml"):
        source = yaml.safe_load(file.read_text(encoding="utf-8"))["source"]
        for name in {source.get("id"), source.get("modelscope")} - {None}:
            for written in (name, name.rpartition("/")[2], name.rpartition("/")[2].lower(), f"unsloth/{name.rpartition('/')[2]}"):
                assert f"model={file.stem}" in explain_value("model", written, known().groups["model"], Typed(value=written), known()), (
                    written
                )


def test_words_without_meaning_get_no_guess() -> None:
    letters = random.Random(0)
    words = {"".join(letters.choice("bcdfghjklmnpqrstvwxz") for _ in range(letters.randint(5, 14))) for _ in range(200)}
    for word in words:
        said = answer(word, "1")
        assert "did you mean" not in said and "write " not in said, (word, said)
        assert f"omnilaunch options --search {word}" in said


@pytest.mark.parametrize(
    ("word", "name", "is_one"),
    [
        ("learing_rate", "learning_rate", True),
        ("max_lenght", "max_length", True),
        ("min_length", "max_length", False),
        ("top_h", "top_k", False),
    ],
)
def test_a_typing_error_is_in_a_part(word: str, name: str, is_one: bool) -> None:
    assert is_typing_error(word, name) is is_one


@pytest.mark.parametrize("text", ["data=digits，model=tiny_llava", "data=digits,model=tiny_llava", "data=digits、model=tiny_llava"])
def test_overrides_are_separated_by_a_space(text: str) -> None:
    with pytest.raises(ConfigRefused, match="separate overrides by a space: data=digits model=tiny_llava"):
        compose([text], CONF)


@pytest.mark.parametrize(
    ("model", "override", "instead"),
    [
        ("internvl3_8b", "data.max_pixels=200704", "write data.max_tiles=N"),
        ("qwen2_5_vl_7b", "data.max_tiles=4", "write data.max_pixels=N"),
        ("llava_1_5_7b", "data.max_pixels=200704", "leave it out"),
    ],
)
def test_a_limit_that_the_processor_ignores_is_refused(model: str, override: str, instead: str) -> None:
    with pytest.raises(ConfigRefused) as caught:
        compose([f"model={model}", override], CONF)
    assert instead in str(caught.value) and model in str(caught.value)
    compose([f"model={model}", f"{override.partition('=')[0]}=0"], CONF)


def test_searching_finds_what_rules_say() -> None:
    assert any("experts" in line for line in search("moe_router_topk", CONF)["words"].values())


COMMANDS = {
    # a word that nothing is known of hides no answer
    "plan --learning_rate 1e-4 --zzgk 3 --num_train_epochs 3": (
        "3 overrides are wrong",
        "write stage.optimizer.lr=1e-4",
        "write run.epochs=3",
        "--zzgk 3: unknown key 'zzgk'; no key here and no word of another tool is called so",
    ),
    "plan --moe_router_topk 2": ("one override is wrong", "none of the models of conf/model has experts"),
    # a negative value belongs to its word
    "plan --vision_select_layer -1 --learning_rate 1e-4": (
        "2 overrides are wrong",
        "--vision_select_layer -1: unknown key 'vision_select_layer'; comes with the model; leave it out",
        "write stage.optimizer.lr=1e-4",
    ),
    "plan --save_total_limit -1": ("one override is wrong", "write run.keep_checkpoints=1000"),
    "plan --学习率 1e-5": ("one override is wrong", "write stage.optimizer.lr=1e-5"),
    "plan --学习率=1e-5": ("one override is wrong", "write stage.optimizer.lr=1e-5"),
    "launch --deepspeed ds_z3_offload_config.json": ("one override is wrong", "write strategy=zero3 strategy.offload_optimizer=true"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_answered(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in COMMANDS[command]), said


@pytest.mark.parametrize("word", ["--zzgk", "--detatch", "--run-idd"])
def test_a_word_that_no_tool_has_is_no_override(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", word])
    assert f"unrecognized arguments: {word}" in capsys.readouterr().err
