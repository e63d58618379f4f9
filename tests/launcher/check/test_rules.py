"""The verdict: which config is refused, in which words, and what would pass."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from launcher.check.rules import RULES_BUT_MEMORY, Verdict, check
from launcher.check.strategy import resolve
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.image.stack import Stack, load_stacks
from launcher.plan.plan import compose_change

ROOT = Path(__file__).parents[3]


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


def judge(*overrides: str) -> Verdict:
    return check(compose(overrides, ROOT / "conf"), stacks())


NPU = ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora")
ALL_TARGETS = "stage.lora.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
DOCKER = ("cluster.runtime=docker",)
ACCEPTED = "cluster.delivery.accept_licence=true"
HYBRID, INTERVAL = ("model=minicpm_v_4_6", "tune=null"), "model.architecture.text.options.full_attention_interval"
ROWS = ("data=files", "data.train=a.json")
RANDOM = "model.source={kind: random}"
LLAVA = ("model=llava_1_5_7b", "tune=null")

# Overrides -> the key that is refused, and a change that is offered.
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("hardware=p4", "precision=bf16"), "precision", "precision=fp16"),
    (("hardware=p4", "precision=pure_bf16"), "precision", "precision=fp32"),
    (("precision=fp16",), "precision", "precision=bf16"),
    (("hardware=p4", "precision.loss_scaling=none"), "precision.loss_scaling", "precision.loss_scaling=dynamic"),
    (("precision.loss_scaling=dynamic",), "precision.loss_scaling", "precision.loss_scaling=none"),
    (("precision=bf16", "precision.rounding=stochastic"), "precision.rounding", "precision.rounding=nearest"),
    (("precision=pure_bf16", "strategy=zero2", "strategy.offload_optimizer=true"), "strategy.offload_optimizer", "precision=bf16"),
    (("precision=pure_bf16", "stage.optimizer.state_bits=8"), "stage.optimizer.state_bits", "precision=bf16"),
    (
        ("stage.optimizer.state_bits=8", "strategy=zero2", "strategy.offload_optimizer=true"),
        "stage.optimizer.state_bits",
        "stage.optimizer.state_bits=0",
    ),
    (("strategy.kernels=fused",), "strategy.kernels", "strategy.kernels=auto"),
    (("hardware=p4", "strategy.kernels=fused"), "strategy.kernels", "strategy.kernels=plain"),
    (("strategy.checkpoint_every=0",), "strategy.checkpoint_every", "strategy.checkpoint_every=1"),
    (("hardware=rtx3090", "cluster.devices_per_node=4"), "cluster.devices_per_node", "cluster.devices_per_node=2"),
    (("hardware=ascend910c", "cluster.devices_per_node=3"), "cluster.devices_per_node", "cluster.devices_per_node=4"),
    (("cluster.nodes.0.spare=true",), "cluster.nodes", "cluster.nodes.0.spare=false"),
    (("cluster=example", "cluster.runtime=process"), "cluster.runtime", "cluster.runtime=docker"),
    (("cluster.nodes.0.host=192.0.2.11", "cluster.runtime=process"), "cluster.runtime", "cluster=local"),
    (("cluster=example", "cluster.root=runs"), "cluster.root", "cluster.root=/srv/omnilaunch"),
    (("cluster.nodes.0.architecture=aarch64",), "cluster.nodes.architecture", "cluster.nodes.0.architecture=x86_64"),
    (("hardware=h200", "hardware.collectives=hccl"), "hardware.collectives", "hardware.collectives=nccl"),
    (("hardware=ascend910b", "hardware.collectives=nccl"), "hardware.collectives", "hardware.collectives=hccl"),
    (("hardware.collectives=nccl",), "hardware.collectives", "hardware.collectives=gloo"),
    (("run.collective_timeout_s=600",), "run.hang_timeout_s", "run.hang_timeout_s=510"),
    (("hardware=ascend910b", "run.collective_timeout_s=600"), "run.collective_timeout_s", "run.collective_timeout_s=1896"),
    (
        ("hardware=ascend910b", "cluster.environment.HCCL_CONNECT_TIMEOUT=1900"),
        "cluster.environment.HCCL_CONNECT_TIMEOUT",
        "cluster.environment.HCCL_CONNECT_TIMEOUT=1806",
    ),
    (
        ("hardware=ascend910b", "cluster.environment.HCCL_EXEC_TIMEOUT=20"),
        "hardware.environment.HCCL_CONNECT_TIMEOUT",
        "cluster.environment.HCCL_EXEC_TIMEOUT=1830",
    ),
    (("hardware=p4", "hardware.stack=cuda130"), "hardware.stack", "hardware.stack=cuda126"),
    (("hardware=p4", "hardware.stack=cuda999"), "hardware.stack", "hardware.stack=cuda126"),
    (("hardware=ascend910b", "hardware.stack=cuda126"), "hardware.stack", "hardware.stack=ascend910b"),
    (("hardware=ascend910b", "hardware.stack=ascend910c"), "hardware.stack", "hardware.stack=ascend910b"),
    (("stage=lm",), "stage.checkpoint", "stage=full"),
    (("stage=lora",), "stage.checkpoint", "stage.checkpoint=RUN_ID"),
    (("stage=evaluate",), "stage.checkpoint", "stage.checkpoint=FOLDER"),
    (("stage.needs=[adapter]",), "stage.checkpoint", "stage.checkpoint=RUN_ID"),
    (("model.source.kind=hub",), "model.source.id", "model.source.id=ORGANISATION/NAME"),
    (("model.source.kind=path",), "model.source.path", "model.source.path=FOLDER"),
    (("stage.trainable=[]",), "stage.trainable", "stage.trainable=[projector,lm,head]"),
    (("model=qwen2_5_vl_3b", "stage.trainable=[head]"), "stage.trainable", "stage.trainable=[projector,lm,head]"),
    ((*LLAVA, "stage=lora", "stage.lora.targets=[]"), "stage.lora.targets", ALL_TARGETS),
    ((*LLAVA, "stage=lora", "stage.lora.targets=[qproj]"), "stage.lora.targets", ALL_TARGETS),
    ((*LLAVA, "stage=lora", "stage.trainable=[projector,lm]"), "stage.trainable", "stage.trainable=[projector]"),
    (("cluster.devices_per_node=3",), "stage.global_batch", "stage.global_batch=66"),
    (("strategy.micro_batch=48",), "stage.global_batch", "stage.global_batch=48"),
    (("strategy.micro_batch=48",), "stage.global_batch", "strategy.micro_batch=32"),
    (("cluster.devices_per_node=4", "strategy.micro_batch=64"), "stage.global_batch", "strategy.micro_batch=16"),
    ((*ROWS, "data.rows=60"), "stage.global_batch", "stage.global_batch=8 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=60"), "stage.global_batch", "stage.global_batch=60 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=60", "cluster.devices_per_node=4"), "stage.global_batch", "stage.global_batch=8 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=61", "cluster.devices_per_node=4"), "stage.global_batch", "stage.global_batch=60 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=60", "strategy.micro_batch=16"), "stage.global_batch", "stage.global_batch=48"),
    ((*ROWS, "data.rows=10", "strategy.micro_batch=64"), "stage.global_batch", "stage.global_batch=10 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=1"), "stage.global_batch", "stage.global_batch=1 strategy.micro_batch=1"),
    ((*ROWS, "data.rows=3", "cluster.devices_per_node=4"), "stage.global_batch", "cluster.devices_per_node=1 stage.global_batch=3"),
    (("run.epochs=0",), "run.epochs", "run.epochs=1"),
    (("run.epochs=-1",), "run.epochs", "run.epochs=1"),
    (("run.epochs=nan",), "run.epochs", "run.epochs=1"),
    (("data.max_length=2048",), "data.max_length", "data.max_length=1024"),
    (("data.max_length=40",), "data.max_length", "data.max_length=48"),
    ((*LLAVA, "data.max_length=500"), "data.max_length", "data.max_length=608"),
    (("data=files", "data.images=photos"), "data.train", "data.train=FILE.json"),
    (("data.train=a.json",), "data.train", "data=files"),
    (("data.evaluation=a.json",), "data.evaluation", "data.builtin=''"),
    (("data=files", "data.builtin=digits", "data.images=photos"), "data.images", "data.builtin=''"),
    (("stage=evaluate", "stage.checkpoint=x", "run.evaluation.enabled=false"), "run.evaluation.enabled", "run.evaluation.enabled=true"),
    (("strategy.micro_batch=0",), "strategy.micro_batch", "strategy.micro_batch=1"),
    (("hardware.capability.attention=[]",), "hardware.capability.attention", "hardware.capability.attention=[sdpa]"),
    (("model.groups.lm=[",), "model.groups.lm", "model.groups.lm=REGEX"),
    (("run.steps=10000000000",), "run.steps", "run.steps=1000000000"),
    (("run.seed=-1",), "run.seed", "run.seed=0"),
    (("stage.global_batch=20000000",), "stage.global_batch", "stage.global_batch=10000000"),
    (("cluster.devices_per_node=5000", "stage.global_batch=5000"), "cluster.devices_per_node", "cluster.devices_per_node=1024"),
    (("stage.optimizer.lr=nan",), "stage.optimizer.lr", "stage.optimizer.lr=1e-4"),
    (("stage.optimizer.lr=2",), "stage.optimizer.lr", "stage.optimizer.lr=1e-4"),
    (("hardware.memory_gib=inf",), "hardware.memory_gib", "hardware.memory_gib=1000000"),
    (("hardware.memory_gib=1e308",), "hardware.memory_gib", "hardware.memory_gib=1000000"),
    (("hardware.host_memory_gib=1e308",), "hardware.host_memory_gib", "hardware.host_memory_gib=1000000"),
    (("hardware.context_gib=1e308",), "hardware.context_gib", "hardware.context_gib=1000000"),
    (("hardware.fragmentation=1e308",), "hardware.fragmentation", "hardware.fragmentation=10"),
    (("data.max_pixels=-1", "model=tiny_qwen2_5_vl"), "data.max_pixels", "data.max_pixels=0"),
    ((*HYBRID, RANDOM, f"{INTERVAL}=0"), INTERVAL, f"{INTERVAL}=1"),
    ((*HYBRID, RANDOM, f"{INTERVAL}=nan"), INTERVAL, f"{INTERVAL}=1"),
    ((*HYBRID, RANDOM, f"{INTERVAL}=often"), INTERVAL, f"{INTERVAL}=4"),
    (("hardware.accelerator=cuda",), "hardware.stack", "hardware.accelerator=cpu"),
    (("hardware=p4", "hardware.stack=cpu"), "hardware.stack", "hardware.stack=cuda126"),
    (("cluster.secrets=['a b']",), "cluster.secrets", "cluster.secrets=[NAME]"),
    (("cluster.secrets=['HF_TOKEN=x']",), "cluster.secrets", "cluster.secrets=[NAME]"),
    (
        ("cluster.delivery.index=https://***@mirror.example/simple",),
        "cluster.delivery.index",
        "cluster.delivery.index=https://USER:PASSWORD@mirror.example/simple",
    ),
    ((*DOCKER, "cluster.user=ann"), "cluster.user", "cluster.user=1000:1000"),
    ((*DOCKER, "cluster.user=1000"), "cluster.user", "cluster.user=1000:1000"),
    ((*DOCKER, "cluster.shm_size=lots"), "cluster.shm_size", "cluster.shm_size=16g"),
    ((*DOCKER, "cluster.shm_size=0"), "cluster.shm_size", "cluster.shm_size=16g"),
    ((*DOCKER, "cluster.ulimits.memlock=unlimited"), "cluster.ulimits.memlock", "cluster.ulimits.memlock=-1"),
    ((*DOCKER, "cluster.ulimits.nofile=2:1"), "cluster.ulimits.nofile", "cluster.ulimits.nofile=1:2"),
    ((*DOCKER, "cluster.mounts=[data/set]"), "cluster.mounts", "cluster.mounts=[/FOLDER]"),
    ((*DOCKER, "cluster.sync=[data/set]"), "cluster.sync", "cluster.sync=[/FOLDER]"),
    ((*DOCKER, "cluster.mounts=[/a,'~/b']"), "cluster.mounts", "cluster.mounts=[/a,/FOLDER]"),
    ((*DOCKER, "cluster.delivery.kind=pull"), "cluster.delivery.registry", "cluster.delivery.kind=build"),
    (
        (*DOCKER, "cluster.delivery.kind=pull", "cluster.delivery.registry=https://registry.example/team"),
        "cluster.delivery.registry",
        "cluster.delivery.registry=registry.example/team",
    ),
    (("run.keep_best=exact_match",), "run.keep_best", "run.evaluation.every=30"),
    (("run.keep_best=loss", "run.evaluation.every=5"), "run.keep_best", "run.evaluation.loss=true"),
    (
        ("run.keep_best=loss", "run.evaluation.enabled=false"),
        "run.keep_best",
        "run.evaluation.enabled=true run.evaluation.every=30 run.evaluation.loss=true",
    ),
    (
        ("run.keep_best=exact_match", "run.evaluation.every=5", "data=files", "data.train=a.json", "data.images=photos"),
        "run.keep_best",
        "data.evaluation=FILE.json",
    ),
    (("run.steps=20",), "stage.optimizer.warmup", "run.steps=200"),
    (("stage.optimizer.lr=0",), "stage.optimizer.lr", "stage.optimizer.lr=1e-4"),
    (("cluster.devices_per_node=2", "strategy=single"), "strategy", "strategy=ddp"),
    (("precision=pure_bf16", "strategy=single"), "strategy", "strategy=zero1"),
    (("strategy.offload_optimizer=true",), "strategy", "strategy.offload_optimizer=false strategy.offload_parameters=false"),
    (("hardware=rtx3090", "strategy=zero2", "strategy.offload_parameters=true"), "strategy.offload_parameters", "strategy=zero3"),
    (("hardware=rtx3090", "strategy=ddp", "strategy.offload_optimizer=true"), "strategy.offload_optimizer", "strategy=zero2"),
    (("hardware=rtx3090", *LLAVA), "strategy", "strategy=zero2 strategy.offload_optimizer=true"),
    (("hardware=p4", *LLAVA), "strategy", "strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true"),
    (("hardware=ascend910b", *LLAVA, "strategy=ddp"), "strategy", "strategy=zero2"),
)


@pytest.mark.parametrize(("overrides", "key", "change"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_refused_and_what_would_pass(overrides: tuple[str, ...], key: str, change: str) -> None:
    found = [problem for problem in judge(*overrides).problems if problem.key == key]
    assert len(found) == 1 and not found[0].launch_only
    assert change in found[0].changes
    # The change takes the place of what it changes: the same key, or the keys of a cluster that is left for another.
    replaced = {part.split("=")[0] for part in change.split()} | (
        {"cluster.nodes", "cluster.runtime"} if change == "cluster=local" else set()
    )
    kept = [override for override in overrides if not any(override.startswith((f"{name}=", f"{name}.")) for name in replaced)]
    assert found[0].what not in [problem.what for problem in judge(*kept, *change.split()).problems]


def test_a_smaller_batch_is_offered_once() -> None:
    for rows, micro in ((60, 64), (10, 64), (60, 16)):
        found = judge(*ROWS, f"data.rows={rows}", f"strategy.micro_batch={micro}").problems
        batches = [change.split()[0] for problem in found if problem.key == "stage.global_batch" for change in problem.changes]
        assert batches and len(set(batches)) == len(batches), batches


def test_random_weights_with_a_rate_of_fine_tuning_are_noted() -> None:
    own = (*ROWS, "model=tiny_qwen2_5_vl", "data.rows=600")
    low = (*own, "stage.optimizer.lr=2e-5")
    assert [note for note in judge(*low).notes if "random weights" in note and "0.001 to 0.01" in note]
    for words in (own, (*own, "stage.optimizer.lr=5e-3"), ("model=tiny_qwen2_5_vl",), (*low, "stage.checkpoint=/x")):
        assert not [note for note in judge(*words).notes if "random weights" in note]


# What no override can take back: the key itself has to go. The text says so.
REMOVED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("cluster.nodes=[]",), "cluster.nodes", "add them to the cluster file, local.yaml"),
    (("cluster=example", "cluster.nodes.1.host=192.0.2.11"), "cluster.nodes.host", "Keep one of them in the cluster file, example.yaml"),
    (("cluster=example", "cluster.nodes.1.address=192.0.2.11"), "cluster.nodes.address", "Keep one of them in the cluster file"),
    (("cluster.environment.HF_TOKEN=x",), "cluster.environment.HF_TOKEN", "export HF_TOKEN, and set cluster.secrets=[HF_TOKEN]"),
    (("cluster.secrets=[A]", "hardware.environment.API_KEY=x"), "hardware.environment.API_KEY", "set cluster.secrets=[A,API_KEY]"),
    (
        ("cluster.environment.HTTPS_PROXY=http://ann:pass@proxy:3128",),
        "cluster.environment.HTTPS_PROXY",
        "set cluster.secrets=[HTTPS_PROXY]",
    ),
    ((*DOCKER, "cluster.ulimits.nofiles=1"), "cluster.ulimits.nofiles", "did you mean 'nofile'?"),
)


@pytest.mark.parametrize(("overrides", "key", "text"), REMOVED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_a_key_that_has_to_go_is_named_without_an_override(overrides: tuple[str, ...], key: str, text: str) -> None:
    (problem,) = [problem for problem in judge(*overrides).problems if problem.key == key]
    assert text in problem.what and not problem.changes


BROKEN = (
    *(overrides for overrides, _, _ in (*REFUSED, *REMOVED)),
    ("hardware=ascend910b", "cluster.environment.HCCL_CONNECT_TIMEOUT=5000"),
    ("hardware=ascend910b", "cluster.environment.HCCL_EXEC_TIMEOUT=1"),
    ("hardware=ascend910b", "cluster.environment.HCCL_EXEC_TIMEOUT=soon", "run.hang_timeout_s=1"),
    ("hardware=ascend910b", "run.collective_timeout_s=20"),
    ("hardware=p4", "precision=bf16", "precision.weights=bfloat16"),
    ("hardware=h200", "precision.optimizer=float16", "precision.gradients=float16"),
    ("hardware=h200", "precision.weights=float32"),
    ("cluster=example", "cluster.nodes.0.devices=[0,0]", "cluster.nodes.1.devices=[1,2,3]", "hardware=rtx3090"),
    ("hardware=ascend910c", "cluster.devices_per_node=17"),
    ("cluster=example", "cluster.nodes.0.host=ann@gpu1", "cluster.nodes.1.host=gpu2:2222"),
    ("stage=serve", "stage.checkpoint=x", "stage.serving.address=0.0.0.0"),
    ("stage=infer", "stage.checkpoint=x", "stage.inference.sampling.beams=3", "stage.inference.sampling.temperature=1"),
    ("stage=lora", "stage.checkpoint=x", "stage.lora.targets=['re:(']", "stage.optimizer.group_lr={vision: 2}"),
    ("stage=lm", "stage.reset=[vision]", "run.steps=1", "stage.optimizer.warmup=5"),
    (*HYBRID, "data.packing=true", "data.padding_free=true", "data.length_aware=window"),
)


@cache
def changed(overrides: tuple[str, ...], change: str) -> Config:
    return compose_change(overrides, change, partial(compose, conf=ROOT / "conf"))


@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_every_override_that_is_offered_removes_its_problem_and_brings_no_new_one(overrides: tuple[str, ...]) -> None:
    """As a person does it: with the override in place of what was typed for the same key, composed again."""
    resolved = resolve(compose(overrides, ROOT / "conf"))
    for rule in RULES_BUT_MEMORY:
        found = check(
            resolved.asked,
            stacks(),
            rules=(rule,),
            resolved=resolved,
            compose=lambda change: changed(overrides, change),
        )
        problems = (*found.problems, *found.forced)
        for problem in problems:
            for change in problem.changes:
                left = check(changed(overrides, change), stacks(), rules=(rule,)).problems
                assert {other.key for other in left} <= {other.key for other in problems} - {problem.key}, change


PASSES = (
    (),
    ("cluster.devices_per_node=4",),
    ("precision=bf16",),
    ("precision=pure_bf16",),
    ("hardware=p4", ACCEPTED),
    ("hardware=p4", "cluster.runtime=process"),  # without the image, there is no licence
    ("hardware=p4", ACCEPTED, "precision=fp32"),
    ("hardware=h200", ACCEPTED, "hardware.stack=cuda130"),
    ("hardware=h200", ACCEPTED, "strategy.kernels=fused"),
    ("hardware=ascend910c", ACCEPTED, "cluster.devices_per_node=4"),
    ("stage=lm", "stage.checkpoint=run"),
    ("stage=evaluate", "model=llava_1_5_7b"),
    ("hardware=h200", ACCEPTED, *LLAVA),
    ("hardware=h200", ACCEPTED, *LLAVA, "stage=lora"),
    ("hardware=rtx3090", ACCEPTED, *LLAVA, "stage=lora", "strategy=zero3", "run.evaluation.batch=8"),
    ("hardware=h200", ACCEPTED, "cluster=example"),
    ("data=files", "data.train=a.json", "data.images=photos", "data.max_length=128"),
    (
        "cluster.secrets=[HF_TOKEN,HTTPS_PROXY]",
        "cluster.environment.TOKENIZERS_PARALLELISM=true",
        "cluster.environment.HTTP_PROXY=http://p:1",
    ),
    ("cluster.delivery.index=https://ann:pass@mirror.example/simple",),
    ("cluster.user=ann", "cluster.shm_size=lots", "cluster.mounts=[a]"),  # docker's, and there is no docker
    (*DOCKER, "cluster.user=0:0", "cluster.shm_size=1.5GiB", "cluster.ulimits={memlock: '-1', nofile: '1024:-1'}", "cluster.mounts=[/a]"),
    (*DOCKER, "cluster.delivery.kind=pull", "cluster.delivery.registry=registry.example:5000/team/a"),
    ("run.evaluation.enabled=false",),
    ("run.keep_best=loss", "run.evaluation.every=5", "run.evaluation.loss=true"),
    ("run.keep_best=loss", "stage=evaluate", "stage.checkpoint=run"),
)


@pytest.mark.parametrize("overrides", PASSES, ids=" ".join)
def test_launchable(overrides: tuple[str, ...]) -> None:
    verdict = judge(*overrides)
    assert (verdict.problems, verdict.ok, verdict.launchable) == ((), True, True)


def test_what_a_person_reads() -> None:
    overrides = ("hardware=p4", ACCEPTED, "precision=bf16", "stage=lm", "run.steps=0")
    assert "\n".join(map(str, judge(*overrides).problems)) == (
        "  precision: NVIDIA Tesla P4 has no bfloat16: torch would emulate it, slowly, and still report it as supported\n"
        "    would pass: precision=fp16  or  precision=fp32\n"
        "  run.steps: 0 is out of range; it must be at least 1\n"
        "    would pass: run.steps=1\n"
        "  stage.checkpoint: stage lm starts from trained weights, but Tiny LLaVA starts from random ones: give a run that trained it\n"
        "    would pass: stage.checkpoint=RUN_ID  or  stage.checkpoint=FOLDER  or  stage=full"
    )


def test_a_stack_of_another_family_says_so() -> None:
    (problem,) = [problem for problem in judge("hardware.accelerator=cuda").problems if problem.key == "hardware.stack"]
    assert problem.what == "stack cpu is for cpu devices, but hardware.accelerator is cuda"


def test_a_secret_is_not_in_the_refusal() -> None:
    text = str(judge("cluster.environment.HF_TOKEN=hf_x1y2", "cluster.environment.P=http://ann:pa55@p").problems)
    assert "hf_x1y2" not in text and "pa55" not in text


def test_memory_is_refused_with_numbers() -> None:
    (problem,) = judge("hardware=rtx3090", ACCEPTED, *LLAVA).problems
    assert str(problem) == (
        "  strategy: the peak takes 63.9 GiB on each device (zero3), which has 24: 56.9 model states, 6.9 activations, buffers and runtime; "
        "with states offloaded, up to 177.4 GiB of a node's host memory are taken, which was not checked: hardware.host_memory_gib is not set\n"
        "    would pass: strategy=zero2 strategy.offload_optimizer=true  or  "
        "strategy=zero3 strategy.offload_optimizer=true strategy.offload_parameters=true  or  stage=lora"
    )


def test_a_change_that_the_host_cannot_hold_is_not_offered() -> None:
    (problem,) = judge("hardware=rtx3090", ACCEPTED, *LLAVA, "hardware.host_memory_gib=64").problems
    assert problem.changes and not any("offload" in change for change in problem.changes)


def judge_to_come(*overrides: str) -> Verdict:
    """With a model whose file says that the trainer lacks its module."""
    config = compose(overrides, ROOT / "conf")
    return check(replace(config, model=replace(config.model, ready=False, pending="its module is still to come")), stacks())


def test_what_only_stops_a_launch_leaves_a_plan() -> None:
    verdict = judge_to_come("hardware=ascend910b", "model=omnilmm_3b", "stage=lora", "cluster=example")
    assert verdict.ok and not verdict.launchable
    assert [(problem.key, problem.launch_only) for problem in verdict.problems] == [
        ("cluster.delivery.accept_licence", True),
        ("model", True),
    ]
    assert "the trainer cannot train OmniLMM 3B (MiniCPM-V 1.0) yet: its module is still to come" in str(verdict.problems[1])


def test_force_records_what_could_be_tried_and_nothing_else() -> None:
    verdict = judge("hardware=p4", ACCEPTED, "precision=bf16", "run.force='measuring emulation'")
    assert verdict.launchable and [problem.key for problem in verdict.forced] == ["precision"]
    hopeless = judge_to_come("run.force=please", "cluster.devices_per_node=3", "stage=lm", "run.steps=0", "hardware.stack=none")
    assert {"stage.global_batch", "run.steps", "model", "hardware.stack"} <= {problem.key for problem in hopeless.problems}
    assert hopeless.forced == ()


def test_a_long_run_that_saves_nothing_is_noted() -> None:
    saves = "run.save_every=0: nothing is saved before the end, and a run that is killed is lost; run.save_every=N saves every Nth step"
    assert saves in judge("hardware=h200", *LLAVA).notes
    for overrides in ((), ("hardware=h200", *LLAVA, "run.save_every=100"), ("hardware=h200", *LLAVA, "stage=evaluate")):
        assert saves not in judge(*overrides).notes


def test_notes_stop_nothing() -> None:
    verdict = judge("hardware=h200", "cluster.runtime=process", *LLAVA, "run.save_every=100")
    assert verdict.launchable
    assert verdict.notes == (
        "licence of LLaVA-1.5 7B: Llama 2 Community License (commercial use: conditions; LLaVA README.md)",
        "model.source.revision is empty: the main branch of llava-hf/llava-1.5-7b-hf may change between two runs",
    )


def test_fused_kernels_are_refused_where_a_stack_lacks_them() -> None:
    """As one of a user's own may."""
    config = compose(("hardware=h200", *DOCKER, "strategy.kernels=fused"), ROOT / "conf")
    stack = stacks()[config.hardware.stack]
    poorer = replace(stack, packages={name: version for name, version in stack.packages.items() if name != "liger-kernel"})
    found = [problem for problem in check(config, stacks() | {stack.name: poorer}).problems if problem.key == "strategy.kernels"]
    assert len(found) == 1 and stack.name in found[0].what and "strategy.kernels=auto" in found[0].changes
