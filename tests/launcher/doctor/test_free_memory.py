"""A plan and the memory that is free on its nodes, with recorded tables of npu-smi: one hardware file covers cards of 32 and of 64 GB."""

from collections.abc import Callable
from functools import cache

import pytest

from launcher.doctor.free_memory import memory_within
from launcher.errors import NodeFailed
from launcher.plan.host_memory import describe_host, host_bytes, list_needed
from launcher.plan.plan import Plan
from launcher.run.session import require_health
from tests.launcher.fake_nodes import GOLDEN, HOSTS, NPU, examined, found, healthy_nodes

PlanFor = Callable[..., Plan]
ONE_CARD = (*NPU, "cluster.devices_per_node=1", "cluster.nodes.0.devices=[0]", "cluster.nodes.1.devices=[0]")
LORA = (*ONE_CARD, "model=qwen2_5_vl_7b", "stage=lora", "tune=null", "data=files", "data.train=/d/a.json", "data.images=/d")
PLAIN = ("strategy=zero2", "strategy.micro_batch=1", "strategy.gradient_checkpointing=false", "data.max_length=2048")
SMALL, LARGE = "npu-26.0.rc1-910b4.txt", "npu-25.2.0-910b4-1.txt"


@pytest.fixture(scope="module")
def plan_for(plan_for: PlanFor) -> PlanFor:
    return cache(plan_for)


def answers(name: str) -> dict[str, str]:
    return {"devices": (GOLDEN / name).read_text()}


def test_a_card_of_32_gb_and_one_of_64_are_distinguished_by_their_tables(plan_for: PlanFor) -> None:
    """910B4 and 910B4-1 share one hardware file, and the plan assumes its 64 GiB."""
    plan = plan_for(*LORA, *PLAIN)
    assert plan.memory is not None and 30 < plan.memory.total_bytes / 2**30 < 60
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE), second=answers(SMALL)), launching=True)
    first, second = (found(examination, "fit", host) for host in HOSTS)
    assert first.level == "ok" and "60.6 of 64.0 are free" in first.evidence
    assert second.level == "error" and "29.2 of 32.0 are free" in second.evidence
    assert second.fix.startswith("take nodes with larger devices  or  strategy.gradient_checkpointing=true")
    with pytest.raises(NodeFailed, match=rf"(?s){HOSTS[1]}: fit.*29\.2 of 32\.0 are free") as refused:
        require_health(examination, print)
    assert f"{HOSTS[0]}: fit" not in str(refused.value)


def test_the_node_with_the_least_free_memory_decides(plan_for: PlanFor) -> None:
    plan = plan_for(*LORA, "strategy=zero2", "strategy.micro_batch=1", "strategy.gradient_checkpointing=true", "data.max_length=2048")
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE), second=answers(SMALL)), launching=True)
    assert {found(examination, "fit", host).level for host in HOSTS} == {"ok"}
    assert found(examination, "device_memory", HOSTS[1]).level == "warning"
    assert examination.free_memory is not None and examination.free_memory.total_gib == 32
    memory = memory_within(plan.config, examination.free_memory)
    assert memory.limit_bytes == pytest.approx((32768 - 2871) * 2**20) and memory.fits


def test_a_device_without_a_printed_size_leaves_the_data_sheet(plan_for: PlanFor) -> None:
    plan = plan_for(*LORA, *PLAIN)
    silent = {"devices": (GOLDEN / SMALL).read_text().replace("2871 / 32768", "0    / 0    ")}
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE), second=silent), launching=True)
    finding = found(examination, "fit", HOSTS[1])
    assert finding.level == "unchecked" and "the plan assumes hardware.memory_gib=64" in finding.evidence
    assert examination.free_memory is None


def test_a_forced_run_is_warned(plan_for: PlanFor) -> None:
    plan = plan_for(*LORA, *PLAIN, "run.force=measured")
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE), second=answers(SMALL)), launching=True)
    assert found(examination, "fit", HOSTS[1]).level == "warning"


def test_a_peak_that_nearly_fills_what_is_free_is_warned_of(plan_for: PlanFor) -> None:
    """As the plan calls a peak above 95 % of the device tight."""
    plan = plan_for(*LORA, *PLAIN)
    assert plan.memory is not None
    used = int((64 * 2**30 - plan.memory.total_bytes / 0.98) / 2**20)
    close = {"devices": (GOLDEN / SMALL).read_text().replace("2871 / 32768", f"{used} / 65536")}
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE), second=close), launching=True)
    finding = found(examination, "fit", HOSTS[1])
    assert finding.level == "warning" and "tight, the estimate may be off by 5%" in finding.evidence


def test_the_hosts_memory_is_the_figure_of_the_plan(plan_for: PlanFor) -> None:
    """The doctor counted offloaded states alone, and the plan their pinned buffers and the loading models too."""
    offloaded = ("strategy=zero2", "strategy.offload_optimizer=true", "strategy.micro_batch=1", "strategy.gradient_checkpointing=true")
    plan = plan_for(*LORA, *offloaded, "data.max_length=2048")
    assert plan.memory is not None
    said = describe_host(plan.config, plan.memory)
    needed = said.removeprefix("up to ").partition(" GiB")[0]
    for free, level in ((500, "ok"), (plan.memory.host_bytes / 2**30 - 1, "warning")):
        memory = {"memory": f"MemTotal: 528000000 kB\nMemAvailable: {int(free * 2**20)} kB\n"}
        examination = examined(plan, healthy_nodes(plan, first=answers(LARGE) | memory, second=answers(LARGE)), launching=True)
        finding = found(examination, "memory", HOSTS[0])
        assert finding.level == level and f"up to {needed} needed (offloaded states " in finding.evidence
        assert f"model while it loads {plan.memory.host_items[-1].size_bytes / 2**30:.1f})" in finding.evidence


def test_models_that_the_host_cannot_load_are_named_by_fit(plan_for: PlanFor) -> None:
    """It failed, and printed the devices' memory, which was enough."""
    plan = plan_for(*LORA, *PLAIN)
    assert plan.memory is not None and not plan.memory.offloads
    small = {"memory": "MemTotal: 8000000 kB\nMemAvailable: 8000000 kB\n"}
    examination = examined(plan, healthy_nodes(plan, first=answers(LARGE) | small, second=answers(LARGE)), launching=True)
    fit, memory = found(examination, "fit", HOSTS[0]), found(examination, "memory", HOSTS[0])
    assert fit.level == memory.level == "error"
    assert "GiB are taken of the node's own memory (model while it loads 15.4), 7.6 are free" in fit.evidence
    assert fit.fix.startswith("end processes that use memory on the node, or take nodes with more memory")
    assert "7.6 of 7.6 GiB free, up to 15.4 needed (model while it loads 15.4)" in memory.evidence


def test_on_a_cpu_the_ranks_are_what_takes_the_hosts_memory(plan_for: PlanFor) -> None:
    plan = plan_for("cluster.devices_per_node=2")
    assert plan.memory is not None and host_bytes(plan.config, plan.memory) == 2 * plan.memory.total_bytes
    assert list_needed(plan.config, plan.memory) == f" (2 ranks {2 * plan.memory.total_bytes / 2**30:.1f})"
