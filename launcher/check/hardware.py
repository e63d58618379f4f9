"""Rules about what the target has: kernels, devices, collectives, and a stack that is built for the chip and the nodes."""

from collections.abc import Iterator, Mapping
from typing import Literal

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.errors import suggest
from launcher.image.licence import OVERRIDE, how_to_accept
from launcher.image.stack import Stack
from launcher.memory.states import device_count

BACKEND = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
HANG_GRACE_S = 30  # trainer.train.watchdog.GRACE_S
HANG_MARGIN_S = 60  # for ranks whose collective began before the step in which another rank hangs
LIGER = "liger-kernel"
# Kernels of attention that only some devices have -> accelerator, least compute capability and the package that has them.
# flash-attn needs Ampere, flash-attn-3 Hopper (Dao-AILab/flash-attention, README); CANN has its own.
ATTENTION: dict[str, tuple[str, int, str]] = {
    "flash2": ("cuda", 80, "flash-attn"),
    "flash3": ("cuda", 90, "flash-attn-3"),
    "npu_fusion": ("npu", 0, ""),
}
ATTENTION_KEY = "hardware.capability.attention"
FAMILY = {"cpu": "cpu", "cuda": "cuda", "npu": "ascend"}

# ---------------------------------------------------------------------------------------------------------------- kernels


def lacks_kernels(config: Config) -> str:
    """Why the chip has no fused kernels (trainer/kernels/fused.py), '' where it has some."""
    hardware = config.hardware
    if hardware.accelerator == "cpu":
        return "there are fused kernels for CUDA and NPU devices only; on a CPU they are no faster than torch's own"
    if hardware.accelerator == "cuda" and not hardware.capability.compile:
        return f"liger-kernel is written in Triton, which does not compile for {hardware.title} ({hardware.architecture})"
    return ""


def choose_kernels(config: Config) -> Literal["auto", "plain", "fused"]:
    """The value for the trainer: `auto` is decided there by the installed packages, unless the chip has no fused kernels."""
    return "plain" if config.strategy.kernels == "auto" and lacks_kernels(config) else config.strategy.kernels


