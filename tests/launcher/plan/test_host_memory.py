"""Host memory that is not known is asked, and this machine's is compared with what a run on its CPU needs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.memory.states import GIB
from launcher.plan.full import describe_verdict
from launcher.plan.host_memory import asks_for_host, describe_host
from launcher.plan.local_context import read_memory
from launcher.plan.plan import LocalContext, Plan, make_plan
from launcher.plan.short import describe_short

ROOT = Path(__file__).resolve().parents[3]
OFFLOADED = (
    "strategy=zero3",
    "strategy.offload_optimizer=true",
    "strategy.offload_parameters=true",
    "strategy.gradient_checkpointing=true",
)
ACCEPTED = "cluster.delivery.accept_licence=true"
FULL = ("hardware=rtx3090", "model=minicpm_o_2_6", "stage=full", *OFFLOADED, ACCEPTED)


def plan_here(*words: str, memory_gib: float) -> Plan:
    place = LocalContext(project=ROOT, here=ROOT, interpreter="python", user="0:0", memory_bytes=int(memory_gib * GIB))
    return make_plan(compose(words, ROOT / "conf"), load_stacks(ROOT / "images"), place, run_id="R", overrides=words)


def test_a_run_on_the_cpu_of_a_machine_that_is_too_small_is_refused() -> None:
    words = ("model=qwen2_5_vl_7b", "stage=infer", "stage.inference.prompt=What?")
    assert plan_here(*words, memory_gib=64).verdict.ok
    with pytest.raises(ConfigRefused, match=r"the peak takes 3\d\.\d GiB, and this machine has 24.0 GiB of memory") as refused:
        plan_here(*words, memory_gib=24)
    assert "precision=bf16" in str(refused.value)
    assert plan_here(*words, "precision=bf16", memory_gib=24).verdict.ok, "what is offered passes"
    assert plan_here(*words, "run.force=swap", memory_gib=24).verdict.forced


def test_an_unknown_memory_refuses_nothing() -> None:
    assert plan_here("model=qwen2_5_vl_32b", "stage=full", memory_gib=0).verdict.ok


def test_offloaded_states_on_nodes_of_unknown_size_are_a_question(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(*FULL, "cluster=example")
    text = " ".join(describe_short(plan).split())
    assert text.startswith("ok, if the nodes have the host memory that it needs (below)")
    assert "GiB of each node's own memory (offloaded states 64.8; pinned buffers 32.4" in text
    assert "not checked, because hardware.host_memory_gib is not set. omnilaunch doctor asks the nodes" in text
    assert "\nok, if the nodes have the host memory" in describe_verdict(plan)


def test_a_known_size_is_compared(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(*FULL, "hardware.host_memory_gib=512")
    assert "which has 512" in " ".join(describe_short(plan).split()) and describe_short(plan).startswith("ok: this run can be launched")


def test_this_machine_is_compared_for_a_run_on_it(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(*FULL)
    assert plan.memory is not None
    small, large = (describe_host(plan.config, plan.memory, int(size * GIB)) for size in (16, 500))
    assert "this machine has 16.0: too little, if the run is for this machine" in small and large.endswith("this machine has 500.0")
    assert asks_for_host(plan.config, plan.memory, 16 * GIB) and not asks_for_host(plan.config, plan.memory, 500 * GIB)


def test_models_that_load_are_a_question_only_where_they_need_more_than_the_devices_hold(plan_for: Callable[..., Plan]) -> None:
    usual = plan_for("hardware=h200", "model=qwen2_5_vl_7b", "stage=lora", ACCEPTED)
    assert describe_short(usual).startswith("ok: this run can be launched") and "model while it loads" in " ".join(
        describe_short(usual).split()
    )
    tight = replace(usual.config, hardware=replace(usual.config.hardware, memory_gib=15))
    assert usual.memory is not None
    assert asks_for_host(tight, replace(usual.memory, limit_bytes=15 * GIB))


def test_the_machine_says_how_much_memory_it_has() -> None:
    assert read_memory() > GIB / 2
