"""Traces the memory of one step: forward pass, loss, backward pass and update of the real model, on tensors without memory.

A single process sees one rank that holds everything. The share of each of N ranks under ZeRO (Rajbhandari et al., arXiv 1910.02054, section
3.1) is computed from the tensors that are alive, moment by moment, and so are the buffers of DeepSpeed.
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
from trainer.memory_model.sharding import GradientHandling, Sharding, shard_step
from trainer.memory_model.synthetic_batch import SyntheticBatch, make_synthetic_batch
from trainer.models import find_family
from trainer.models.family import Limit
from trainer.models.weight import round_weights
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import apply_stage

GRAIN_BYTES = {"cpu": 1, "cuda": 512, "npu": 512}  # the caching allocators of torch and torch_npu round up to multiples of this


def trace(spec: TrainSpec) -> TraceReport:
    """Raises InputRefused if the stage does not train or has 4-bit weights, and if the trainer does not have the family."""
    if spec.stage.kind != "train":
        raise InputRefused(f"a trace needs a training step, and stage {spec.stage.name} has none: name another with stage=NAME")
    if spec.stage.lora is not None and spec.stage.lora.base:
        raise InputRefused(
            f"stage.lora.base={spec.stage.lora.base}: 4-bit weights are created on the device and cannot be traced; the plan estimates them\n"
            "    plan without --trace, or trace with stage.lora.base=''"
        )
    began = time.process_time()
    family = find_family(spec.model.family)
    spec = replace(spec, model=replace(spec.model, attention="eager" if spec.model.attention == "eager" else "sdpa"))
    processor = family.create_processor(spec.model, Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles))
    synthetic = make_synthetic_batch(processor, spec)
    fakes = FakeTensors()
    with fakes, conversion_by_replacement():
        model = build_empty(spec, fakes)
    sharding = shard_step(model, spec)
    tracker = AllocationTracker(sharding.shares, grain_bytes=GRAIN_BYTES[spec.device.accelerator])
    batch = {name: fakes.fake(value) if value.is_floating_point() else value for name, value in synthetic.batch.items()}
    with fakes, kernels_as_in(spec), tracker:
        take_step(model, batch, spec, tracker, sharding)
    return report(spec, model, synthetic, tracker, sharding, cpu_seconds=time.process_time() - began)


def build_empty(spec: TrainSpec, fakes: FakeTensors) -> torch.nn.Module:
    """The model as trainer.train.model builds it for the first step, with fake parameters."""
    family, dtype = find_family(spec.model.family), loading_dtype(spec.precision)
    model = round_weights(family.create(spec.model), dtype)
    if spec.gradient_checkpointing:
        checkpoint_layers(model, spec)
    staged = apply_stage(model, spec, family.unused(model))
    empty_weights(staged.model, fakes, dtype)
    return staged.model


@contextmanager
def kernels_as_in(spec: TrainSpec) -> Iterator[None]:
    """Accelerators' kernels, unless the run is on the CPU: dropout keeps more there. Attention is flash attention in either case. Under ZeRO 3
    DeepSpeed replaces torch's linear by one that also keeps the inputs of frozen weights."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap if spec.partitioned else before
    try:
        with kernels_of_an_accelerator(dropout=spec.device.accelerator != "cpu"):
            yield
    finally:
        torch.nn.functional.linear = before


