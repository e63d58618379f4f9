"""What one rank holds of a traced step: shares of the traced tensors, and the states and buffers for which no tensor is traced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trainer.contract import Dtype, TrainSpec
from trainer.device.dtype import DTYPES
from trainer.distributed.engine import FUSED
from trainer.optim.adamw import CHUNK, CHUNK_ELSEWHERE
from trainer.optim.blockwise import BLOCK

# Defaults of DeepSpeed 0.19.8, in elements (deepspeed/runtime/zero/config.py); values in the plan take precedence.
REDUCE_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000
FOREACH_TENSORS = 1  # AdamW without a fused kernel has one more tensor of each state's size, for the denominators (torch/optim/adam.py)
# Tensors of a chunk that trainer.optim.adamw and trainer.optim.adamw_8bit have in float32 at a time: weight, gradient, both moments, two
# results, random words and their sum.
CHUNK_TENSORS = 8

GradientHandling = Literal["kept", "converted", "moved"]


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Bytes of one rank. `shares`: kind -> the part of it that is on the device.

    `gradient_handling`: a complete gradient is kept as it is, converted to the dtype in which gradients are accumulated, or moved to a buffer.
    `buffer_bytes`: of gradient buffers that exist from the start; `late_buffer_bytes`: of one that is created at the end of the backward pass.
    `bucket_bytes`: for communication, from the first gradient to the last, or all the time if `bucket_is_permanent`. `reduction_bytes`: copies
    at the end of the backward pass. `gathered_bytes`: the most weights that ZeRO 3 gathers at a time."""

    shares: Mapping[str, float] = field(default_factory=dict)
    trainable: int = 0
    optimizer_bytes: int = 0
    gradient_handling: GradientHandling = "kept"
    buffer_bytes: int = 0
    late_buffer_bytes: int = 0
    gathered_bytes: int = 0
    bucket_bytes: int = 0
    bucket_is_permanent: bool = False
    reduction_bytes: int = 0
    update_bytes: int = 0
    host_bytes: int = 0
    notes: tuple[str, ...] = ()


