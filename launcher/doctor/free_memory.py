"""Whether a plan fits into the memory that is free on its nodes, which overrides the data sheet. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.check.strategy import Resolved, is_countable
from launcher.check.suggestions import find_changes
from launcher.config.schema import Config
from launcher.doctor.device_checks import NO_DEVICES, used
from launcher.doctor.findings import CheckedNode, CheckResult, failed, passed, unchecked, warned
from launcher.doctor.node_facts import GIB
from launcher.doctor.offers import asked_config, offer
from launcher.memory.estimate import SURE_SHARE, Memory, estimate_memory
from launcher.plan.host_memory import list_needed

END_PROCESSES, TOO_SMALL = "end the processes that use it on the node", "take nodes with larger devices"
MORE_MEMORY = "end processes that use memory on the node, or take nodes with more memory"


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """In GiB: of the device with the least free memory that the run takes on a node, None where its tool does not print sizes; and of the
    node itself."""

    free_gib: float | None
    total_gib: float | None
    host_gib: float


def find_free_memory(checked: CheckedNode) -> FreeMemory:
    sizes = [
        (device.memory_total_gib - (device.memory_used_gib or 0.0), device.memory_total_gib)
        for device in used(checked)
        if device.memory_total_gib is not None
    ]
    free, total = min(sizes) if sizes and len(sizes) == len(used(checked)) else (None, None)
    return FreeMemory(free_gib=free, total_gib=total, host_gib=checked.facts.memory_available_gib)


def check_fit(checked: CheckedNode) -> CheckResult:
    """The plan's peak against the memory that is free now. With run.force it is only a warning."""
    config, free = checked.plan.config, find_free_memory(checked)
    if not used(checked):
        return unchecked(NO_DEVICES)
    if free.free_gib is None:
        size = config.hardware.memory_gib
        assumed = "the peak was not compared with anything" if size is None else f"the plan assumes hardware.memory_gib={size:g}"
        return unchecked(f"the tool of the devices does not print the size of their memory; {assumed}")
    if not is_countable(config):
        return unchecked("numbers of the config are out of range")
    memory = memory_within(config, free)
    text = f"the peak takes {memory.total_bytes / GIB:.1f} GiB, {free.free_gib:.1f} of {free.total_gib:.1f} are free"
    short = memory.host_bytes > free.host_gib * GIB
    if memory.offloads or short:
        text += f"; up to {memory.host_bytes / GIB:.1f} GiB are taken of the node's own memory{list_needed(config, memory)}, {free.host_gib:.1f} are free"
    if memory.is_tight:
        return warned(f"{text}: tight, the estimate may be off by {1 - SURE_SHARE:.0%}", END_PROCESSES)
    if memory.fits:
        return passed(text)
    if config.run.force:
        return warned(f"{text}; forced: {config.run.force}", END_PROCESSES)
    first = END_PROCESSES if memory.total_bytes <= (free.total_gib or 0) * GIB else TOO_SMALL
    if short and memory.total_bytes <= memory.share * free.free_gib * GIB:
        first = MORE_MEMORY
    return failed(text, "  or  ".join((first, *offer_fitting(checked, free))))


def offer_fitting(checked: CheckedNode, free: FreeMemory) -> tuple[str, ...]:
    """Overrides with which the plan fits. Where the strategy was left open, the size comes first: it is then chosen for what is free."""
    sizes = {"hardware.memory_gib": int((free.free_gib or 0) * 10) / 10, "hardware.host_memory_gib": int(free.host_gib)}
    if fitting := offer(checked, sizes):
        return (fitting,)
    config, asked = (with_free_memory(each, free) for each in (checked.plan.config, asked_config(checked.plan)))
    resolved = Resolved(asked=asked, config=config, memory=estimate_memory(config))
    found = find_changes(resolved, {config.hardware.stack: checked.stack})
    size = "" if asked == config else " ".join(f"{key}={value:g}" for key, value in sizes.items()) + " "
    return tuple(f"{size}{change}" for change, _ in found if change.cost != "hardware")


def with_free_memory(config: Config, free: FreeMemory) -> Config:
    hardware = replace(config.hardware, memory_gib=free.free_gib, host_memory_gib=free.host_gib)
    return replace(config, hardware=hardware)


def memory_within(config: Config, free: FreeMemory) -> Memory:
    """The estimate and verdict for a node that has this much free."""
    return estimate_memory(with_free_memory(config, free))


def least_free(nodes: Iterable[CheckedNode]) -> FreeMemory | None:
    """The least of all working nodes; None where one of them does not print sizes."""
    found = [find_free_memory(node) for node in nodes if node.rank is not None]
    if not found or any(free.free_gib is None for free in found):
        return None
    least = min(found, key=lambda free: free.free_gib or 0.0)
    return replace(least, host_gib=min(free.host_gib for free in found))
