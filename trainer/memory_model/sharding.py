"""What one rank holds of a step: shares of what is traced whole, and the states and buffers of which no tensor is traced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trainer.contract import Dtype, TrainSpec
from trainer.device.dtype import DTYPES
from trainer.distributed.engine import FUSED
from trainer.optim.adamw import CHUNK, CHUNK_ELSEWHERE
from trainer.optim.blockwise import BLOCK

# DeepSpeed 0.19.8's defaults, in elements (deepspeed/runtime/zero/config.py); a plan that sets them is followed.
REDUCE_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000
FOREACH_TENSORS = 1  # AdamW without a fused kernel makes one tensor more of each state's size, for the denominators (torch/optim/adam.py)
# How many tensors of a chunk trainer.optim.adamw and trainer.optim.adamw_8bit have in float32 at a time: weight, gradient, both moments, two results,
# random words and their sum.
CHUNK_TENSORS = 8


GradientHandling = Literal["kept", "converted", "moved"]


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Bytes of one rank. `shares`: kind -> the part of it that is on the device.

    `way`: a gradient that is whole stays as it is, is made one of the type that gradients are added up in, or goes where there is a place for
    it. `standing_bytes`: of places from the start on; `arriving_bytes`: of one that is made at the end of the backward pass.
    `bucket_bytes`: of communication, from the first gradient to the last, or all the time where `bucket_stands`; `reduction_bytes`: copies
    at the end of the backward pass. `gathered_bytes`: weights that ZeRO 3 has whole for a while, at most."""

    shares: Mapping[str, float] = field(default_factory=dict)
    trainable: int = 0
    optimizer_bytes: int = 0
    way: GradientHandling = "kept"
    standing_bytes: int = 0
    arriving_bytes: int = 0
    gathered_bytes: int = 0
    bucket_bytes: int = 0
    bucket_stands: bool = False
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
    states_away, weights_away = (zero.get(name) is not None for name in ("offload_optimizer", "offload_param"))
    standing, arriving = (0, 0) if states_away else gradient_buffers(spec, stage, trainable, gradients)
    return Sharding(
        shares={"weights": (0 if weights_away else 1 / ranks) if stage == 3 else 1.0},
        trainable=trainable,
        optimizer_bytes=0 if states_away else optimizer,
        way=choose_gradient_handling(spec, stage, away=states_away),
        standing_bytes=standing,
        arriving_bytes=arriving,
        gathered_bytes=gathered_bytes(model, zero) if stage == 3 else 0,
        bucket_bytes=bucket_bytes(spec, zero),
        bucket_stands=stage == 3,
        reduction_bytes=reduction_bytes(trained, spec, zero),
        update_bytes=0 if states_away else update_bytes(trained, spec, stage=stage),
        host_bytes=(optimizer + gradients if states_away else 0) + (weights // ranks if weights_away else 0),
        notes=("weights that ZeRO 3 gathers are counted at the most that DeepSpeed lets live at a time",) if stage == 3 else (),
    )


def gradient_buffers(spec: TrainSpec, stage: int, trainable: int, gradients: int) -> tuple[int, int]:
    """Sharding.standing_bytes and arriving_bytes. Gradients stand where an earlier micro-batch has left them, in BF16_Optimizer (those in
    bfloat16, which it sets to zero and keeps, too), and in ZeRO 3 (grad_partitions_flat_buffer); ZeRO 2 makes its slice when it reduces."""
    again = spec.batch.accumulation > 1
    if takes_bf16_optimizer(spec):
        return gradients + (trainable * DTYPES[spec.precision.weights].itemsize if again else 0), 0
    if stage == 3 or again:
        return gradients, 0
    return 0, gradients if stage == 2 else 0


def choose_gradient_handling(spec: TrainSpec, stage: int, *, away: bool) -> GradientHandling:
    if stage >= 2 or spec.batch.accumulation > 1 or away:
        return "moved"
    return "kept" if takes_bf16_optimizer(spec) or spec.precision.gradients == spec.precision.weights else "converted"


def takes_bf16_optimizer(spec: TrainSpec) -> bool:
    """Stage 1 with bfloat16 weights and float32 gradients is DeepSpeed's BF16_Optimizer (engine.py, _do_optimizer_sanity_check): every rank
    holds all gradients in float32 from the start, into which it adds those in bfloat16 at the end of a backward pass, sums them over ranks
    where they lie, and updates from a view of its slice."""
    zero, precision = spec.zero, spec.precision
    types = (precision.weights, precision.gradients) == ("bfloat16", "float32")
    return types and zero.get("stage", 0) == 1 and zero.get("offload_optimizer") is None


def accumulates_flat(spec: TrainSpec) -> bool:
    """Whether ZeRO 1 or 2 adds gradients up in the flat tensor that it updates from, in float32 (_use_compact_grad_partition_buffer)."""
    return spec.precision.gradients == "float32" != spec.precision.weights


def optimizer_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, *, ranks: int, master: bool) -> int:
    """Both moments of Adam, and the masters that DeepSpeed's ZeRO optimizers keep, of one of `ranks` slices."""
    size, elements = DTYPES[spec.precision.optimizer].itemsize, -(-sum(p.numel() for p in trained) // ranks)
    moment = elements + 4 * -(-elements // BLOCK) if spec.optimizer.state_bits == 8 else elements * size
    return 2 * moment + (elements * size if master else 0)


def gathered_bytes(model: torch.nn.Module, zero: Mapping[str, Any]) -> int:
    """As many weights as stage3_max_live_parameters, or those of the largest module where it has more."""
    weights = list(model.parameters())
    width = max(parameter.element_size() for parameter in weights)
    own = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    live = max(own, int(zero.get("stage3_max_live_parameters", LIVE_WEIGHTS)))
    return min(live, sum(parameter.numel() for parameter in weights)) * width


def bucket_bytes(spec: TrainSpec, zero: Mapping[str, Any]) -> int:
    """ZeRO 1 and 2 allocate the whole bucket with the first gradient (stage_1_and_2.py, setup_buckets), in stage 1 in the type that they are
    added up in; ZeRO 3 when it is made (stage3.py)."""
    stage = zero.get("stage", 0)
    if stage == 0 or takes_bf16_optimizer(spec):
        return 0
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * DTYPES[reduced_dtype(spec, stage)].itemsize
    return bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1)


def reduced_dtype(spec: TrainSpec, stage: int) -> Dtype:
    return spec.precision.gradients if stage <= 1 else spec.precision.weights


def reduction_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, zero: Mapping[str, Any]) -> int:
    """Copies at the end of the backward pass. Without ZeRO gradients are flattened, as many as a bucket takes (engine.py,
    allreduce_bucket); BF16_Optimizer's lie flat in groups, which are copied whole, and again in bfloat16, in which they are sent. ZeRO 2 and 3
    flatten the bucket; where gradients are added up flat, one after the other is made float32 (_add_to_grad_partition_buffer)."""
    stage, ranks = zero.get("stage", 0), spec.device.world_size
    size = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    elements = sum(parameter.numel() for parameter in trained)
    width = DTYPES[reduced_dtype(spec, stage)].itemsize
    if takes_bf16_optimizer(spec):
        return max(group_sizes(trained)) * (4 + 2) if ranks > 1 else 0
    if stage == 0:
        return min(elements, size) * width if ranks > 1 else 0
    if stage == 1:
        return 0  # as gradients go into the bucket they leave their own place
    largest = max(parameter.numel() for parameter in trained)
    return min(elements, size) * width + (4 * largest // ranks if stage == 2 and accumulates_flat(spec) else 0)


def group_sizes(trained: list[torch.nn.Parameter]) -> tuple[int, int]:
    """Elements of the two groups of the optimizer: matrices, which decay, and the others."""
    return tuple(sum(p.numel() for p in trained if (p.ndim >= 2) == matrices) for matrices in (True, False))  # type: ignore[return-value]


def update_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, *, stage: int) -> int:
    """What exists during the update alone: the norm's float64 copy of one gradient (zero/utils.py, get_norm_dtype); then ZeRO's slice of
    gradients once more, flat and in the masters' type, a group at a time, where they are not added up in it; and what the optimizer makes."""
    size, ranks = DTYPES[spec.precision.optimizer].itemsize, spec.device.world_size if stage else 1
    slice_of = -(-max(group_sizes(trained)) // ranks)
    flat = 0 if stage == 0 or takes_bf16_optimizer(spec) or (stage < 3 and accumulates_flat(spec)) else slice_of * size
    norm = 0 if stage == 0 or takes_bf16_optimizer(spec) else 8 * min(slice_of, max(parameter.numel() for parameter in trained))
    if spec.precision.rounding == "stochastic" or spec.optimizer.state_bits == 8:
        made = CHUNK_TENSORS * 4 * min(CHUNK.get(spec.device.accelerator, CHUNK_ELSEWHERE), slice_of)
    else:
        made = 0 if spec.device.accelerator in FUSED else FOREACH_TENSORS * slice_of * size
    return max(norm, flat + made)
