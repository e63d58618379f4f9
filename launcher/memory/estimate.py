"""The estimate: peak memory of the device that needs most, and of a node's host memory, item by item. Arithmetic only, in bytes.

Each item is `arithmetic` (computed from the numbers of the architecture), `calibrated` (a share or a constant that was measured or
assumed; its source is where it is defined) or `traced` (from launcher.plan.trace, which replaces computed items).
Peak = weights and optimizer + runtime + fragmentation + the largest sum of temporary items at five moments of a step (MOMENTS).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from launcher.config.schema import Config
from launcher.memory.activations import count_kept
from launcher.memory.answering import answer_items, answer_load
from launcher.memory.buffers import (
    HOST_FACTOR,
    MOMENTS,
    Moment,
    gather_bytes,
    gradient_moments,
    largest_tensor,
    lasting_gradient_bytes,
    loading_bytes,
    logits_bytes,
    runtime_bytes,
)
from launcher.memory.states import (
    DTYPE_BYTES,
    GIB,
    States,
    engine_stage,
    model_states,
    packs,
    streams,
    unpacked_bytes,
    weight_bytes,
    zero_stage,
)
from launcher.memory.tokens import Load, read_answer_load, read_evaluation_load, read_load

OFFLOADED = "offloaded states"
UNPACKED = "a layer out of NF4"
SET_ASIDE = "weights set aside"
SURE_SHARE = 0.95  # of a device's memory: a peak above it may not fit, because the estimate is within 5 % (docs/fit.md)
ANSWER_SHARE = SURE_SHARE  # that a stage may take which answers requests that are not known when it is planned
Basis = Literal["arithmetic", "calibrated", "traced"]


@dataclass(frozen=True, kw_only=True)
class Item:
    name: str
    size_bytes: int
    basis: Basis


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`items` add up to `total_bytes` on the device that needs most; `limit_bytes`: its memory, None = not known. `host_items` are those of one
    node, and `host_bytes` is their sum. `start_bytes`: what the device needs under ZeRO 3 while the model is loaded. `assumption`: about the
    sizes of the data. `share`: of the device's memory that may be taken."""

    items: tuple[Item, ...]
    total_bytes: int
    limit_bytes: int | None
    host_items: tuple[Item, ...]
    host_bytes: int
    host_limit_bytes: int | None
    start_bytes: int
    assumption: str
    share: float = 1.0

    @property
    def offloads(self) -> bool:
        """Whether states are in host memory."""
        return any(item.name == OFFLOADED for item in self.host_items)

    @property
    def fits(self) -> bool:
        return self.fits_within(self.share)

    @property
    def is_tight(self) -> bool:
        """Whether it fits by the estimate, but by less than the estimate may be off."""
        return self.fits and self.limit_bytes is not None and self.total_bytes > SURE_SHARE * self.limit_bytes

    def fits_within(self, share: float) -> bool:
        """Whether the peak takes at most `share` of the device's memory, and the host's items fit in its memory. An unknown size fits."""
        device = self.limit_bytes is None or self.total_bytes <= share * self.limit_bytes
        return device and (self.host_limit_bytes is None or self.host_bytes <= self.host_limit_bytes)


def estimate_memory(config: Config, *, states: States | None = None, load: Load | None = None) -> Memory:
    """At the peak of a training step, or of an answered batch. The strategy must be resolved: `auto` counts as unsharded, and a micro-batch
    of null as 1. `states`: model_states(config), if it is known already. `load`: of the batch, if it is not that of the config's stage."""
    states = states or model_states(config)
    hardware = config.hardware
    load = load or choose_load(config)
    trains = config.stage.kind == "train"  # an evaluation during training keeps its gradients
    fixed = tuple(item for item in count_items(states.items_bytes, "arithmetic") if not (trains and item.name == "gradients"))
    moving = tuple(item for item in moving_items(config, states, load) if item.size_bytes)
    spare = Item(name="fragmentation", size_bytes=int(hardware.fragmentation * total(moving)), basis="calibrated")
    runtime = Item(name="runtime", size_bytes=runtime_bytes(config, GIB), basis="calibrated")
    # On a CPU, a rank has no runtime apart from its process.
    items = (*fixed, *moving, spare, *((runtime,) if runtime.size_bytes else ()))
    host_items = tuple(count_host(config, states))
    start, _ = loading_bytes(config)
    return Memory(
        items=items,
        total_bytes=total(items),
        limit_bytes=None if hardware.memory_gib is None else int(hardware.memory_gib * GIB),
        host_items=host_items,
        host_bytes=total(host_items),
        host_limit_bytes=None if hardware.host_memory_gib is None else int(hardware.host_memory_gib * GIB),
        start_bytes=start + runtime.size_bytes if zero_stage(config) == 3 else 0,
        assumption="" if packs(config) or streams(config) else load.assumption,
        share=1.0 if trains else ANSWER_SHARE,
    )


