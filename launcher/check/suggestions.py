"""The memory verdict, and what would fit instead: changes in the order of their cost, each checked with the same numbers and rules."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from launcher.check.adapters import DEFAULT_GROUPS, base_groups_are_frozen, quantized_base_is_possible
from launcher.check.answering_changes import describe_fewer_bits, fewest_questions, list_answering_changes
from launcher.check.change import Change, set_values as set_values, write_override as write_override
from launcher.check.precision import masters_suit_strategy, rounding_suits, state_bits_suit
from launcher.check.problem import Problem, Rule
from launcher.check.recipe import TEXT_TOKENS, batch_divides, offload_is_possible, strategy_suits_devices
from launcher.check.strategy import Estimates, Resolved, resolve
from launcher.config.defaults import keys_of
from launcher.config.schema import GROUPS, Config
from launcher.image.stack import Stack
from launcher.memory.estimate import SURE_SHARE, Memory, split_weights, total
from launcher.memory.states import AVERAGE, DTYPE_BYTES, GIB, packed_groups, world_size
from launcher.memory.tokens import largest_image, smallest_image_tokens
from trainer.contract import Lora

MOST_CHANGES = 4
LARGEST_PARTS = 3
MOST_OF_A_COST = 2  # so that a change of each kind is offered where one fits
ALSO_CHECKED: tuple[Rule, ...] = (
    offload_is_possible,
    masters_suit_strategy,
    strategy_suits_devices,
    rounding_suits,
    state_bits_suit,
    quantized_base_is_possible,
    base_groups_are_frozen,
    batch_divides,
)


def memory_fits(config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    """The peak of the device with the highest peak against the device's memory, and the items of the host against the host's memory where
    that is known."""
    yield from check_memory(resolve(config), stacks)


def check_memory(resolved: Resolved, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    memory = resolved.memory
    if memory is not None and memory.limit_bytes is not None and not memory.fits:
        yield refuse_memory(resolved, memory, stacks)


def refuse_memory(resolved: Resolved, memory: Memory, stacks: Mapping[str, Stack], *, short_bytes: int = 0) -> Problem:
    """`memory`: what does not fit. `short_bytes`: by how much the arithmetic is known to be too low, which the changes must leave free."""
    found = find_changes(resolved, stacks, short_bytes=short_bytes)
    config = resolved.config
    split = (
        "" if config.stage.kind == "train" else f"{describe_split(config)}\n    assumed: {memory.assumption}{describe_fewer_bits(config)}"
    )
    none = "" if any(change.cost != "hardware" for change, _ in found) or split else describe_nothing(config, memory)
    what = f"{describe_need(config, memory)}{describe_host(memory, [other for _, other in found])}{split}{none}"
    return Problem(key="strategy", what=what, changes=tuple(str(change) for change, _ in found), forcible=True)


def describe_nothing(config: Config, memory: Memory) -> str:
    """That no change of the run is enough, and which parts are the largest."""
    parts = sorted((item for item in memory.items if item.size_bytes), key=lambda item: -item.size_bytes)[:LARGEST_PARTS]
    listed = ", ".join(f"{item.name} {item.size_bytes / GIB:.1f}" for item in parts)
    return f"\n    no strategy, precision or length that is known here fits on {config.hardware.title}; the largest parts, in GiB: {listed}"


def describe_host(memory: Memory, offered: Sequence[Memory]) -> str:
    """What the offered changes need of the host's memory; '' where that is what lacks, since only changes that fit there are offered then."""
    offloaded = max((other.host_bytes for other in offered if other.offloads), default=0)
    if not offloaded or memory.total_bytes <= memory.share * (memory.limit_bytes or 0):
        return ""
    of = "" if memory.host_limit_bytes else ", which was not checked: hardware.host_memory_gib is not set"
    return f"; with states offloaded, up to {offloaded / GIB:.1f} GiB of a node's host memory are taken{of}"