def take_step(model: torch.nn.Module, batch: Mapping[str, Tensor], spec: TrainSpec, tracker: AllocationTracker, sharding: Sharding) -> None:
    """With an active tracker: a step after the first one, so that the optimizer's states exist. Works on fake and real tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.assign(tensor, "weights")
    for tensor in batch.values():
        tracker.assign(tensor, "inputs")
    tracker.add("optimizer", sharding.optimizer_bytes)
    tracker.add("gradients", sharding.buffer_bytes)
    bucket = Bucket(tracker, sharding)
    handles = handle_gradients(model, spec, tracker, gradient_handling=sharding.gradient_handling, bucket=bucket)
    with holding(tracker, "gathered weights", sharding.gathered_bytes):
        with tracker.during("forward", "activations"):
            loss = forward_of(model, spec)(dict(batch)) / max(1, int((batch["labels"] != -100).sum()))
        with tracker.during("backward", "backward pass"):
            loss.backward()  # type: ignore[no-untyped-call]
            tracker.add("gradients", sharding.late_buffer_bytes)
            with holding(tracker, "communication", sharding.reduction_bytes):
                tracker.update_peak()
            bucket.close()
    del loss
    with tracker.during("update", "update"), holding(tracker, "update", sharding.update_bytes):
        tracker.update_peak()
    for handle in handles:
        handle.remove()


@contextmanager
def holding(tracker: AllocationTracker, kind: str, size: int) -> Iterator[None]:
    """Bytes without a tensor."""
    tracker.add(kind, size)
    try:
        yield
    finally:
        tracker.add(kind, -size)


def forward_of(model: torch.nn.Module, spec: TrainSpec) -> Callable[[dict[str, Tensor]], Tensor]:
    """The engine's own loss, with the model instead of DeepSpeed's wrapper, which casts floating-point inputs to the model's dtype."""
    dtype = loading_dtype(spec.precision)

    def handle(**inputs: Any) -> Any:
        return model(**{name: cast(value, dtype) for name, value in inputs.items()})

    model.train()
    return Engine(handle=handle, model=model, device=torch.device("cpu"), rank=0, world_size=1, loss_chunk=spec.loss_chunk).loss_sum


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Bucket:
    """The communication buffer for gradients: allocated with the first gradient, unless it is permanent."""

    def __init__(self, tracker: AllocationTracker, sharding: Sharding) -> None:
        self.tracker, self.size, self.is_permanent = tracker, sharding.bucket_bytes, sharding.bucket_is_permanent
        self.is_open = False
        if self.is_permanent:
            self.open()

    def open(self) -> None:
        if not self.is_open:
            self.is_open = True
            self.tracker.add("communication", self.size)

    def close(self) -> None:
        if self.is_open and not self.is_permanent:
            self.is_open = False
            self.tracker.add("communication", -self.size)


def handle_gradients(
    model: torch.nn.Module, spec: TrainSpec, tracker: AllocationTracker, *, gradient_handling: GradientHandling, bucket: Bucket
) -> list[Any]:
    """Handles each gradient, as soon as it is complete, as `gradient_handling` says. Returns the hooks, which also hold the kept gradients."""
    dtype, kept = DTYPES[spec.precision.gradients], list[Tensor]()

    def keep(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        bucket.open()
        if gradient_handling != "kept":
            parameter.grad = None
        if gradient_handling != "moved":
            gradient = gradient if gradient_handling == "kept" else gradient.to(dtype)
            tracker.assign(gradient, "gradients")
            kept.append(gradient)

    return [p.register_post_accumulate_grad_hook(keep) for p in model.parameters() if p.requires_grad]


def report(
    spec: TrainSpec,
    model: torch.nn.Module,
    synthetic: SyntheticBatch,
    tracker: AllocationTracker,
    sharding: Sharding,
    *,
    cpu_seconds: float,
) -> TraceReport:
    phases = tuple(describe(name, tracker.peaks[name]) for name in ("forward", "backward", "update"))
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
        length=synthetic.batch["input_ids"].shape[1],
        images=spec.batch.micro_batch if synthetic.image_size else 0,
        image_size=synthetic.image_size,
        image_tokens=synthetic.image_tokens,
        trained_tokens=synthetic.trained_tokens,
        cpu_seconds=round(cpu_seconds, 1),
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=(*list_notes(spec, synthetic), *sharding.notes),
    )


def describe(name: Any, moment: Moment) -> TracePhase:
    return TracePhase(phase=name, peak_bytes=moment.total_bytes, items_bytes=dict(moment.kinds_bytes))


def list_notes(spec: TrainSpec, synthetic: SyntheticBatch) -> Iterator[str]:
    yield "tensors only: the device's context, the allocator's overhead and the kernels' work space are not included"
    if not synthetic.image_size:
        yield f"no image: none fits into data.max_length={spec.data.max_length}"
    if spec.data.packing or spec.data.padding_free:
        yield "packed rows are traced as single samples of their length"
