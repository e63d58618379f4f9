"""The host's memory that a run needs: offloaded states, models while they load, and on a CPU everything. What is not known is asked, not assumed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from launcher.check.evaluation import settle_evaluation
from launcher.check.override import Compose
from launcher.check.problem import Problem, Rule
from launcher.check.rules import Verdict, check
from launcher.check.strategy import Resolved, resolve
from launcher.check.suggestions import find_changes, list_host_items
from launcher.config.defaults import keys_of
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.estimate import SURE_SHARE, Memory, total
from launcher.memory.states import GIB, device_count, ranks_per_node
from trainer.contract.wording import plural

RUNTIME = "its processes, libraries and the data come on top"


def judge(
    config: Config,
    stacks: Mapping[str, Stack],
    rules: tuple[Rule, ...],
    compose: Compose | None,
    own_bytes: int,
    overrides: Sequence[str] = (),
) -> tuple[Verdict, Resolved, str]:
    """The verdict of all rules and of this machine's memory, the config with its strategy resolved, and what was set for its evaluation.
    `overrides`: as the user typed them."""
    resolved, said = settle_evaluation(resolve(config), keys_of(overrides))
    verdict = check(resolved.asked, stacks, rules=rules, resolved=resolved, compose=compose)
    return with_own_memory(verdict, resolved, own_bytes, stacks), resolved, said


def with_own_memory(verdict: Verdict, resolved: Resolved, own_bytes: int, stacks: Mapping[str, Stack]) -> Verdict:
    """The verdict with what this machine cannot hold: a run on its CPU, whose memory is that of the machine. `own_bytes` 0 = not known."""
    problems = tuple(refuse_own_memory(resolved, own_bytes, stacks))
    if not problems:
        return replace(verdict, tight=verdict.tight or own_bytes_taken(resolved) > SURE_SHARE * own_bytes > 0)
    if resolved.config.run.force:
        return replace(verdict, forced=(*verdict.forced, *problems))
    return replace(verdict, ok=False, launchable=False, problems=(*verdict.problems, *problems))


def own_bytes_taken(resolved: Resolved) -> int:
    """Of this machine's memory, by a run on its CPU; 0 for any other."""
    taken = resolved.memory.total_bytes if resolved.memory else 0
    return taken * ranks_per_node(resolved.config) if is_on_own_cpu(resolved.config) else 0


def is_on_own_cpu(config: Config) -> bool:
    """Whether the run is on this machine's CPU, whose memory is then the device's."""
    return config.hardware.accelerator == "cpu" and config.cluster.is_local and config.hardware.memory_gib is None


def refuse_own_memory(resolved: Resolved, own_bytes: int, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    config, memory = resolved.config, resolved.memory
    ranks = ranks_per_node(config)
    if memory is None or not own_bytes or own_bytes_taken(resolved) <= own_bytes:
        return
    share = own_bytes / ranks / GIB
    asked, taken = (replace(each, hardware=replace(each.hardware, memory_gib=share)) for each in (resolved.asked, config))
    limited = replace(resolved, asked=asked, config=taken, estimates={})
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    what = f"the peak takes {memory.total_bytes / GIB:.1f} GiB{each}, and this machine has {own_bytes / GIB:.1f} GiB of memory; {RUNTIME}"
    changes = tuple(str(change) for change, _ in find_changes(limited, stacks))
    yield Problem(key="hardware", what=what, changes=changes, forcible=True)


def host_bytes(config: Config, memory: Memory) -> int:
    """Of a node's own memory, at most: the items of the host, and on a CPU everything that its ranks take."""
    on_cpu = memory.total_bytes * ranks_per_node(config) if config.hardware.accelerator == "cpu" else 0
    return memory.host_bytes + on_cpu


def list_needed(config: Config, memory: Memory) -> str:
    """` (model while it loads 6.4)`: what host_bytes is made of; '' for nothing."""
    ranks = ranks_per_node(config)
    own = (
        f"{plural(ranks, 'rank')} {memory.total_bytes * ranks / GIB:.1f}"
        if config.hardware.accelerator == "cpu" and memory.total_bytes
        else ""
    )
    found = "; ".join(filter(None, (list_host_items(memory), own)))
    return f" ({found})" if found else ""


def describe_host(config: Config, memory: Memory, own_bytes: int = 0) -> str:
    """What a node's host memory must hold, and whether that is known to fit; '' where it must hold nothing."""
    needed = total(memory.host_items)
    if not needed:
        return ""
    text = f"up to {needed / GIB:.1f} GiB of each node's own memory ({list_host_items(memory)})"
    if memory.host_limit_bytes is not None:
        return f"{text}, which has {memory.host_limit_bytes / GIB:g}"
    if config.cluster.is_local and own_bytes:
        fits = "" if needed <= own_bytes else ": too little, if the run is for this machine"
        return f"{text}; this machine has {own_bytes / GIB:.1f}{fits}"
    return f"{text}: not checked, because hardware.host_memory_gib is not set. omnilaunch doctor asks the nodes"


def asks_for_host(config: Config, memory: Memory, own_bytes: int = 0) -> bool:
    """Whether the plan depends on a host memory that is not known to be there: states are offloaded to it, or the models that the ranks load need
    more than all devices of the node have, which hosts usually have at least."""
    known = memory.host_limit_bytes if memory.host_limit_bytes is not None else own_bytes if config.cluster.is_local else 0
    if known:
        return total(memory.host_items) > known
    devices = (memory.limit_bytes or 0) * device_count(config)
    return memory.offloads or total(memory.host_items) > devices > 0