def shard_step(model: torch.nn.Module, spec: TrainSpec) -> Sharding:
    zero = spec.zero
    stage, ranks = zero.get("stage", 0), spec.device.world_size
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    gradients = -(-trainable * DTYPES[spec.precision.gradients].itemsize // (ranks if stage >= 2 else 1))
    optimizer = optimizer_bytes(trained, spec, ranks=ranks if stage else 1, master=stage > 0)
    states_offloaded, weights_offloaded = (zero.get(name) is not None for name in ("offload_optimizer", "offload_param"))
    buffers, late_buffers = (0, 0) if states_offloaded else gradient_buffers(spec, stage, trainable, gradients)
    return Sharding(
        shares={"weights": (0 if weights_offloaded else 1 / ranks) if stage == 3 else 1.0},
        trainable=trainable,
        optimizer_bytes=0 if states_offloaded else optimizer,
        gradient_handling=choose_gradient_handling(spec, stage, offloaded=states_offloaded),
        buffer_bytes=buffers,
        late_buffer_bytes=late_buffers,
        gathered_bytes=gathered_bytes(model, zero) if stage == 3 else 0,
        bucket_bytes=bucket_bytes(spec, zero),
        bucket_is_permanent=stage == 3,
        reduction_bytes=reduction_bytes(trained, spec, zero),
        update_bytes=0 if states_offloaded else update_bytes(trained, spec, stage=stage),
        host_bytes=(optimizer + gradients if states_offloaded else 0) + (weights // ranks if weights_offloaded else 0),
        notes=("weights that ZeRO 3 gathers are counted at the most that DeepSpeed lets live at a time",) if stage == 3 else (),
    )


def gradient_buffers(spec: TrainSpec, stage: int, trainable: int, gradients: int) -> tuple[int, int]:
    """Sharding.buffer_bytes and late_buffer_bytes. There is a buffer if an earlier micro-batch has left gradients, in BF16_Optimizer (which also
    keeps the bfloat16 gradients, and sets them to zero), and in ZeRO 3 (grad_partitions_flat_buffer); ZeRO 2 creates its slice when it reduces."""
    again = spec.batch.accumulation > 1
    if uses_bf16_optimizer(spec):
        return gradients + (trainable * DTYPES[spec.precision.weights].itemsize if again else 0), 0
    if stage == 3 or again:
        return gradients, 0
    return 0, gradients if stage == 2 else 0


def choose_gradient_handling(spec: TrainSpec, stage: int, *, offloaded: bool) -> GradientHandling:
    if stage >= 2 or spec.batch.accumulation > 1 or offloaded:
        return "moved"
    return "kept" if uses_bf16_optimizer(spec) or spec.precision.gradients == spec.precision.weights else "converted"


def uses_bf16_optimizer(spec: TrainSpec) -> bool:
    """Stage 1 with bfloat16 weights and float32 gradients uses DeepSpeed's BF16_Optimizer (engine.py, _do_optimizer_sanity_check): every rank
    holds all gradients in float32 from the start, adds the bfloat16 ones at the end of a backward pass, reduces them in place, and updates
    from a view of its slice."""
    zero, precision = spec.zero, spec.precision
    types = (precision.weights, precision.gradients) == ("bfloat16", "float32")
    return types and zero.get("stage", 0) == 1 and zero.get("offload_optimizer") is None


def accumulates_flat(spec: TrainSpec) -> bool:
    """Whether ZeRO 1 or 2 accumulates gradients in the flat float32 tensor that it updates from (_use_compact_grad_partition_buffer)."""
    return spec.precision.gradients == "float32" != spec.precision.weights


def optimizer_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, *, ranks: int, master: bool) -> int:
    """Both moments of Adam, the master weights of DeepSpeed's ZeRO optimizers, and the float32 averages, of one of `ranks` slices."""
    size, elements = DTYPES[spec.precision.optimizer].itemsize, -(-sum(p.numel() for p in trained) // ranks)
    moment = elements + 4 * -(-elements // BLOCK) if spec.optimizer.state_bits == 8 else elements * size
    return 2 * moment + (elements * size if master else 0) + (4 * elements if spec.optimizer.ema_decay else 0)


def gathered_bytes(model: torch.nn.Module, zero: Mapping[str, Any]) -> int:
    """stage3_max_live_parameters weights, or those of the largest module if it has more."""
    weights = list(model.parameters())
    width = max(parameter.element_size() for parameter in weights)
    own = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    live = max(own, int(zero.get("stage3_max_live_parameters", LIVE_WEIGHTS)))
    return min(live, sum(parameter.numel() for parameter in weights)) * width


def bucket_bytes(spec: TrainSpec, zero: Mapping[str, Any]) -> int:
    """ZeRO 1 and 2 allocate the whole bucket with the first gradient (stage_1_and_2.py, setup_buckets), in stage 1 in the dtype of accumulation;
    ZeRO 3 allocates it when it is created (stage3.py)."""
    stage = zero.get("stage", 0)
    if stage == 0 or uses_bf16_optimizer(spec):
        return 0
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * DTYPES[reduced_dtype(spec, stage)].itemsize
    return bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1)


def reduced_dtype(spec: TrainSpec, stage: int) -> Dtype:
    return spec.precision.gradients if stage <= 1 else spec.precision.weights


def reduction_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, zero: Mapping[str, Any]) -> int:
    """Copies at the end of the backward pass. Without ZeRO up to a bucket of gradients is flattened (engine.py, allreduce_bucket).
    BF16_Optimizer's flat groups are copied whole, and again in bfloat16, in which they are sent. ZeRO 2 and 3 flatten the bucket; with flat
    accumulation one gradient at a time is converted to float32 (_add_to_grad_partition_buffer)."""
    stage, ranks = zero.get("stage", 0), spec.device.world_size
    size = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    elements = sum(parameter.numel() for parameter in trained)
    width = DTYPES[reduced_dtype(spec, stage)].itemsize
    if uses_bf16_optimizer(spec):
        return max(group_sizes(trained)) * (4 + 2) if ranks > 1 else 0
    if stage == 0:
        return min(elements, size) * width if ranks > 1 else 0
    if stage == 1:
        return 0  # gradients are freed as they go into the bucket
    largest = max(parameter.numel() for parameter in trained)
    return min(elements, size) * width + (4 * largest // ranks if stage == 2 and accumulates_flat(spec) else 0)


def group_sizes(trained: list[torch.nn.Parameter]) -> tuple[int, int]:
    """Elements of the two groups of the optimizer: matrices, which decay, and all others."""
    return tuple(sum(p.numel() for p in trained if (p.ndim >= 2) == matrices) for matrices in (True, False))  # type: ignore[return-value]


def update_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, *, stage: int) -> int:
    """What exists during the update only: the norm's float64 copy of one gradient (zero/utils.py, get_norm_dtype); then ZeRO's slice of gradients
    again, flat and in the dtype of the master weights, one group at a time, unless they are accumulated flat; and the optimizer's temporaries."""
    size, ranks = DTYPES[spec.precision.optimizer].itemsize, spec.device.world_size if stage else 1
    slice_of = -(-max(group_sizes(trained)) // ranks)
    flat = 0 if stage == 0 or uses_bf16_optimizer(spec) or (stage < 3 and accumulates_flat(spec)) else slice_of * size
    norm = 0 if stage == 0 or uses_bf16_optimizer(spec) else 8 * min(slice_of, max(parameter.numel() for parameter in trained))
    if spec.precision.rounding == "stochastic" or spec.optimizer.state_bits == 8:
        made = CHUNK_TENSORS * 4 * min(CHUNK.get(spec.device.accelerator, CHUNK_ELSEWHERE), slice_of)
    else:
        made = 0 if spec.device.accelerator in FUSED else FOREACH_TENSORS * slice_of * size
    return max(norm, flat + made)