def describe_need(config: Config, memory: Memory) -> str:
    limit = memory.limit_bytes or 0
    if memory.total_bytes <= memory.share * limit:
        return (
            f"up to {memory.host_bytes / GIB:.1f} GiB of a node's host memory are taken ({list_host_items(memory)}), which has "
            f"{config.hardware.host_memory_gib:g}; the kernel would kill a rank, with exit code 137"
        )
    states = total(item for item in memory.items if item.name in ("weights", "gradients", "optimizer", AVERAGE))
    strategy = f" ({config.strategy.name})" if config.stage.kind == "train" else ""  # without training, every rank has the whole model
    most = f", of which {memory.share:.0%} may be taken" if memory.total_bytes <= limit else ""
    return (
        f"the peak takes {memory.total_bytes / GIB:.1f} GiB on each device{strategy}, which has {limit / GIB:g}{most}: "
        f"{states / GIB:.1f} model states, {(memory.total_bytes - states) / GIB:.1f} activations, buffers and runtime"
        f"{describe_weights(config)}"
    )


def describe_weights(config: Config) -> str:
    """The weights by group where some are in NF4, which says what is not; '' for others."""
    packed, parameters = packed_groups(config), config.model.parameters
    if not packed:
        return ""
    groups = {name: count for name in GROUPS if (count := getattr(parameters, name))}
    kept = {name: count for name, count in groups.items() if name not in packed}
    width = DTYPE_BYTES[config.precision.weights]
    listed = ", ".join(f"{name} {count * width / GIB:.1f}" for name, count in sorted(kept.items(), key=lambda item: -item[1]))
    return f" (in NF4: the linear layers of {' and '.join(packed)}; in {config.precision.weights}: {listed})"


def list_host_items(memory: Memory) -> str:
    return "; ".join(f"{item.name} {item.size_bytes / GIB:.1f}" for item in memory.host_items)


def describe_split(config: Config) -> str:
    """Whole layers over several devices, for a model that only answers."""
    cards, each = split_weights(set_values(config, fewest_questions(config)))  # with more, the batch and not the model decides
    return f"; whole layers over {cards} devices (device_map) would put {each / GIB:.1f} GiB of weights on each" if cards > 1 else ""


def find_changes(resolved: Resolved, stacks: Mapping[str, Stack], *, short_bytes: int = 0) -> tuple[tuple[Change, Memory], ...]:
    """At most MOST_CHANGES that fit with `short_bytes` more and that the other rules accept, cheapest first. Values are set in the config
    as it was asked, so that what the user left open is resolved again, as it will be with the override."""
    config, found = resolved.asked, list[tuple[Change, Memory]]()
    estimates: dict[str, Estimates] = {repr({}): dict(resolved.estimates)}  # by the values that are not of the strategy
    for change in (*list_changes(config, resolved.config), *hardware_changes(config)):
        if change.cost == "hardware" and any(other.cost != "hardware" for other, _ in found):
            break
        if sum(other.cost == change.cost for other, _ in found) == MOST_OF_A_COST:
            continue
        if any(other.shown.items() <= change.shown.items() for other, _ in found):  # a part of this change is enough
            continue
        if answers(config, change) and any(other.values.keys() <= change.values.keys() for other, _ in found):  # a larger value fits
            continue
        rest = {key: value for key, value in change.values.items() if not key.startswith("strategy.")}
        other = resolve(set_values(config, change.values), estimates.setdefault(repr(rest), {}))
        memory = other.memory
        if memory is None or not replace(memory, total_bytes=memory.total_bytes + short_bytes).fits:
            continue
        if not any(problem for rule in ALSO_CHECKED for problem in rule(other.config, stacks)):
            found.append((change, memory))
    return tuple(found[:MOST_CHANGES])


def find_roomier(resolved: Resolved, stacks: Mapping[str, Stack]) -> tuple[str, ...]:
    """Overrides that bring a tight peak below SURE_SHARE, except for other hardware."""
    limit = resolved.memory.limit_bytes or 0 if resolved.memory else 0
    found = find_changes(resolved, stacks, short_bytes=int((1 - SURE_SHARE) * limit))
    return tuple(str(change) for change, _ in found if change.cost != "hardware")


def answers(config: Config, change: Change) -> bool:
    return config.stage.kind != "train" and change.cost != "hardware"


