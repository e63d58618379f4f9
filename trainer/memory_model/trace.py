"""The memory of one step, traced: forward pass, loss, backward pass and update of the real model, on tensors that take none.

What a single process can see is one rank that holds everything. What ZeRO leaves of it on each of N ranks is arithmetic over the tensors
that were alive (Rajbhandari et al., arXiv 1910.02054, section 3.1), moment by moment, and so are the buffers of DeepSpeed.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.contract import SCHEMA, InputRefused, TracePhase, TraceReport, TrainSpec
from trainer.device.dtype import DTYPES, loading_dtype
from trainer.distributed.engine import Engine
from trainer.memory_model.allocation_tracker import AllocationTracker, Moment
from trainer.memory_model.fake_tensors import FakeTensors, conversion_by_replacement, empty_weights, kernels_of_an_accelerator
from trainer.memory_model.sharding import Sharding, GradientHandling, shard_step
from trainer.memory_model.synthetic_batch import SyntheticBatch, make_synthetic_batch
from trainer.models import find_family
from trainer.models.family import Limit
from trainer.models.weight import round_weights
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import apply_stage

GRAIN_BYTES = {"cpu": 1, "cuda": 512, "npu": 512}  # what the caching allocators of torch and torch_npu round up to


def trace(spec: TrainSpec) -> TraceReport:
    """Raises InputRefused where the stage trains nothing or has weights in 4 bits, and where the trainer does not have the family."""
    if spec.stage.kind != "train":
        raise InputRefused(f"a trace is of a step of training, and stage {spec.stage.name} has none: name another with stage=NAME")
    if spec.stage.lora is not None and spec.stage.lora.base:
        raise InputRefused(
            f"stage.lora.base={spec.stage.lora.base}: weights in 4 bits are made on the device and cannot be traced; the plan counts them\n"
            "    plan without --trace, or trace with stage.lora.base=''"
        )
    began = time.process_time()
    family = find_family(spec.model.family)
    spec = replace(spec, model=replace(spec.model, attention="eager" if spec.model.attention == "eager" else "sdpa"))
    processor = family.create_processor(spec.model, Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles))
    drawn = make_synthetic_batch(processor, spec)
    phantom = FakeTensors()
    with phantom, conversion_by_replacement():
        model = build_empty(spec, phantom)
    sharding = shard_step(model, spec)
    ledger = AllocationTracker(sharding.shares, grain_bytes=GRAIN_BYTES[spec.device.accelerator])
    batch = {name: phantom.fake(value) if value.is_floating_point() else value for name, value in drawn.batch.items()}
    with phantom, kernels_as_in(spec), ledger:
        take_step(model, batch, spec, ledger, sharding)
    return report(spec, model, drawn, ledger, sharding, cpu_seconds=time.process_time() - began)


def build_empty(spec: TrainSpec, phantom: FakeTensors) -> torch.nn.Module:
    """The model as trainer.programs.dispatch makes it for its first step, every parameter fake."""
    family, dtype = find_family(spec.model.family), loading_dtype(spec.precision)
    model = round_weights(family.create(spec.model), dtype)
    if spec.gradient_checkpointing:
        checkpoint_layers(model, spec)
    staged = apply_stage(model, spec, family.unused(model))
    empty_weights(staged.model, phantom, dtype)
    return staged.model


@contextmanager
def kernels_as_in(spec: TrainSpec) -> Iterator[None]:
    """Those of the CPU are traced as they are, for a run on the CPU: dropout keeps more there. Its attention is flash attention too. Under
    ZeRO 3 DeepSpeed has a linear of its own, which keeps the inputs of frozen weights too."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap if spec.partitioned else before
    try:
        with kernels_of_an_accelerator(dropout=spec.device.accelerator != "cpu"):
            yield
    finally:
        torch.nn.functional.linear = before