def kernels_exist(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    key, stack = "strategy.kernels", stacks.get(config.hardware.stack)
    changes = (f"{key}=auto", f"{key}=plain")
    if config.strategy.kernels != "fused":
        return
    if why := lacks_kernels(config):
        yield Problem(key=key, what=why, changes=changes)
    elif config.hardware.accelerator == "cuda" and config.cluster.runtime == "docker" and stack and LIGER not in stack.packages:
        what = (
            f"stack {stack.name} has no {LIGER}: add it to packages in its row of images/versions.yaml, then run omnilaunch image refresh"
        )
        yield Problem(key=key, what=what, changes=changes)


def attention_is_named(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    if not config.hardware.capability.attention:
        what = "is empty, but the trainer needs a kernel: the first in the list is used"
        yield Problem(key=ATTENTION_KEY, what=what, changes=(f"{ATTENTION_KEY}=[sdpa]",))


def attention_suits(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    """Every kernel of the list is one that the chip can have; the first, which is used, is in the image."""
    stack, given = stacks.get(config.hardware.stack), config.hardware.capability.attention
    wrong = {name: why for name in given if (why := lacks_attention(config, name))}
    kept = ",".join(name for name in given if name not in wrong) or "sdpa"
    if wrong:
        yield Problem(key=ATTENTION_KEY, what="; ".join(wrong.values()), changes=(f"{ATTENTION_KEY}=[{kept}]",))
    elif given and stack and config.cluster.runtime == "docker":
        package = ATTENTION.get(given[0], ("", 0, ""))[2]
        if package and package not in stack.packages:
            what = f"{given[0]} needs the package {package}, which is in no image; sdpa, torch's own kernel, has flash attention where the chip has it"
            yield Problem(key=ATTENTION_KEY, what=what, changes=(f"{ATTENTION_KEY}=[sdpa]",))


def lacks_attention(config: Config, name: str) -> str:
    """Why the chip cannot have this kernel, '' where it can."""
    hardware = config.hardware
    accelerator, least, _ = ATTENTION.get(name, (hardware.accelerator, 0, ""))
    if hardware.accelerator != accelerator:
        return f"{name} is a kernel for {accelerator} devices; {hardware.title} is {hardware.accelerator}"
    digits = hardware.architecture.removeprefix("sm_")
    if least and digits.isdecimal() and int(digits) < least:
        return f"{name} needs sm_{least} or newer; {hardware.title} is {hardware.architecture}"
    return ""


# ------------------------------------------------------------------------------------------------------ devices and hosts


def devices_exist(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    hardware, wanted = config.hardware, device_count(config)
    # On the CPU a device is a rank, and a node runs any number of them.
    if hardware.accelerator != "cpu" and wanted > hardware.devices_per_node:
        what = f"{wanted} devices per node, but a node with {hardware.title} has {hardware.devices_per_node}"
        changes = (f"cluster.devices_per_node={hardware.devices_per_node}", f"hardware.devices_per_node={wanted}")
        yield Problem(key="cluster.devices_per_node", what=what, changes=changes)


def devices_are_whole(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    multiple, wanted = config.hardware.device_multiple, device_count(config)
    if multiple > 1 and wanted % multiple:
        what = f"{wanted} devices per node, but a job gets {config.hardware.title} in whole modules of {multiple}"
        fewer, more = wanted - wanted % multiple, wanted - wanted % multiple + multiple
        counts = [count for count in (fewer, more) if 0 < count <= config.hardware.devices_per_node]
        changes = tuple(f"cluster.devices_per_node={count}" for count in counts)
        yield Problem(key="cluster.devices_per_node", what=what, changes=changes, forcible=True)


def host_architecture_is_supported(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    hardware, stack, nodes = config.hardware, stacks.get(config.hardware.stack), config.cluster.nodes
    served = [name for name in hardware.host_architectures if stack is None or name in stack.host_architectures]
    wrong = [index for index, node in enumerate(nodes) if node.architecture not in served]
    if wrong:
        names = ", ".join(sorted({nodes[index].architecture for index in wrong}))
        what = f"{hardware.title} with stack {hardware.stack} does not support hosts with {names}; it supports {', '.join(served)}"
        changes = tuple(" ".join(f"cluster.nodes.{index}.architecture={name}" for index in wrong) for name in served)
        yield Problem(key="cluster.nodes.architecture", what=what, changes=changes)


def collectives_suit(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    hardware, backend = config.hardware, BACKEND[config.hardware.accelerator]
    if hardware.collectives != backend:
        what = f"{hardware.collectives} does not work with {hardware.accelerator} devices; {backend} does"
        yield Problem(key="hardware.collectives", what=what, changes=(f"hardware.collectives={backend}",))


def timeouts_are_ordered(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """HCCL_CONNECT_TIMEOUT < HCCL_EXEC_TIMEOUT < torch's own timeout: the shorter one reports which rank is missing."""
    names = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    environment = {**config.hardware.environment, **config.cluster.environment}
    keys = {name: f"{'cluster' if name in config.cluster.environment else 'hardware'}.environment.{name}" for name in names}
    text = {name: environment.get(name, "0") for name in names}
    for name in (name for name in names if not text[name].isdecimal()):
        yield Problem(key=keys[name], what=f"{text[name]!r} is not a number of seconds", changes=(f"{keys[name]}=1800",))
    connect_s, execute_s = (int(value) if value.isdecimal() else 0 for value in text.values())
    longest_s = max(connect_s, execute_s)
    if execute_s and connect_s >= execute_s:
        key = keys["HCCL_CONNECT_TIMEOUT"]
        either = (f"{key}={execute_s - 30}", f"{keys['HCCL_EXEC_TIMEOUT']}={connect_s + 30}")
        yield Problem(key=key, what=f"{connect_s} s must be below HCCL_EXEC_TIMEOUT, {execute_s} s", changes=either)
    if longest_s >= config.run.collective_timeout_s:
        what = f"{config.run.collective_timeout_s} s must be above HCCL's own {longest_s} s, else torch ends the run before HCCL reports the missing rank"
        changes = (f"run.collective_timeout_s={longest_s + 60}",)
        yield Problem(key="run.collective_timeout_s", what=what, changes=changes, forcible=True)


def hang_is_reported_first(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """The trainer reports and ends a hung step before a collective times out, because that error on every rank would hide which one hangs."""
    hang_s, environment = config.run.hang_timeout_s, {**config.hardware.environment, **config.cluster.environment}
    limits = {"run.collective_timeout_s": config.run.collective_timeout_s}
    if config.hardware.collectives == "hccl" and (text := environment.get("HCCL_EXEC_TIMEOUT", "")).isdecimal() and int(text):
        limits["HCCL_EXEC_TIMEOUT"] = int(text)
    name, limit_s = min(limits.items(), key=lambda item: item[1])
    if hang_s and hang_s + HANG_GRACE_S >= limit_s:
        what = f"{hang_s} s and {HANG_GRACE_S} s until the ranks end must be below {name}, {limit_s} s, else the collective times out first"
        changes = (f"run.hang_timeout_s={max(0, limit_s - HANG_GRACE_S - HANG_MARGIN_S)}",)
        yield Problem(key="run.hang_timeout_s", what=what, changes=changes, forcible=True)


# ------------------------------------------------------------------------------------------------------------------ image


def stack_exists(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    if config.hardware.stack not in stacks:
        what = f"unknown stack {config.hardware.stack!r} (see images/versions.yaml); {suggest(config.hardware.stack, stacks)}"
        fitting = sorted(name for name, stack in stacks.items() if _serves(stack, config))
        yield Problem(key="hardware.stack", what=what, changes=tuple(f"hardware.stack={name}" for name in fitting))


def stack_serves_chip(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    hardware, stack = config.hardware, stacks.get(config.hardware.stack)
    if stack is None or _serves(stack, config):
        return
    fitting = tuple(f"hardware.stack={name}" for name, other in sorted(stacks.items()) if _serves(other, config))
    if stack.family != FAMILY[hardware.accelerator]:
        served = next(name for name, family in FAMILY.items() if family == stack.family)
        what = f"stack {stack.name} is for {served} devices, but hardware.accelerator is {hardware.accelerator}"
        yield Problem(key="hardware.stack", what=what, changes=fitting or (f"hardware.accelerator={served}",))
    else:
        built = ", ".join(stack.chip_architectures)
        what = f"torch {stack.torch} of stack {stack.name} is built for {built}; {hardware.title} needs {hardware.architecture}"
        yield Problem(key="hardware.stack", what=what, changes=fitting, forcible=True)


def _serves(stack: Stack, config: Config) -> bool:
    return stack.family == FAMILY[config.hardware.accelerator] and stack.covers(config.hardware.architecture)


def licence_is_accepted(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    stack, delivery = stacks.get(config.hardware.stack), config.cluster.delivery
    if config.cluster.runtime == "docker" and stack and stack.licence and not delivery.accept_licence:
        what = f"the image contains software under {stack.licence}: {how_to_accept(stack.licence)}"
        yield Problem(key="cluster.delivery.accept_licence", what=what, changes=(OVERRIDE,), launch_only=True)


HARDWARE_RULES: tuple[Rule, ...] = (
    kernels_exist,
    attention_is_named,
    attention_suits,
    devices_exist,
    devices_are_whole,
    host_architecture_is_supported,
    collectives_suit,
    timeouts_are_ordered,
    hang_is_reported_first,
    stack_exists,
    stack_serves_chip,
    licence_is_accepted,
)