def list_changes(config: Config, resolved: Config) -> Iterator[Change]:
    if config.stage.kind != "train":
        yield from list_answering_changes(config)
        return
    yield from (Change(cost="speed", values=values) for values in faster_first(resolved) if may_shard(config, values))
    yield from quality_changes(config)
    yield from context_changes(config)


def may_shard(config: Config, values: Mapping[str, Any]) -> bool:
    """On one device ZeRO shards nothing; it is only useful for offloading."""
    return world_size(config) > 1 or "strategy.name" not in values or "strategy.offload_optimizer" in values


def faster_first(resolved: Config) -> Iterator[dict[str, Any]]:
    one = {"strategy.micro_batch": 1} if resolved.strategy.micro_batch != 1 else {}
    again = {"strategy.gradient_checkpointing": True} if not resolved.strategy.gradient_checkpointing else {}
    yield from (values for values in (one, again, {**one, **again}) if values)
    for values in SHARDING:  # every file of conf/strategy except auto.yaml turns checkpointing off
        yield {**values, "strategy.gradient_checkpointing": False}
        yield {**values, "strategy.gradient_checkpointing": True}


# From the fastest to the slowest.
SHARDING: tuple[dict[str, Any], ...] = (
    {"strategy.name": "zero1"},
    {"strategy.name": "zero2"},
    {"strategy.name": "zero3"},
    {"strategy.name": "zero2", "strategy.offload_optimizer": True},
    {"strategy.name": "zero3", "strategy.offload_optimizer": True, "strategy.offload_parameters": True},
)
# Offered where nothing else fits: hardware=NAME, with the values of conf/hardware/NAME.yaml that the estimate uses.
LARGER_KEYS = ("accelerator", "collectives", "memory_gib", "devices_per_node", "device_multiple", "context_gib", "fragmentation")
LARGER: dict[str, dict[str, Any]] = {
    name: {f"hardware.{key}": value for key, value in zip(LARGER_KEYS, values, strict=True)}
    for name, values in {
        "rtx3090": ("cuda", "nccl", 24, 2, 1, 0.5, 0.08),
        "ascend910b": ("npu", "hccl", 64, 8, 1, 1.5, 0.05),
        "h200": ("cuda", "nccl", 131, 8, 1, 0.7, 0.05),
    }.items()
}
PURE_BF16 = {
    **dict.fromkeys(("precision.weights", "precision.compute", "precision.optimizer", "precision.gradients"), "bfloat16"),
    "precision.name": "pure_bf16",
    "precision.loss_scaling": "none",
    "precision.rounding": "stochastic",
}
# conf/stage/lora.yaml, which stage=lora selects.
ADAPTER = Lora(
    r=16,
    alpha=32,
    dropout=0.05,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    rank_stabilised=False,
)


NF4 = {"stage.lora.base": "nf4"}


def quality_changes(config: Config) -> Iterator[Change]:
    """Each by itself, then with gradient checkpointing."""
    precision, stage = config.precision, config.stage
    offered: list[tuple[dict[str, Any], str]] = []
    if (precision.weights, precision.optimizer) == ("bfloat16", "float32"):
        offered.append((PURE_BF16, "precision=pure_bf16"))
    if precision.optimizer == "float32" and not stage.optimizer.state_bits:
        offered.append(({"stage.optimizer.state_bits": 8}, "stage.optimizer.state_bits=8"))
    if stage.lora is not None:
        offered += (({**({} if stage.lora.base else NF4), **more}, text) for more, text in fewer_bits(config))
    if stage.lora is None and config.model.source.kind != "random":
        values = {"stage.lora": ADAPTER, "stage.trainable": (), "stage.global_batch": 16, "stage.needs": ("checkpoint", "projector")}
        offered.append((values, "stage=lora"))
        offered += (({**values, **NF4, **more}, f"stage=lora {text}") for more, text in fewer_bits(set_values(config, values)))
    yield from offload_changes(config)
    for values, override in offered:
        yield Change(cost="quality", values=values, override=override)
        checkpointed = {**values, "strategy.gradient_checkpointing": True}
        yield Change(cost="quality", values=checkpointed, override=f"{override} strategy.gradient_checkpointing=true")