def choose_load(config: Config) -> Load:
    """One micro-batch of a step, or one batch of questions."""
    if config.stage.kind == "train":
        return read_load(config, rows=config.strategy.micro_batch or 1)
    rows, most_new = answer_load(config)
    return read_answer_load(config, rows=rows, most_new=most_new)


def moving_items(config: Config, states: States, load: Load) -> tuple[Item, ...]:
    """Temporary items, at the moment of a step where their sum is largest; without training, those of a batch."""
    if streams(config):
        return ()
    if packs(config):
        tensor = largest_tensor(config) * DTYPE_BYTES[config.precision.weights]
        return (Item(name="layer at work", size_bytes=tensor, basis="arithmetic"),)
    if config.stage.kind != "train":
        return tuple(count_items({**answer_items(config, load), UNPACKED: unpacked_bytes(config)}, "arithmetic"))
    kept = count_kept(config, load)
    basis: Basis = "arithmetic" if kept.exact else "calibrated"
    gathered = Item(name="gathered weights", size_bytes=gather_bytes(config), basis="arithmetic")
    layer, loss = (
        Item(name="layer at work, or loss", size_bytes=size, basis="arithmetic") for size in (kept.layer, logits_bytes(config, load))
    )
    activations = (
        Item(name="activations, language", size_bytes=kept.lm, basis=basis),
        Item(name="activations, vision", size_bytes=kept.vision, basis="arithmetic"),
    )
    unpacked = Item(name=UNPACKED, size_bytes=unpacked_bytes(config), basis="arithmetic")
    others: dict[Moment, tuple[Item, ...]] = {
        "loss": (*activations, loss, gathered),
        "last layer": (*activations, layer, unpacked, gathered),
        "first layer": (layer, unpacked, gathered),
        "reduction": (gathered,),
        "update": (),
    }
    gradients = gradient_moments(config, states)
    return max((tuple(count_items(gradients[moment], "arithmetic")) + others[moment] for moment in MOMENTS), key=total)


def count_items(sizes: Mapping[str, int], basis: Basis) -> Iterator[Item]:
    return (Item(name=name, size_bytes=size, basis=basis) for name, size in sizes.items())


def count_host(config: Config, states: States) -> Iterator[Item]:
    """Host memory of one node: offloaded states, their pinned buffers, and the models that its ranks load."""
    if states.host_bytes:
        yield Item(name=OFFLOADED, size_bytes=states.host_bytes, basis="arithmetic")
        yield Item(name="pinned buffers", size_bytes=int((HOST_FACTOR - 1) * states.host_bytes), basis="calibrated")
    if config.hardware.accelerator != "cpu" and not streams(config):
        yield Item(name="model while it loads", size_bytes=loading_bytes(config)[1], basis="arithmetic")


def answering_memory(config: Config) -> Memory:
    """An evaluation during training, with everything that training keeps between two steps."""
    training = model_states(config)
    items = {**training.items_bytes, "gradients": lasting_gradient_bytes(config, training)}
    items |= {SET_ASIDE: displaced} if (displaced := set_aside_bytes(config, training)) else {}
    evaluating = replace(config, stage=replace(config.stage, kind="evaluate"))
    rows, most_new = answer_load(evaluating)
    load = read_evaluation_load(config, rows=rows, most_new=most_new)
    return estimate_memory(evaluating, states=replace(training, items_bytes=items, total_bytes=sum(items.values())), load=load)


def set_aside_bytes(config: Config, training: States) -> int:
    """Trained weights that the averages displace while they are evaluated; where DeepSpeed keeps its own copy, they are made from that again."""
    optimizer = config.stage.optimizer
    displaced = optimizer.ema_decay and optimizer.ema_weights == "average" and not engine_stage(config)
    return training.trainable * DTYPE_BYTES[config.precision.weights] if displaced else 0


def split_weights(config: Config) -> tuple[int, int]:
    """(devices, bytes of weights on each) that would hold the model's layers for inference, with the temporary items of one device left free.
    (0, 0) if the device's memory is not known."""
    memory = estimate_memory(config)
    if memory.limit_bytes is None:
        return 0, 0
    weights = weight_bytes(config, config.model.parameters.total)
    free = memory.limit_bytes - (memory.total_bytes - total(item for item in memory.items if item.name == "weights"))
    devices = -(-weights // free) if free > 0 else 0
    return devices, -(-weights // devices) if devices else 0


def total(items: Iterator[Item] | tuple[Item, ...]) -> int:
    return sum(item.size_bytes for item in items)
