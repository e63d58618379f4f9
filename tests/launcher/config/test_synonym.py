"""The table of synonyms: every row names what exists, and a table of words as users may type them has the expected answers."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from launcher.cli import VERBS, main, make_parser
from launcher.config.compose import judge, options
from launcher.config.key import list_settings
from launcher.config.synonym import ABSENT_FILE, FILE, HOLE, OVERRIDE, UNFILLED, Synonym, is_override, load_synonyms
from tests.launcher.config.test_compose import refusal

CONF = Path(__file__).parents[3] / "conf"
ROWS = load_synonyms()
EVERY = [
    *ROWS.keys.values(),
    *ROWS.families.values(),
    *(row for _, row in ROWS.topics),
    *ROWS.sections.values(),
    *(row for rows in ROWS.values.values() for row in rows.values()),
    *ROWS.verbs.values(),
]
SETTING = re.compile(r"\b(?:run|stage|data|model|cluster|hardware|precision|strategy)(?:\.[a-z_0-9]+)+")
PLACEHOLDERS = ("NAME", "RUN", "FILE.json", "FOLDER", "TEXT", "N", "VALUE", "last", "held_out.json")
# A value that each kind of key takes, tried in turn in place of {}.
VALUES = ("1", "true", "text", "cosine", "float16", "nccl", "0.5", "digits", "wandb")


def texts_of(row: Synonym) -> list[str]:
    return [*row.write, *(text for texts in row.values.values() for text in texts)]


def test_the_file_has_no_other_fields() -> None:
    """A comma in a text that is not quoted would become a field."""
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    absent = yaml.safe_load(ABSENT_FILE.read_text(encoding="utf-8"))
    assert all(
        set(row) <= {"prefixes", "parts", "words", "tools", "write", "values", "says"}
        for part in ("keys", "families", "topics")
        for row in absent[part]
    )
    rows = [
        *given["keys"],
        *given["verbs"],
        *given["families"],
        *given["sections"],
        *(row for rows in given["values"].values() for row in rows),
    ]
    assert {field for row in rows for field in row} <= {
        "words",
        "tools",
        "write",
        "values",
        "axis",
        "list",
        "says",
        "prefixes",
        "group",
        "frozen",
        "leaves",
        "modules",
    }
    assert {tool for row in rows for tool in row.get("tools", ())} <= set(given["tools"])
    assert all(
        row.get("write") or row.get("says") or row.get("group") or row.get("modules") or row.get("axis") or row.get("values")
        for row in rows
    )
    assert all(isinstance(row.get("says", ""), str) for row in rows)


@pytest.mark.parametrize(
    "row", dict.fromkeys((*ROWS.keys.values(), *(r for rows in ROWS.values.values() for r in rows.values()))), ids=lambda row: row.words[0]
)
def test_what_a_row_writes_is_taken(row: Synonym) -> None:
    """Each override by itself, with some value in place of {}."""
    for text in texts_of(row):
        for part in text.split(" ") if is_override(text) else ():
            reasons = [judge(part.replace(HOLE, value), CONF) for value in VALUES] if HOLE in part else [judge(part, CONF)]
            assert "" in reasons or part.endswith("=NAME"), (part, reasons[0])
    assert not row.axis or row.axis in options(CONF)


def test_sentences_name_keys_and_values_that_exist() -> None:
    settings, axes = set(list_settings()), options(CONF)
    for row in EVERY:
        for text in (row.says, *(text for text in texts_of(row) if not is_override(text))):
            for name in SETTING.findall(text):
                assert (
                    name in settings
                    or any(key.startswith(f"{name}.") for key in settings)
                    or name.startswith(("cluster.environment.", "cluster.nodes.0."))
                ), (text, name)
            for axis, name in re.findall(r"\b([a-z]+)=([a-z0-9_]+)", text):
                assert axis not in axes or name in axes[axis], (text, name)
            for verb in re.findall(r"omnilaunch ([a-z][a-z-]*)", text):
                assert verb in VERBS, text


@pytest.mark.parametrize("row", dict.fromkeys(ROWS.verbs.values()), ids=lambda row: row.words[0])
def test_the_command_of_a_verb_is_parsed(row: Synonym) -> None:
    for command in row.write:
        program, verb, *rest = shlex.split(command)
        assert program == "omnilaunch" and verb in VERBS, command
        for part in rest:
            if OVERRIDE.fullmatch(part):
                value = part.partition("=")[2]
                assert value in PLACEHOLDERS or judge(part, CONF) == "", part
        make_parser(verb)[0].parse_known_args(rest)
    assert not set(row.words) & set(VERBS), "a verb that exists is never answered"


def test_no_word_of_the_table_is_a_name_that_exists() -> None:
    """Else the row would never be reached, or would hide a name."""
    for axis, rows in ROWS.values.items():
        assert not {word for row in rows.values() for word in row.words} & set(options(CONF)[axis]), axis


def test_nothing_is_offered_that_removes_or_ends_a_run_for_another_word() -> None:
    for row in ROWS.verbs.values():
        for command in row.write:
            assert not re.search(r"prune|--yes", command)
            if " stop" in command:
                assert set(row.words) <= {"kill", "cancel", "abort", "halt", "terminate", "down", "end", "quit", "interrupt"}


@pytest.mark.parametrize("word", ["sft", "train", "pretrain", "dpo", "finetune", "tune", "freeze"])
def test_a_stage_that_trains_is_never_answered_with_one_that_does_not(word: str) -> None:
    said = refusal(f"stage={word}").partition("; ")[2].partition("valid are")[0]
    assert not re.search(r"stage=(infer|serve|evaluate|merge|convert|quantize)", said) and "did you mean" not in said


# What is typed -> what is answered. `|` separates arguments.
WORDS = {
    # hardware, as people say it
    "hardware=ascend910B": "write hardware=ascend910b",
    "hardware=Ascend 910B": "write hardware=ascend910b",
    "hardware=910B": "write hardware=ascend910b",
    "hardware=910B3": "write hardware=ascend910b",
    "hardware=910B4": "write hardware=ascend910b hardware.memory_gib=32",
    "hardware=A2": "write hardware=ascend910b",
    "hardware=Atlas A3": "write hardware=ascend910c",
    "hardware=npu": "write hardware=ascend910b or hardware=ascend910c",
    "hardware=gpu": "write hardware=h200, hardware=rtx3090 or hardware=p4",
    "hardware=cuda": "write hardware=h200, hardware=rtx3090 or hardware=p4",
    "hardware=RTX 3090": "write hardware=rtx3090",
    "hardware=3090": "write hardware=rtx3090",
    "hardware=Tesla P4": "write hardware=p4",
    "hardware=NVIDIA H200": "write hardware=h200",
    "hardware=a100": "no file describes it",
    "hardware=rtx4090": "no file describes it",
    "hardware=p40": "no file describes it",
    "hardware=910A": "not available; a 910A has no bfloat16",
    "hardware=asend910b": "did you mean 'ascend910b'?",
    # models, by their official names
    "model=Qwen2.5-VL-7B-Instruct": "write model=qwen2_5_vl_7b",
    "model=Qwen/Qwen2.5-VL-7B-Instruct": "write model=qwen2_5_vl_7b",
    "model=qwen/Qwen2.5-VL-32B-Instruct": "write model=qwen2_5_vl_32b",
    "model=Qwen2.5-VL 3B": "write model=qwen2_5_vl_3b",
    "model=Qwen2.5-VL": "write model=qwen2_5_vl_3b, model=qwen2_5_vl_7b or model=qwen2_5_vl_32b",
    "model=Qwen/Qwen2.5-Omni-7B": "write model=qwen2_5_omni_7b",
    "model=openbmb/MiniCPM-o-2_6": "write model=minicpm_o_2_6",
    "model=OpenBMB/MiniCPM-V-2_6": "write model=minicpm_v_2_6",
    "model=MiniCPM-V 4.6": "write model=minicpm_v_4_6",
    "model=OmniLMM-12B": "write model=omnilmm_12b",
    "model=openbmb/MiniCPM-V": "write model=omnilmm_3b",
    "model=OmniLMM": "which one: model=omnilmm_12b or model=omnilmm_3b?",
    "model=llava-hf/llava-1.5-7b-hf": "write model=llava_1_5_7b",
    "model=liuhaotian/llava-v1.5-7b": "write model=llava_1_5_7b",
    "model=OpenGVLab/InternVL3-8B": "write model=internvl3_8b",
    "model=qwen2_5_vl_72b": "no file of conf/model describes qwen2_5_vl_72b; CONTRIBUTING.md says how a model is added. Those of model=NAME: intern",
    "model=Qwen/Qwen3-VL-8B-Instruct": "no file of conf/model describes Qwen/Qwen3-VL-8B-Instruct",
    "attention_dropout=0.1": "stage.lora.dropout, before an adapter, is the only dropout that can be set",
    "drop_path_rate=0.1": "not available; stage.lora.dropout, before an adapter",
    "finetuning_type=freeze": "not available; it trains the last layers of the language model. The nearest is stage=lora",
    "模型=qwen2_5_vl_7b": "write model=qwen2_5_vl_7b",
    "model=/models/Qwen2.5-VL-7B": "write model=NAME model.source.path=/models/Qwen2.5-VL-7B",
    # stages
    "stage=sft": "write stage=lora or stage=full",
    "stage=finetune": "write stage=lora or stage=full",
    "stage=train": "write stage=lora or stage=full",
    "stage=pretrain": "write stage=projector",
    "stage=dpo": "not available; there is no preference",
    "stage=inference": "write stage=infer",
    "stage=chat": "write stage=infer",
    "stage=predict": "write stage=infer",
    "stage=deploy": "write stage=serve",
    "stage=api": "write stage=serve",
    "stage=eval": "write stage=evaluate",
    "stage=export": "write stage=merge, stage=quantize or stage=convert",
    "stage=merge_lora": "write stage=merge",
    "stage=3": "write strategy=zero3",
    "stage=LoRA": "write stage=lora",
    # precisions and strategies
    "precision=bfloat16": "write precision=bf16",
    "precision=float16": "write precision=fp16",
    "precision=half": "write precision=fp16",
    "precision=amp": "write precision=bf16 or precision=fp16",
    "precision=int8": "write stage=quantize stage.quantization.scheme=int8",
    "precision=fp8": "not available; precision=bf16 is the nearest",
    "strategy=deepspeed zero3": "write strategy=zero3",
    "strategy=z3": "write strategy=zero3",
    "strategy=zero-3": "write strategy=zero3",
    "strategy=ds_z3_offload": "write strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true",
    "strategy=fsdp": "write strategy=zero3; FSDP is not available",
    "strategy=deepspeed": "write strategy=zero2 or strategy=zero3",
    # keys of other tools
    "learning_rate=1e-4": "write stage.optimizer.lr=1e-4",
    "learning_rate=fast": 'write stage.optimizer.lr=VALUE; "fast" is not allowed; it must be a number',
    "learing_rate=1e-4": "write stage.optimizer.lr=1e-4",
    "num_train_epochs=3": "epochs",
    "per_device_train_batch_size=2": "write strategy.micro_batch=2; stage.global_batch counts all devices",
    "gradient_accumulation_steps=8": "set by stage.global_batch, which is per_device_train_batch_size x devices x gradient_accumulation_steps",
    "cutoff_len=2048": "write data.max_length=2048",
    "max_seq_length=2048": "write data.max_length=2048",
    "model_max_length=2048": "write data.max_length=2048",
    "MAX_PIXELS=802816": "write data.max_pixels=802816",
    "max_pixels=802816": "did you mean 'data.max_pixels'?",
    "device_map=auto": "write stage=infer stage.inference.spread=auto or stage=serve stage.serving.spread=auto",
    "stage=infer|device_map=auto": "write stage.inference.spread=auto;",
    "lora_rank=8": "write stage=lora stage.lora.r=8",
    "stage=lora|lora_rank=8": "write stage.lora.r=8",
    "lora_alpha=16": "write stage=lora stage.lora.alpha=16",
    "target_modules=q_proj,v_proj": "write stage=lora 'stage.lora.targets=[q_proj,v_proj]'",
    "lora_target=all": "leave it out",
    "deepspeed=examples/deepspeed/ds_z3_config.json": "write strategy=zero3",
    "zero_stage=2": "write strategy=zero2",
    "template=qwen2_vl": "comes with the model; leave it out",
    "warmup_ratio=0.1": "write stage.optimizer.warmup=0.1",
    "lr_scheduler_type=cosine": "write stage.optimizer.schedule=cosine",
    "weight_decay=0.1": "write stage.optimizer.weight_decay=0.1",
    "max_grad_norm=1.0": "write stage.optimizer.clip_norm=1.0",
    "gradient_checkpointing=true": "did you mean 'strategy.gradient_checkpointing'?",
    "freeze_vit=true": "leave it out; the vision tower is frozen",
    "freeze_vision_tower=false": "write stage=full 'stage.trainable=[vision,projector,lm,head]'",
    "save_steps=500": "write run.save_every=500",
    "logging_steps=10": "every step is in metrics.jsonl",
    "eval_steps=100": "write run.evaluation.every=100",
    "bf16=true": "write precision=bf16",
    "fp16=true": "write precision=fp16",
    "output_dir=out": "every run has its folder runs/RUN",
    "resume_from_checkpoint=out/checkpoint-100": "",
    "model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct": "write model=qwen2_5_vl_7b",
    "dataset=my.json": "write data=files data.train=my.json",
    "dataset_dir=data": "write data=files data.images=data",
    "do_sample=false": "write stage=infer stage.inference.sampling.temperature=0 or",
    "stage=serve|temperature=0.7": "write stage.serving.sampling.temperature=0.7",
    "max_new_tokens=128": "write stage=infer stage.inference.sampling.max_new_tokens=128",
    "quantization_bit=4": "write stage=lora stage.lora.base=nf4",
    "quantization_bit=8": "write stage=quantize stage.quantization.scheme=int8",
    "load_in_4bit=true": "write stage=lora stage.lora.base=nf4",
    "report_to=wandb": "write 'run.trackers=[wandb]'",
    "report_to=none": "write 'run.trackers=[]'",
    "dataloader_num_workers=4": "write data.workers=4",
    "nproc_per_node=8": "write cluster.devices_per_node=8",
    "nnodes=2": "copy conf/cluster/example.yaml to conf/cluster/NAME.yaml",
    "master_addr=10.0.0.1": "copy conf/cluster/example.yaml to conf/cluster/NAME.yaml",
    "master_port=29501": "write cluster.rendezvous_port=29501",
    "max_slice_nums=9": "write data.max_tiles=9",
    "finetuning_type=lora": "write stage=lora",
    "train_type=full": "write stage=full",
    "trust_remote_code=true": "never; code of a checkpoint is not executed",
    "use_liger_kernel=true": "write strategy.kernels=fused",
    "tensor_parallel_size=4": "not available; training divides a model with strategy=zero3",
    "torch_dtype=bfloat16": "write precision=bf16",
    "attn_impl=flash_attn": "leave it out; attention is sdpa, torch's own kernel, which uses flash attention where the chip has it",
    "optim=adamw_torch": "the optimizer is always AdamW; leave it out",
    "optim=adamw_8bit": "write stage.optimizer.state_bits=8",
    "vllm_max_lora_rank=8": "not available; answers come from transformers",
    "ppo_epochs=4": "there is no preference or reinforcement stage",
    "ref_model_revision=main": "there is no preference or reinforcement stage",
    "galore_scale=2": "not available; the nearest is stage=lora",
    "tune=lora": "write stage=lora",
    "strategy=bf16": "write precision=bf16",
    "image_resolution=448": "data.max_pixels counts the pixels of an image, such as 200704 for 448 x 448",
    "world_size=8": "write cluster.devices_per_node=8; on one node",
    "wandb=true": "write 'run.trackers=[wandb]'",
    "max_steps=100": "write run.steps=100",
    "image_folder=/data/my images": "write data=files 'data.images=/data/my images'",
    # the forms of other tools
    "--learning_rate|1e-4": "write stage.optimizer.lr=1e-4",
    "--lr=1e-4": "write stage.optimizer.lr=1e-4",
    "--micro-batch-size|1": "write strategy.micro_batch=1",
    "learning_rate: 1e-4": "write stage.optimizer.lr=1e-4",
    "learning_rate:|1e-4": "write stage.optimizer.lr=1e-4",
    "--hardware|h200": "write hardware=h200",
    "--run.steps|5": "write run.steps=5",
    "lora": "write stage=lora",
    # typing errors in our own words
    "data.trian=x": "did you mean 'train'?",
    "max_lenght=100": "did you mean 'data.max_length'?",
    "run.step=5": "did you mean 'steps'?",
    "stage.learning_rate=1": "write stage.optimizer.lr=1",
    "Stage=lora": "Stage=lora: write stage=lora, in lower case",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_words(words: str) -> None:
    said = refusal(*words.split("|"))
    assert WORDS[words] in said and UNFILLED not in said.replace("lr=VALUE", "").replace("KEY=VALUE", "")


def test_there_are_enough_words() -> None:
    assert len(WORDS) > 100 and len(ROWS.keys) > 700


VERB_WORDS = {
    "train": "write omnilaunch launch;",
    "sft": "write omnilaunch launch stage=lora",
    "export": "write omnilaunch launch stage=merge stage.checkpoint=RUN",
    "eval": "write omnilaunch launch stage=evaluate stage.checkpoint=RUN",
    "chat": "write omnilaunch launch stage=infer",
    "infer": "write omnilaunch launch stage=infer",
    "deploy": "write omnilaunch launch stage=serve",
    "webui": "write omnilaunch launch stage=serve",
    "merge-lora": "write omnilaunch launch stage=merge",
    "rlhf": "not available",
    "kill": "write omnilaunch stop RUN",
    "ls": "write omnilaunch runs",
    "infrence": "write omnilaunch launch stage=infer",
    "train_sft": "write omnilaunch launch stage=lora",
    "lora-sft": "write omnilaunch launch stage=lora",
    "run_eval": "write omnilaunch launch stage=evaluate",
    "quantizee": "write omnilaunch launch stage=quantize",
    "downlaod": "write omnilaunch model fetch",
    "cancle": "write omnilaunch stop RUN",
    "web-ui": "there is no web interface for training",
    "env": "write omnilaunch doctor",
    "lanch": "did you mean 'launch'?",
    "stpo": "did you mean 'stop'?",
    "hardware=h200": "write omnilaunch plan hardware=h200",
}


@pytest.mark.parametrize("word", VERB_WORDS)
def test_verbs(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert VERB_WORDS[word] in capsys.readouterr().err


@pytest.mark.parametrize("word", ["step", "shop", "runs2", "drop", "kil", "kill_train", "train_stop", "hals", "aborted_runs", "delete_run"])
def test_a_verb_that_ends_a_run_is_not_offered_for_a_word_that_is_only_near(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'stop'" not in said and "write omnilaunch stop" not in said


def test_a_whole_command_of_another_tool_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "launch --stage sft --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dataset my.json --lora_target q_proj v_proj --bf16 true --run-id x "
        "hardware=h200"
    )
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert "5 overrides are wrong" in said
    for text in (
        "stage=lora or stage=full",
        "model=qwen2_5_vl_7b",
        "data.train=my.json",
        "'stage.lora.targets=[q_proj,v_proj]'",
        "precision=bf16",
    ):
        assert text in said


def test_the_page_of_words_is_made_from_the_tables() -> None:
    from launcher.config.options_page import write_page

    assert (CONF.parent / "docs/options.md").read_text(encoding="utf-8") == write_page(), (
        "python -m launcher.config.options_page > docs/options.md"
    )