def fewer_bits(config: Config) -> Iterator[tuple[dict[str, Any], str]]:
    """Frozen layers in NF4: of the language model, and then of the vision tower too."""
    lora, both = config.stage.lora, {"stage.lora.base_groups": ("lm", "vision")}
    if lora is None:
        return
    base = "" if lora.base else "stage.lora.base=nf4"
    if base:
        yield {}, base
    if "vision" not in lora.base_groups:
        yield both, f"{base} stage.lora.base_groups=[lm,vision]".strip()


def offload_changes(config: Config) -> Iterator[Change]:
    """States in host memory, for a recipe whose optimizer DeepSpeedCPUAdam does not have: it rounds to nearest, and has no 8-bit states. ZeRO 3,
    for a base in NF4, which it cannot shard."""
    own: dict[str, Any] = {}
    if config.precision.rounding != "nearest":
        own["precision.rounding"] = "nearest"
    if config.stage.optimizer.state_bits:
        own["stage.optimizer.state_bits"] = 0
    packed = config.stage.lora is not None and bool(config.stage.lora.base)
    if packed:
        own["stage.lora.base"] = ""
    if packed and config.stage.lora and config.stage.lora.base_groups != DEFAULT_GROUPS:
        own["stage.lora.base_groups"] = DEFAULT_GROUPS
    for values in SHARDING if own else ():
        if "strategy.offload_optimizer" in values or (packed and values["strategy.name"] == "zero3" and world_size(config) > 1):
            for recomputed in (False, True):
                yield Change(cost="quality", values={**values, "strategy.gradient_checkpointing": recomputed, **own})


def hardware_changes(config: Config) -> Iterator[Change]:
    asks = config.stage.kind != "train"
    with_it = fewest_questions(config) if asks else {**SHARDING[-1], "strategy.gradient_checkpointing": True}
    for values in ({}, with_it):
        more = " ".join(map(write_override, values.items()))
        for name, numbers in LARGER.items():
            if name != config.hardware.name:
                yield Change(cost="hardware", values={**numbers, **values}, override=f"hardware={name} {more}".rstrip())


def context_changes(config: Config) -> Iterator[Change]:
    """Smaller images for families that cut them into tiles, then shorter rows, never shorter than an image and its question."""
    data, rule = config.data, config.model.image_tokens
    smaller: dict[str, Any] = {}
    if rule.rule in ("tiles", "slices") and (data.max_tiles or rule.maximum) > 1:
        smaller = {"data.max_tiles": 1}
        yield Change(cost="context", values=smaller)
    least = smallest_image_tokens(rule) if rule.rule == "grid" or smaller else largest_image(config)[0]
    checkpointed = {} if config.strategy.gradient_checkpointing else {"strategy.gradient_checkpointing": True}
    for length in (data.max_length // 2, data.max_length // 4):
        if length >= least + TEXT_TOKENS:
            yield Change(cost="context", values={**smaller, "data.max_length": length})
            yield Change(cost="context", values={**smaller, "data.max_length": length, **checkpointed})


def with_typed_hardware(problem: Problem, overrides: Sequence[str]) -> Problem:
    """hardware=NAME selects a whole file, but a typed key of the old hardware, as hardware.memory_gib=14, would still override it. The change
    then includes the new value of that key."""
    typed = keys_of(overrides)
    return replace(problem, changes=tuple(change + "".join(_typed_values(change, typed)) for change in problem.changes))


def _typed_values(change: str, typed: Set[str]) -> Iterator[str]:
    numbers = LARGER.get(change.partition(" ")[0].removeprefix("hardware="), {}) if change.startswith("hardware=") else {}
    return (f" {key}={value}" for key, value in numbers.items() if key in typed)


def write_memory_notes(resolved: Resolved) -> Iterator[str]:
    """What fits during a step but may not at another moment. It refuses nothing."""
    memory = resolved.memory
    if memory is None or memory.limit_bytes is None or not memory.fits:
        return
    limit = memory.limit_bytes
    if memory.start_bytes > limit:
        yield (
            f"at the start each device takes {memory.start_bytes / GIB:.1f} GiB of its {limit / GIB:g}: its share of the model, and the "
            "largest tensor whole"
        )


MEMORY_RULES: tuple[Rule, ...] = (memory_fits,)
