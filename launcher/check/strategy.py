"""Resolves what the user left open: strategy `auto`, gradient checkpointing and micro-batch. The fastest that fits with a margin is taken.

The choice is made with the numbers of launcher.memory.estimate, which the plan prints. What the user sets is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from launcher.check.recipe import counted_options_are_numbers, numbers_in_range
from launcher.config.schema import Config, Strategy
from launcher.memory.estimate import SURE_SHARE, Memory, estimate_memory
from launcher.memory.states import GIB, model_states, world_size
from launcher.memory.tokens import read_load

STATES_SHARE = 0.7  # of the device's memory that `auto` gives to model states, at most; the rest is for activations
PEAK_SHARE = SURE_SHARE  # of the device's memory that `auto` uses at the peak, at most
TINY_PARAMETERS = 10_000_000
TINY_MICRO_BATCH = 64  # makes one micro-batch of a step of the digits run
MICRO_TOKENS = 16_384  # in a micro-batch, at most: matrix units are busy long before

StrategyName = Literal["single", "ddp", "zero1", "zero2", "zero3"]
BY_SHARDING: tuple[StrategyName, ...] = ("ddp", "zero1", "zero2", "zero3")
Estimates = dict[Strategy, Memory]  # of one config, for each strategy that was tried with it


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """`asked`: the config as the user gave it. `config`: the same with its strategy resolved. `memory`: the estimate for `config`, None
    where a number is out of range, so that nothing can be computed from it; check refuses such a config. `estimates`: of `asked`, for each
    strategy that was tried."""

    asked: Config
    config: Config
    memory: Memory | None
    estimates: Estimates = field(default_factory=dict)


def resolve(config: Config, estimates: Estimates | None = None) -> Resolved:
    """The strategy with `auto`, a null `gradient_checkpointing` and a null `micro_batch` resolved.

    Sharding costs communication, so the least sharded strategy that leaves room is taken; then gradient checkpointing, which costs a third
    more work; then offloading, where the size of the host memory is known. If nothing fits, it is the most sharded one, which `check`
    then refuses. `estimates`: those already known for this config; new ones are added, so that each is computed once.
    """
    asked = config.strategy
    if not is_countable(config):
        name = _names(config)[0] if asked.name == "auto" else asked.name
        micro_batch = 1 if asked.micro_batch is None else asked.micro_batch
        strategy = replace(asked, name=name, gradient_checkpointing=bool(asked.gradient_checkpointing), micro_batch=micro_batch)
        return Resolved(asked=config, config=replace(config, strategy=strategy), memory=None)
    known: Estimates = {} if estimates is None else estimates
    strategy = next((taken for taken in _candidates(config) if _has_room(config, taken, known)), None) or _last(config)
    if strategy.micro_batch is None:
        strategy = replace(strategy, micro_batch=choose_micro_batch(config, strategy, known))
    memory = estimate_once(config, strategy, known)
    return Resolved(asked=config, config=replace(config, strategy=strategy), memory=memory, estimates=known)


def estimate_once(config: Config, strategy: Strategy, known: Estimates) -> Memory:
    """The memory of `config` with this strategy. A micro-batch of null counts as 1."""
    if strategy.micro_batch is None:
        strategy = replace(strategy, micro_batch=1)
    if strategy not in known:
        known[strategy] = estimate_memory(replace(config, strategy=strategy))
    return known[strategy]


def is_countable(config: Config) -> bool:
    """Whether every number is in its range. `check` refuses other configs, and nothing is computed from them."""
    return not any(problem for rule in (numbers_in_range, counted_options_are_numbers) for problem in rule(config, {}))


def _has_room(config: Config, strategy: Strategy, known: Estimates) -> bool:
    """With a micro-batch of 1, unless the user set another. The share for states is applied only to strategies that `auto` chooses."""
    memory_gib = config.hardware.memory_gib
    if memory_gib is None:
        return True
    if config.strategy.name == "auto":
        states = model_states(replace(config, strategy=strategy))
        if states.total_bytes > STATES_SHARE * memory_gib * GIB:
            return False
    return estimate_once(config, strategy, known).fits_within(PEAK_SHARE)


def _candidates(config: Config) -> Iterator[Strategy]:
    """From the fastest to the one that takes the least memory."""
    asked, trains = config.strategy, config.stage.kind == "train"
    names: tuple[str, ...] = _names(config) if asked.name == "auto" else (asked.name,)
    checkpointing = (False, True) if asked.gradient_checkpointing is None and trains else (bool(asked.gradient_checkpointing),)
    for recomputed in checkpointing:
        for name in names:
            yield replace(asked, name=name, gradient_checkpointing=recomputed)  # type: ignore[arg-type]
    if asked.name == "auto" and can_offload(config):
        offloaded = replace(asked, name="zero2", gradient_checkpointing=checkpointing[-1], offload_optimizer=True)
        yield offloaded
        if can_shard_weights(config):
            yield replace(offloaded, name="zero3", offload_parameters=True)


def _names(config: Config) -> tuple[StrategyName, ...]:
    first: StrategyName = "zero3" if config.strategy.offload_parameters else "zero1" if needs_sharding(config) else "ddp"
    if world_size(config) <= 1 and first == "ddp":
        return ("single",)
    last = len(BY_SHARDING) if first == "zero3" or can_shard_weights(config) else BY_SHARDING.index("zero3")
    return BY_SHARDING[BY_SHARDING.index(first) : last]


def can_shard_weights(config: Config) -> bool:
    """ZeRO 3 cannot shard 4-bit weights (launcher.check.adapters, quantized_base_is_possible)."""
    return config.stage.lora is None or not config.stage.lora.base


def _last(config: Config) -> Strategy:
    asked = config.strategy
    recomputed = config.stage.kind == "train" if asked.gradient_checkpointing is None else asked.gradient_checkpointing
    name = _names(config)[-1] if asked.name == "auto" else asked.name
    return replace(asked, name=name, gradient_checkpointing=recomputed)


def needs_sharding(config: Config) -> bool:
    """Whether DeepSpeed needs ZeRO 1 to 3, even on one device: for an offloaded optimizer, or for masters in bfloat16
    (`bf16_master_weights_and_grads`, deepspeed/runtime/config.py)."""
    return config.strategy.offload_optimizer or config.precision.optimizer == "bfloat16"


def can_offload(config: Config) -> bool:
    """Whether `auto` may offload: the size of the host memory is known, and DeepSpeedCPUAdam has the states that are asked for."""
    hardware = config.hardware
    known = hardware.accelerator != "cpu" and hardware.host_memory_gib is not None
    return known and config.stage.kind == "train" and config.precision.rounding == "nearest" and not config.stage.optimizer.state_bits


def choose_micro_batch(config: Config, strategy: Strategy, known: Estimates) -> int:
    """Samples in a micro-batch of one rank: the largest divisor of the rank's part of the global batch that fits with the margin and stays
    below MICRO_TOKENS. It is 1 for a model of real size where the device's memory is not known, and for a global batch that the ranks
    cannot share, which `check` refuses."""
    per_rank, rest = divmod(config.stage.global_batch, max(1, world_size(config)))
    if rest or per_rank < 1:
        return 1
    tiny = config.model.parameters.total < TINY_PARAMETERS
    length = max(1, read_load(config, rows=1).length)
    real = 1 if config.hardware.memory_gib is None or config.stage.kind != "train" else max(1, MICRO_TOKENS // length)
    bound = min(TINY_MICRO_BATCH if tiny else real, per_rank)
    for size in range(bound, 1, -1):
        if per_rank % size == 0 and (tiny or estimate_once(config, replace(strategy, micro_batch=size), known).fits_within(PEAK_SHARE)):
            return size
    return 1


def explain_strategy(resolved: Resolved) -> str:
    """Why the strategy is what it is, in one line; '' where the user left nothing open."""
    asked, taken, memory = resolved.asked.strategy, resolved.config.strategy, resolved.memory
    if memory is None or not (asked.name == "auto" or asked.gradient_checkpointing is None or asked.micro_batch is None):
        return ""
    parts = [taken.name, f"micro-batch {taken.micro_batch}"]
    parts += ["gradient checkpointing"] if taken.gradient_checkpointing else []
    parts += ["states in host memory"] if taken.offload_optimizer else []
    text = ", ".join(parts)
    if memory.limit_bytes is None:
        return f"{text}: the device's memory is not known, so nothing was compared with it"
    share = memory.total_bytes / memory.limit_bytes
    rule = f"at most {STATES_SHARE:.0%} for states and {PEAK_SHARE:.0%} at the peak"
    if share <= PEAK_SHARE:
        return f"{text}: the fastest with {rule}; the peak takes {share:.0%}"
    return f"{text}: nothing fits with {rule}; the peak takes {share:.0%}, above the margin of {PEAK_SHARE:.0%}. A smaller data.max_length takes less"
