"""The strategy that `auto` stands for, checkpointing that is left open, and the micro-batch: the fastest that fits with a margin.

Chosen from the numbers of launcher.memory.estimate, which the plan prints. What the user sets is kept.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from launcher.check.recipe import counted_options_are_numbers, numbers_in_range
from launcher.config.schema import Config, Strategy
from launcher.memory.estimate import Memory, estimate_memory
from launcher.memory.states import GIB, model_states, world_size
from launcher.memory.tokens import read_load

STATES_SHARE = 0.7  # of the device's memory, at most, where `auto` chooses; the rest is for activations
PEAK_SHARE = 0.95  # of the device's memory, at most, where `auto` chooses: the formulas' aim is to be within 5 %
TINY_PARAMETERS = 10_000_000
TINY_MICRO_BATCH = 64  # the digits run: one micro-batch a step
MICRO_TOKENS = 16_384  # of a micro-batch, at most: matrix units are busy long before

StrategyName = Literal["single", "ddp", "zero1", "zero2", "zero3"]
BY_SHARDING: tuple[StrategyName, ...] = ("ddp", "zero1", "zero2", "zero3")


def choose_strategy(config: Config) -> Strategy:
    """The strategy with `auto`, a null `gradient_checkpointing` and a null `micro_batch` resolved; whatever else the user set is kept.

    Sharding costs communication, so the least sharded one is taken that leaves room; then layers are computed twice, a third more work;
    then states go to the host, where its size is known. Where nothing fits: the most sharded, which `check` then judges.
    """
    if not is_countable(config):
        asked = config.strategy
        name = _names(config)[0] if asked.name == "auto" else asked.name
        micro_batch = 1 if asked.micro_batch is None else asked.micro_batch
        return replace(asked, name=name, gradient_checkpointing=bool(asked.gradient_checkpointing), micro_batch=micro_batch)
    strategy = next(_fitting(config), None) or _last(config)
    config = replace(config, strategy=strategy)
    if strategy.micro_batch is not None:
        return strategy
    return replace(strategy, micro_batch=choose_micro_batch(config))


def is_countable(config: Config) -> bool:
    """Whether every number is in its range; `check` refuses the others, and nothing is computed from them."""
    return not any(problem for rule in (numbers_in_range, counted_options_are_numbers) for problem in rule(config, {}))


def _fitting(config: Config) -> Iterator[Strategy]:
    for strategy in _candidates(config):
        taken = replace(config, strategy=strategy)
        if _has_room(taken, named=config.strategy.name != "auto"):
            yield strategy


def _has_room(config: Config, *, named: bool) -> bool:
    """In a micro-batch of one, unless another is asked for. A strategy that the user `named` is held against its activations alone."""
    memory_gib = config.hardware.memory_gib
    if memory_gib is None:
        return True
    states = model_states(config)
    if not named and states.total_bytes > STATES_SHARE * memory_gib * GIB:
        return False
    return estimate_memory(config, states=states).fits_within(PEAK_SHARE)


def _candidates(config: Config) -> Iterator[Strategy]:
    """From the fastest to the one that takes the least memory."""
    asked = config.strategy
    names: tuple[str, ...] = _names(config) if asked.name == "auto" else (asked.name,)
    twice = (
        (False, True) if asked.gradient_checkpointing is None and config.stage.kind == "train" else (bool(asked.gradient_checkpointing),)
    )
    for again in twice:
        for name in names:
            yield replace(asked, name=name, gradient_checkpointing=again)  # type: ignore[arg-type]
    if asked.name == "auto" and can_offload(config):
        yield replace(asked, name="zero2", gradient_checkpointing=twice[-1], offload_optimizer=True)
    if asked.name == "auto" and can_offload(config) and can_cut_weights(config):
        yield replace(asked, name="zero3", gradient_checkpointing=twice[-1], offload_optimizer=True, offload_parameters=True)


def _names(config: Config) -> tuple[StrategyName, ...]:
    first: StrategyName = "zero3" if config.strategy.offload_parameters else "zero1" if needs_sharding(config) else "ddp"
    if world_size(config) <= 1 and first == "ddp":
        return ("single",)
    last = len(BY_SHARDING) if first == "zero3" or can_cut_weights(config) else BY_SHARDING.index("zero3")
    return BY_SHARDING[BY_SHARDING.index(first) : last]


def can_cut_weights(config: Config) -> bool:
    """ZeRO 3 cannot cut weights in 4 bits (launcher.check.adapters, quantised_base_is_possible)."""
    return config.stage.lora is None or not config.stage.lora.base


def _last(config: Config) -> Strategy:
    asked = config.strategy
    again = config.stage.kind == "train" if asked.gradient_checkpointing is None else asked.gradient_checkpointing
    name = _names(config)[-1] if asked.name == "auto" else asked.name
    return replace(asked, name=name, gradient_checkpointing=again)


def needs_sharding(config: Config) -> bool:
    """Whether DeepSpeed takes this with ZeRO 1 to 3 alone, be it on one device: an offloaded optimizer, or masters in bfloat16
    (`bf16_master_weights_and_grads`, deepspeed/runtime/config.py)."""
    return config.strategy.offload_optimizer or config.precision.optimizer == "bfloat16"


def can_offload(config: Config) -> bool:
    """Whether `auto` may: the host's size is known, and DeepSpeedCPUAdam has the states that are asked for."""
    hardware = config.hardware
    known = hardware.accelerator != "cpu" and hardware.host_memory_gib is not None
    return known and config.stage.kind == "train" and config.precision.rounding == "nearest" and not config.stage.optimizer.state_bits


