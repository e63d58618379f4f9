"""Whether a plan fits what its nodes really have free, which wins over the data sheet. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.check.strategy import is_countable
from launcher.config.schema import Config
from launcher.doctor.device_checks import NO_DEVICES, used
from launcher.doctor.findings import Case, CheckResult, fine, unchecked, warn, wrong
from launcher.doctor.node_facts import GIB
from launcher.memory.estimate import Memory, estimate_memory


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Of the fullest device that the run takes on a node, None where its tool says no size; and of the node's own memory. In GiB."""

    free_gib: float | None
    total_gib: float | None
    host_gib: float


def find_free_memory(case: Case) -> FreeMemory:
    sizes = [
        (device.memory_total_gib - (device.memory_used_gib or 0.0), device.memory_total_gib)
        for device in used(case)
        if device.memory_total_gib is not None
    ]
    free, total = min(sizes) if sizes and len(sizes) == len(used(case)) else (None, None)
    return FreeMemory(free_gib=free, total_gib=total, host_gib=case.facts.memory_available_gib)


def check_fit(case: Case) -> CheckResult:
    """The plan's peak against what is free there now. A run that is forced is tried."""
    config, headroom = case.plan.config, find_free_memory(case)
    if not used(case):
        return unchecked(NO_DEVICES)
    if headroom.free_gib is None:
        said = config.hardware.memory_gib
        assumed = "nothing was held against it" if said is None else f"taken for granted: hardware.memory_gib={said:g}"
        return unchecked(f"its tool says no size of memory; {assumed}")
    if not is_countable(config):
        return unchecked("numbers of the config are out of range")
    memory = memory_within(config, headroom)
    told = f"the peak takes {memory.total_bytes / GIB:.1f} GiB, {headroom.free_gib:.1f} of {headroom.total_gib:.1f} are free"
    if memory.host_bytes:
        told += f"; offloaded states take {memory.host_bytes / GIB:.1f} GiB of the node's own memory, {headroom.host_gib:.1f} are free"
    if memory.fits:
        return fine(told)
    if config.run.force:
        return warn(f"{told}; forced: {config.run.force}", "end what uses it there")
    sized = f"hardware.memory_gib={int(headroom.free_gib * 10) / 10:g} hardware.host_memory_gib={int(headroom.host_gib)}"
    return wrong(told, f"end what uses it there, or plan for what is free, which says what would fit: {sized}")


def with_free_memory(config: Config, headroom: FreeMemory) -> Config:
    hardware = replace(config.hardware, memory_gib=headroom.free_gib, host_memory_gib=headroom.host_gib)
    return replace(config, hardware=hardware)


def memory_within(config: Config, headroom: FreeMemory) -> Memory:
    """The verdict for a node that has this much free."""
    return estimate_memory(with_free_memory(config, headroom))


def tightest(cases: Iterable[Case]) -> FreeMemory | None:
    """Of all working nodes; None where one of them says no size."""
    found = [find_free_memory(case) for case in cases if case.rank is not None]
    if not found or any(headroom.free_gib is None for headroom in found):
        return None
    least = min(found, key=lambda headroom: headroom.free_gib or 0.0)
    return replace(least, host_gib=min(headroom.host_gib for headroom in found))
