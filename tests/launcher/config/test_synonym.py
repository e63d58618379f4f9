"""The table of synonyms: every row names what exists, and a table of words as users may type them has the expected answers."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from launcher.cli import VERBS, main, make_parser
from launcher.config.compose import compose, judge, options
from launcher.config.key import list_settings
from launcher.config.synonym import FILE, HOLE, OVERRIDE, UNFILLED, Synonym, is_override, load_synonyms
from launcher.errors import ConfigRefused

CONF = Path(__file__).parents[3] / "conf"
ROWS = load_synonyms()
EVERY = [
    *ROWS.keys.values(),
    *ROWS.families.values(),
    *ROWS.sections.values(),
    *(row for rows in ROWS.values.values() for row in rows.values()),
    *ROWS.verbs.values(),
]
SETTING = re.compile(r"\b(?:run|stage|data|model|cluster|hardware|precision|strategy)(?:\.[a-z_0-9]+)+")
PLACEHOLDERS = ("NAME", "RUN", "FILE.json", "FOLDER", "TEXT", "N", "VALUE", "last", "held_out.json")
# A value that each kind of key takes, tried in turn in place of {}.
VALUES = ("1", "true", "text", "cosine", "float16", "nccl", "0.5", "digits")


def texts_of(row: Synonym) -> list[str]:
    return [*row.write, *(text for texts in row.values.values() for text in texts)]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigRefused) as caught:
        compose(overrides, CONF)
    return str(caught.value)


def test_the_file_has_no_other_fields() -> None:
    """A comma in a text that is not quoted would become a field."""
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
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
    }
    assert {tool for row in rows for tool in row.get("tools", ())} <= set(given["tools"])
    assert all(row.get("write") or row.get("says") or row.get("group") or row.get("axis") or row.get("values") for row in rows)
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
    "model=qwen2_5_vl_72b": "no file of conf/model describes it; valid are: internvl3_5_8b",
    "model=Qwen/Qwen3-VL-8B-Instruct": "no file of conf/model describes it",
    "model=/models/Qwen2.5-VL-7B": "write model=NAME model.source.kind=path model.source.path=/models/Qwen2.5-VL-7B",
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
    # the nested config files of other tools: the whole path decides
    "fp16.enabled=true": "write precision=fp16",
    "bf16.enabled=true": "write precision=bf16",
    "bf16.enabled=false": "leave it out",
    "FP16.ENABLED=true": "write precision=fp16",
    "monitor.enabled=true": "leave it out; run.trackers lists",
    "flops_profiler.enabled=true": "leave it out; run.profile.steps=3",
    "comms_logger.enabled=true": "leave it out; run.profile.steps=3",
    "elasticity.enabled=true": "not available; the DeepSpeed config is made from the strategy",
    "zero_optimization.offload_optimizer.device=cpu": "write strategy=zero2 strategy.offload_optimizer=true or strategy=zero3 strategy.offload_optimizer=true",
    "strategy=zero3|offload_optimizer.device=cpu": "write strategy.offload_optimizer=true",
    "offload_optimizer.device=nvme": "not available; strategy.offload_optimizer=true keeps",
    "offload_param.device=cpu": "write strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true",
    "strategy=zero2|offload_param.device=cpu": "strategy.offload_parameters=true in place of strategy=zero2",
    "offload_param.pin_memory=true": "leave it out; strategy.offload_parameters=true is the whole setting",
    "deepspeed_config.offload_optimizer_device=cpu": "strategy.offload_optimizer=true",
    "optimizer.type=AdamW": "the optimizer is always AdamW; leave it out",
    "optimizer.params.lr=1e-4": "write stage.optimizer.lr=1e-4",
    "optimizer.params.betas=[0.9,0.95]": "stage.optimizer.beta1",
    "optimizer.params.weight_decay=0.1": "write stage.optimizer.weight_decay=0.1",
    "stage.optimizer.type=adamw": "the optimizer is always AdamW; leave it out",
    "stage.optimizer.foo=1": "valid are: beta1",
    "scheduler.type=WarmupDecayLR": "write stage.optimizer.schedule=linear",
    "scheduler.type=WarmupCosineLR": "write stage.optimizer.schedule=cosine",
    "scheduler.params.warmup_num_steps=100": "write stage.optimizer.warmup=100",
    "scheduler.params.total_num_steps=1000": "its length is that of the run",
    "fp16.loss_scale=0": "not available; precision.loss_scaling=dynamic is",
    "zero_optimization.stage=3": "write strategy=zero3",
    "deepspeed.zero_optimization.stage=2": "write strategy=zero2",
    "zero_optimization.overlap_comm=true": "leave it out; the DeepSpeed config is made from the strategy",
    "activation_checkpointing.partition_activations=true": "leave it out; strategy.gradient_checkpointing=true is the setting",
    "wandb.enabled=true": "write 'run.trackers=[wandb]'; the package is in no lock",
    "wandb.project=vision": "cluster.environment.WANDB_PROJECT=vision",
    "tensorboard.output_path=/x": "leave it out; run.trackers",
    "actor_rollout_ref.model.path=/x": "not available; there is no preference or reinforcement stage",
    "critic.optim.lr=1e-5": "not available; there is no preference or reinforcement stage",
    "ref_model.lr=1": "not available; there is no preference or reinforcement stage",
    "model.device=cuda": "write hardware=h200, hardware=rtx3090 or hardware=p4",
    "model.path=/models/x": "model.source.path=/models/x",
    "trainer.max_steps=5": "write run.steps=5",
    "trainer.devices=8": "write cluster.devices_per_node=8",
    "devices=8": "write cluster.devices_per_node=8; of each node; cluster.nodes.0.devices=[0,1] names them",
    "lora_config.r=8": "write stage=lora stage.lora.r=8",
    "eval.steps=100": "write run.evaluation.every=100",
    "runner_config.epochs=3": "write run.epochs=3",
    "lr_schedule.type=CosineWithWarmUpLR": "write stage.optimizer.schedule=cosine",
    "parallel_config.model_parallel=4": "not available; training divides a model with strategy=zero3",
    "generation_config.temperature=0.7": "write stage=infer stage.inference.sampling.temperature=0.7",
    "fsdp_config.fsdp_sharding_strategy=FULL_SHARD": "not available; the nearest is strategy=zero3",
    "foo.enabled=true": "'foo.enabled'; valid are: cluster",
    "foo.device=cpu": "'foo.device'; valid are: cluster",
    "foo.stage=3": "'foo.stage'; valid are: cluster",
    "foo.path=/x": "'foo.path'; valid are: cluster",
    "profiler.steps=3": "'profiler.steps'; valid are: cluster",
    # groups of weights: one answer for all, with the stage that was typed
    "stage=lora|freeze_vit=false": "write 'stage.trainable=[vision]' or 'stage.trainable=[vision,projector,head]'; these are trained in full, beside the adapters",
    "stage=lora|freeze_vit=true": "leave it out; stage=lora trains adapters in the language model alone",
    "stage=lora|freeze_llm=true": "in place of stage=lora: stage=projector",
    "stage=lora|freeze_vit=false|freeze_aligner=false": "write 'stage.trainable=[vision,projector]';",
    "stage=lora|freeze_vit=false|freeze_llm=true": "in place of stage=lora: stage=full 'stage.trainable=[vision]'",
    "stage=full|freeze_vit=false|freeze_aligner=true": "freeze_vit'; write 'stage.trainable=[vision,lm,head]'",
    "freeze_vit=false|freeze_aligner=true": "freeze_aligner'; the answer to freeze_vit takes it into account",
    "--freeze_vit|false|--freeze_llm|true": "write stage=full 'stage.trainable=[vision,projector]'",
    "freeze_llm=true|freeze_vit=true": "write stage=projector, which trains the projector alone",
    "freeze_llm=true|freeze_aligner=true": "nothing would be trained",
    "stage=full|tune_mm_llm=true|tune_mm_vision=false": "leave it out; the language model is trained, the vision tower is frozen with stage=full already",
    "stage=infer|freeze_vit=true": "leave it out; stage=infer trains nothing",
    "stage=projector|freeze_llm=false": "write 'stage.trainable=[projector,lm,head]'",
    "freeze_llm=false": "leave it out; the language model is trained with stage=full or stage=lora already",
    # what was typed already, and what is changed
    "stage=lora|finetuning_type=lora": "you already have stage=lora: leave it out",
    "precision=bf16|bf16=true": "you already have precision=bf16: leave it out",
    "strategy=zero3|deepspeed=ds_z3_config.json": "you already have strategy=zero3: leave it out; the DeepSpeed config",
    "strategy=zero2|deepspeed=ds_z3_config.json": "write strategy=zero3 in place of strategy=zero2",
    "stage=infer|quantization_bit=4": "write stage=lora stage.lora.base=nf4 in place of stage=infer",
    "hardware=h200|use_cpu=true": "write hardware=cpu in place of hardware=h200",
    # data sets of other tools
    "--dataset|mydata.jsonl#500": "write data=files data.train=mydata.jsonl;",
    "dataset=mydata.jsonl#500": "#500 is not available: give a shorter file, or fewer steps with run.steps",
    "val_dataset=val.jsonl#100": "data.evaluation=val.jsonl; #100 is not available: give a shorter file, or fewer answers with run.evaluation.limit=100",
    "dataset=AI-ModelScope/alpaca-gpt4-data-zh#500": "a data set of a hub is not read",
    "dataset=a.json,b.json": "one file: put the rows of these 2 into it",
    # the web
    "stage=webui": "write stage=serve; there is no web interface for training; stage=serve has a page to try an image and a prompt, and an API",
    "webui=true": "write stage=serve; there is no web interface for training",
    "stage=webchat": "and an API",
    # capitals, full width, spaces
    "HARDWARE=H200|STAGE=Lora": "HARDWARE=H200: write hardware=h200, in lower case\n  STAGE=Lora: write stage=lora, in lower case",
    "HW=H200": "write hardware=h200",
    "MODEL=tiny_llava": "write model=tiny_llava, in lower case",
    "PRECISION=BF16": "write precision=bf16",
    "Strategy=ZeRO3": "write strategy=zero3",
    "EXP=cpu_tiny_llava_lora": "write experiment=cpu_tiny_llava_lora",
    "RUN.STEPS=5": "write run.steps=5, in lower case",
    "hardware＝h200": "write hardware=h200, in half-width characters",
    "hardware=“h200”": "write hardware=h200",
    "－－learning_rate　1e-4": "write stage.optimizer.lr=1e-4",
    "learning_rate＝1e－4": "write stage.optimizer.lr=1e-4",
    "stage.optimizer.lr=1e－4": "write stage.optimizer.lr=1e-4, in half-width characters",
    "run.trackers=【wandb】": "write 'run.trackers=[wandb]', in half-width characters",
    "run.steps=１０００": "write run.steps=1000",
    "stage：lora": "write stage=lora",
    "model=Qwen2.5－VL－7B－Instruct": "write model=qwen2_5_vl_7b",
    "data.train=“my rows.json”": "write 'data.train=\"my rows.json\"', in half-width characters",
    "stage|=|lora": "one override is wrong:\n  stage = lora: write stage=lora, without spaces",
    "stage=|lora": "one override is wrong:\n  stage = lora: write stage=lora, without spaces",
    "stage = lora": "write stage=lora, without spaces",
    "run.steps ＝ 5": "write run.steps=5, in half-width characters and without spaces",
    "stage:lora": "write stage=lora",
    # numbers as people write them
    "data.max_length=32k": "write data.max_length=32768, which is 32 x 1,024",
    "Data.Max_Length=32k": "write data.max_length=32768, which is 32 x 1,024",
    "cutoff_len=32k": "write data.max_length=32768; 32768 is 32 x 1,024",
    "run.steps=1k": "write run.steps=1000, which is 1 x 1,000",
    "max_steps=1.5k": "write run.steps=1500; 1500 is 1.5 x 1,000",
    "run.steps=1e3": "write run.steps=1000",
    "run.steps=1,000": "write run.steps=1000, without commas",
    "run.steps=1万": "write run.steps=10000, which is 1 x 10,000",
    "save_steps=1e3": "write run.save_every=1000",
    "data.max_pixels=1M": "write data.max_pixels=1000000",
    "data.max_pixels=1280*28*28": "write data.max_pixels=1003520, which is 1280 x 28 x 28",
    "max_pixels=1280*28*28": "write data.max_pixels=1003520, which is 1280 x 28 x 28",
    "image_max_pixels=448x448": "write data.max_pixels=200704; 200704 is 448 x 448",
    "stage.serving.max_body_bytes=8M": "write stage.serving.max_body_bytes=8388608",
    "run.trackers=wandb": "it must be a list; write 'run.trackers=[wandb]'",
    # further ones
    "resume_from_checkpoint=true": "write omnilaunch launch --resume last",
    "resume=auto": "write omnilaunch launch --resume last",
    "report_to=swanlab": "write 'run.trackers=[swanlab]'; wandb, swanlab and mlflow are in no lock",
    "use_wandb=true": "must be installed where the ranks run: pip install wandb",
    "device=cuda:0": "write hardware=h200, hardware=rtx3090 or hardware=p4; name the card; cluster.nodes.0.devices=[0] chooses the device",
    "device=npu:0": "write hardware=ascend910b or hardware=ascend910c",
    "hardware=cuda:1": "cluster.nodes.0.devices=[1] chooses the device",
    "device=cpu": "write hardware=cpu",
    "device=xpu:0": "'device'; not available; the trainer runs on CPU, CUDA and Ascend NPU; valid are",
    "attn_implementation=flash_attention_2": "The package flash-attn is in no image and cannot be chosen",
    "use_flash_attn=false": "write 'hardware.capability.attention=[eager]'",
    "学习率=1e-4": "write stage.optimizer.lr=1e-4",
    "批大小=4": "write stage.global_batch=4 or strategy.micro_batch=4",
    "断点续训=true": "write omnilaunch launch --resume last",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_words(words: str) -> None:
    said = refusal(*words.split("|"))
    assert WORDS[words] in said and UNFILLED not in said.replace("lr=VALUE", "").replace("KEY=VALUE", "")


def test_there_are_enough_words() -> None:
    assert len(WORDS) > 100 and len(ROWS.keys) > 700


def test_every_key_that_an_answer_offers_is_taken() -> None:
    """Of the words above: the parts of the answer that are overrides with a value of their own."""
    for words in WORDS:
        for found in re.findall(r"write ('[^']*'|[a-z][a-z0-9_.]*=[^\s;,]+)", refusal(*words.split("|"))):
            offered = found.strip("'")
            value = offered.partition("=")[2]
            assert value.startswith(("VALUE", "[VALUE")) or value in PLACEHOLDERS or judge(offered, CONF) == "", (words, offered)


@pytest.mark.parametrize("value", ["数据（一）.json", "a，b.json", "１.json", "a = b.json"])
def test_the_name_of_a_file_may_hold_any_character(value: str) -> None:
    assert compose([f"data.train={value}"], CONF).data.train == value


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
    "quantise": "write omnilaunch launch stage=quantize",
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