def choose_micro_batch(config: Config) -> int:
    """Samples a rank takes at once: the largest divisor of its part of the global batch that fits with the margin, within a bound on
    tokens. 1 for a model of real size where the device's memory is not known, and for a batch that the ranks cannot share, which
    `check` refuses."""
    per_rank, rest = divmod(config.stage.global_batch, max(1, world_size(config)))
    if rest or per_rank < 1:
        return 1
    tiny = config.model.parameters.total < TINY_PARAMETERS
    length = max(1, read_load(config, rows=1).length)
    real = 1 if config.hardware.memory_gib is None or config.stage.kind != "train" else max(1, MICRO_TOKENS // length)
    bound = min(TINY_MICRO_BATCH if tiny else real, per_rank)
    sizes = (size for size in range(bound, 1, -1) if per_rank % size == 0)
    return next((size for size in sizes if tiny or memory_of(config, size).fits_within(PEAK_SHARE)), 1)


def memory_of(config: Config, micro_batch: int) -> Memory:
    return estimate_memory(replace(config, strategy=replace(config.strategy, micro_batch=micro_batch)))


def explain_strategy(config: Config, chosen: Config) -> str:
    """Why `chosen` has the strategy it has, in one line; '' where nothing was left open."""
    asked, taken = config.strategy, chosen.strategy
    left = (asked.name == "auto", asked.gradient_checkpointing is None, asked.micro_batch is None)
    if not any(left):
        return ""
    memory = estimate_memory(chosen)
    words = [taken.name, f"micro-batch {taken.micro_batch}"]
    words += ["layers computed twice"] if taken.gradient_checkpointing else []
    words += ["states in the host's memory"] if taken.offload_optimizer else []
    if memory.limit_bytes is None:
        return f"{', '.join(words)}: the device's memory is not known, and nothing was held against it"
    share = memory.total_bytes / memory.limit_bytes
    rule = f"at most {STATES_SHARE:.0%} for states and {PEAK_SHARE:.0%} at the peak"
    return (
        f"{', '.join(words)}: the fastest within {rule}; the peak takes {share:.0%}"
        if share <= PEAK_SHARE
        else f"{', '.join(words)}: nothing fits {rule}"
    )