def take_step(model: torch.nn.Module, batch: Mapping[str, Tensor], spec: TrainSpec, ledger: AllocationTracker, sharding: Sharding) -> None:
    """Under an active ledger: a step after the first, which finds the optimizer's states there. Fake or real tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.assign(tensor, "weights")
    for tensor in batch.values():
        ledger.assign(tensor, "inputs")
    ledger.add("optimizer", sharding.optimizer_bytes)
    ledger.add("gradients", sharding.standing_bytes)
    bucket = Bucket(ledger, sharding)
    handles = keep_gradients(model, spec, ledger, way=sharding.way, bucket=bucket)
    with holding(ledger, "gathered weights", sharding.gathered_bytes):
        with ledger.during("forward", "activations"):
            loss = forward_of(model, spec)(dict(batch)) / max(1, int((batch["labels"] != -100).sum()))
        with ledger.during("backward", "backward pass"):
            loss.backward()  # type: ignore[no-untyped-call]
            ledger.add("gradients", sharding.arriving_bytes)
            with holding(ledger, "communication", sharding.reduction_bytes):
                ledger.look()
            bucket.close()
    del loss
    with ledger.during("update", "update"), holding(ledger, "update", sharding.update_bytes):
        ledger.look()
    for handle in handles:
        handle.remove()


@contextmanager
def holding(ledger: AllocationTracker, kind: str, size: int) -> Iterator[None]:
    """Bytes of which there is no tensor."""
    ledger.add(kind, size)
    try:
        yield
    finally:
        ledger.add(kind, -size)


def forward_of(model: torch.nn.Module, spec: TrainSpec) -> Callable[[dict[str, Tensor]], Tensor]:
    """The engine's own loss, over the model in place of DeepSpeed's wrapper, which gives it its floats in the model's dtype."""
    dtype = loading_dtype(spec.precision)

    def handle(**inputs: Any) -> Any:
        return model(**{name: cast(value, dtype) for name, value in inputs.items()})

    model.train()
    return Engine(handle=handle, model=model, device=torch.device("cpu"), rank=0, world_size=1, loss_chunk=spec.loss_chunk).loss_sum


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Bucket:
    """What gradients go through on their way to other ranks: opened by the first of them, unless it stands."""

    def __init__(self, ledger: AllocationTracker, sharding: Sharding) -> None:
        self.ledger, self.size, self.stands = ledger, sharding.bucket_bytes, sharding.bucket_stands
        self.is_open = False
        if self.stands:
            self.open()

    def open(self) -> None:
        if not self.is_open:
            self.is_open = True
            self.ledger.add("communication", self.size)

    def close(self) -> None:
        if self.is_open and not self.stands:
            self.is_open = False
            self.ledger.add("communication", -self.size)


def keep_gradients(model: torch.nn.Module, spec: TrainSpec, ledger: AllocationTracker, *, way: GradientHandling, bucket: Bucket) -> list[Any]:
    """Each gradient, as soon as it is whole, goes its `way` (Sharding.way). Returns the hooks, which hold those that stay."""
    dtype, kept = DTYPES[spec.precision.gradients], list[Tensor]()

    def keep(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        bucket.open()
        if way != "kept":
            parameter.grad = None
        if way != "moved":
            gradient = gradient if way == "kept" else gradient.to(dtype)
            ledger.assign(gradient, "gradients")
            kept.append(gradient)

    return [p.register_post_accumulate_grad_hook(keep) for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------------------- report


def report(
    spec: TrainSpec, model: torch.nn.Module, drawn: SyntheticBatch, ledger: AllocationTracker, sharding: Sharding, *, cpu_seconds: float
) -> TraceReport:
    phases = tuple(describe(name, ledger.peaks[name]) for name in ("forward", "backward", "update"))
    highest = max(phases, key=lambda phase: phase.peak_bytes)
    return TraceReport(
        schema=SCHEMA,
        torch=torch.__version__,
        peak_bytes=highest.peak_bytes,
        peak_phase=highest.phase,
        phases=phases,
        host_bytes=sharding.host_bytes * spec.device.devices_per_node,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sharding.trainable,
        samples=spec.batch.micro_batch,
        length=spec.data.max_length,
        images=spec.batch.micro_batch if drawn.image_size else 0,
        image_size=drawn.image_size,
        image_tokens=drawn.image_tokens,
        trained_tokens=drawn.trained_tokens,
        cpu_seconds=round(cpu_seconds, 1),
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=(*notes_of(spec, drawn), *sharding.notes),
    )


def describe(name: Any, moment: Moment) -> TracePhase:
    return TracePhase(phase=name, peak_bytes=moment.total_bytes, items_bytes=dict(moment.kinds_bytes))


def notes_of(spec: TrainSpec, drawn: SyntheticBatch) -> Iterator[str]:
    yield "tensors alone: the context of the device, what its allocator wastes and the work space of its kernels come on top"
    if not drawn.image_size:
        yield f"no image: not even a small one fits into data.max_length={spec.data.max_length}"
    if spec.data.packing or spec.data.padding_free:
        yield "packed rows are traced as single samples of their length"
