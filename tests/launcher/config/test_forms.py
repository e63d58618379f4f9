"""Words of other tools in the forms that people type: dotted keys, several words with one answer, capitals, full width, numbers."""

import re
import shlex

import pytest

from launcher.config.compose import compose, judge
from launcher.config.synonym import UNFILLED
from tests.launcher.config.test_synonym import CONF, PLACEHOLDERS, WORDS, refusal

# What is typed -> what is answered. `|` separates arguments.
FORMS = {
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
    "profiler.steps=3": "run.profile.steps=3 profiles three steps",
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
    # files of other tools
    "--deepspeed ds_z3_offload_config.json": "write strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true",
    "--deepspeed|ds_z3_offload_config.json": "write strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true",
    "--deepspeed_config|ds_z2_config.json": "write strategy=zero2",
    "deepspeed|ds_z3_config.json": "write strategy=zero3",
    "ds_z3_config.json": "write strategy=zero3",
    "--hostfile|hosts.json": "nodes are listed in a file",
    "--data_path|data.json": "write data=files data.train=data.json",
    "--dataset|data/train.jsonl": "write data=files data.train=data/train.jsonl",
    "--train_dataset|my.jsonl": "write data=files data.train=my.jsonl",
    "--eval_dataset|val.json": "write data=files data.evaluation=val.json",
    "--lora_config|lora.json": "its parts are single keys: stage=lora, with stage.lora.r",
    "--deepspeed|ds.json": "write strategy=zero2 or strategy=zero3",
    "data/train.jsonl": "a file of rows is named by its key: data=files data.train=data/train.jsonl",
    # modules that are trained in full beside adapters
    "modules_to_save=lm_head": "write stage=lora 'stage.trainable=[head]'",
    "stage=lora|additional_target=lm_head": "write 'stage.trainable=[head]'",
    "modules_to_save=embed_tokens": "embed_tokens cannot be trained beside adapters: stage=full trains the whole language model",
    "modules_to_save=embed_tokens,lm_head": "write stage=lora 'stage.trainable=[head]'; embed_tokens cannot be trained",
    "modules_to_save=[multi_modal_projector,lm_head]": "write stage=lora 'stage.trainable=[projector,head]'",
    "lora_modules_to_save=visual.merger": "write stage=lora 'stage.trainable=[projector]'",
    "modules_to_save=model.visual": "write stage=lora 'stage.trainable=[vision]'",
    "modules_to_save=vision_tower,mlp1": "write stage=lora 'stage.trainable=[vision,projector]'",
    "modules_to_save=resampler": "write stage=lora 'stage.trainable=[projector]'",
    "modules_to_save=vpm": "write stage=lora 'stage.trainable=[vision]'",
    "stage=lora|stage.trainable=[vision]|modules_to_save=lm_head": "write 'stage.trainable=[vision,head]'",
    "stage=lora|stage.trainable=[head]|modules_to_save=lm_head": "leave it out",
    "modules_to_save=none": "leave it out; stage.trainable lists",
    "modules_to_save=[]": "leave it out; stage.trainable lists",
    "modules_to_save=my_layer": "my_layer: stage.trainable lists whole groups",
    # a number of cards
    "gpus=8xA100": "the number of devices is cluster.devices_per_node=8; A100: no file describes it",
    "gpus=8x4090": "the number of devices is cluster.devices_per_node=8; 4090: no file describes it",
    "gpus=A100:8": "the number of devices is cluster.devices_per_node=8; A100: no file describes it",
    "gpus=8xH200": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=h200|gpus=8xH200": "write cluster.devices_per_node=8",
    "hardware=cpu|gpus=8xH200": "write hardware=h200 cluster.devices_per_node=8 in place of hardware=cpu",
    "gpus=8x910B": "write hardware=ascend910b cluster.devices_per_node=8",
    "gpus=h200:4": "write hardware=h200 cluster.devices_per_node=4",
    "gpus=8x3090": "write hardware=rtx3090 cluster.devices_per_node=8 hardware.devices_per_node=8",
    "gpus=3090x8": "write hardware=rtx3090 cluster.devices_per_node=8 hardware.devices_per_node=8",
    "hardware=8xH200": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=2xH200": "write hardware=h200 cluster.devices_per_node=2",
    "hardware=h200x8": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=h200*8": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=h200-8": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=8卡H200": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=h200 8卡": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=8*910B": "write hardware=ascend910b cluster.devices_per_node=8",
    "hardware=8卡910B": "write hardware=ascend910b cluster.devices_per_node=8",
    "hardware=8x910B4": "write hardware=ascend910b hardware.memory_gib=32 cluster.devices_per_node=8",
    "hardware=8x3090": "write hardware=rtx3090 cluster.devices_per_node=8",
    "hardware=3090x8": "write hardware=rtx3090 cluster.devices_per_node=8",
    "hardware=3090*4": "write hardware=rtx3090 cluster.devices_per_node=4",
    "hardware=4卡3090": "write hardware=rtx3090 cluster.devices_per_node=4",
    "hardware=RTX 3090 x2": "write hardware=rtx3090 cluster.devices_per_node=2",
    "device=8卡昇腾910B": "write hardware=ascend910b cluster.devices_per_node=8",
    "hardware=8xA100": "the number of devices is cluster.devices_per_node=8; A100: no file describes it",
    "hardware=16xH200": "write hardware=h200; 16 devices are 2 nodes of 8: copy conf/cluster/example.yaml",
    "hardware=8卡昇腾": "write hardware=ascend910b or hardware=ascend910c",
    "hardware=RTX 4090": "no file describes it; CONTRIBUTING.md",
    "hardware=v100-16": "no file describes it; CONTRIBUTING.md",
    "hardware=910B4-1": "write hardware=ascend910b",
    # of Slurm, where it is no index of a device
    "hardware=h200:8": "write hardware=h200 cluster.devices_per_node=8",
    "hardware=910B:8": "write hardware=ascend910b cluster.devices_per_node=8",
    "hardware=h200:4": "write hardware=h200; cluster.nodes.0.devices=[4] chooses the device 4, cluster.devices_per_node=4 takes 4 devices",
    "hardware=h200:0": "write hardware=h200; cluster.nodes.0.devices=[0] chooses the device 0",
    "hardware=2x8xH200": "write hardware=h200 cluster.devices_per_node=8; 2 nodes are a file: copy conf/cluster/example.yaml",
    "hardware=0xH200": "no file describes it",
    "gpus=h200": "write hardware=h200",
    # a precision that is turned off
    "model=qwen2_5_vl_7b|hardware=h200|bf16=false": "the default here is bf16; precision=fp32 is without it",
    "hardware=h200|--bf16|false": "the default here is bf16; precision=fp32 is without it",
    "hardware=p4|fp16=false": "the default here is fp16; precision=fp32 is without it",
    "hardware=p4|bf16=false": "leave it out",
    "hardware=h200|fp16=false": "leave it out",
    "fp32=false": "the default here is fp32; precision=bf16 is without it",
    "hardware=h200|fp32=false": "leave it out",
    "hardware=h200|precision=fp32|bf16=false": "leave it out",
    "hardware=h200|precision=bf16|bf16=false": "precision=bf16 is given; precision=fp32 is without it",
    # numbers of devices
    "gpus=0,1,2,3": "write cluster.devices_per_node=4 'cluster.nodes.0.devices=[0,1,2,3]'",
    "gpus=8卡": "write cluster.devices_per_node=8",
    "gpus=8张": "write cluster.devices_per_node=8",
    "num_train_epochs=3轮": "write run.epochs=3",
    "run.steps=100步": "write run.steps=100",
    # InternVL
    "meta_path=shell/data/meta.json": "write data=files data.train=FILE.json data.images=FOLDER",
    "use_llm_lora=16": "write stage=lora stage.lora.r=16",
    "use_llm_lora=0": "leave it out",
    "use_backbone_lora=16": "not available; adapters are in the language model",
    "use_backbone_lora=0": "leave it out",
    # a regex
    "lora_target=.*": """write stage=lora 'stage.lora.targets=["re:.*"]'""",
    r"stage=lora|target_modules=^model\.language_model.*\.q_proj$": r"""write 'stage.lora.targets=["re:^model\.language_model.*\.q_proj$"]'""",
    r"--lora_target_modules|llm\..*layers\.\d+\.self_attn\.q_proj": r"""write stage=lora 'stage.lora.targets=["re:llm\..*layers\.\d+\.self_attn\.q_proj"]'""",
    # off, and without a limit
    "save_total_limit=-1": "write run.keep_checkpoints=1000, which keeps all",
    "save_total_limit=none": "write run.keep_checkpoints=1000, which keeps all",
    "max_steps=1": "write run.steps=1",
    "max_steps=-1": "leave it out; run.steps is the number of steps",
    "tensor_parallel_size=-1": "not available; training divides a model",
    "save_total_limit=3": "write run.keep_checkpoints=3",
    "use_galore=false": "leave it out",
    "disable_mtp=false": "not available",
    "hardware=lora:8": "no file describes it",
    "use_galore=true": "not available; the nearest is stage=lora",
    "sequence_parallel_size=1": "leave it out",
    "expert-model-parallel-size=1": "leave it out",
    "expert-model-parallel-size=2": "not available; training divides a model",
    "split_dataset_ratio=0": "leave it out",
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


# Here `|` belongs to the value.
CHOICES = {
    "target_modules=q_proj|v_proj": "write stage=lora 'stage.lora.targets=[q_proj,v_proj]'",
    r"target_modules=.*\.(q|k)_proj": r"""write stage=lora 'stage.lora.targets=["re:.*\.(q|k)_proj"]'""",
}


@pytest.mark.parametrize("word", CHOICES)
def test_a_regex_is_kept_as_it_is(word: str) -> None:
    assert CHOICES[word] in refusal(word)


@pytest.mark.parametrize("regex", [".*", r"^model\.language_model\..*\.(q|k)_proj$", r"a{1,2}\d+"])
def test_the_regex_that_is_offered_is_read_as_it_was_typed(regex: str) -> None:
    offered = shlex.split(re.findall(r"write (.*);", refusal(f"lora_target={regex}"))[0])
    assert compose(offered, CONF).stage.lora.targets == (f"re:{regex}",)  # type: ignore[union-attr]


def test_a_limit_of_one_is_another_than_no_limit() -> None:
    assert refusal("save_total_limit=1").endswith("write run.keep_checkpoints=1")


@pytest.mark.parametrize("words", FORMS)
def test_forms(words: str) -> None:
    said = refusal(*words.split("|"))
    assert FORMS[words] in said and UNFILLED not in said


def test_every_key_that_an_answer_offers_is_taken() -> None:
    """Of both tables: the parts of the answer that are overrides with a value of their own."""
    for words in (*WORDS, *FORMS):
        for found in re.findall(r"write ('[^']*'|[a-z][a-z0-9_.]*=[^\s;,]+)", refusal(*words.split("|"))):
            offered = found.strip("'")
            value = offered.partition("=")[2]
            assert value.startswith(("VALUE", "[VALUE")) or value in PLACEHOLDERS or judge(offered, CONF) == "", (words, offered)


@pytest.mark.parametrize("value", ["数据（一）.json", "a，b.json", "１.json", "a = b.json"])
def test_the_name_of_a_file_may_hold_any_character(value: str) -> None:
    assert compose([f"data.train={value}"], CONF).data.train == value
