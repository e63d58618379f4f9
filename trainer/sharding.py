"""What one rank holds of a step: shares of what is traced whole, and the states and buffers of which no tensor is traced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.contract import TrainSpec
from trainer.engine import FUSED
from trainer.precision import DTYPES
from trainer.quantization import BLOCK

# DeepSpeed 0.19.8's defaults, in elements (deepspeed/runtime/zero/config.py); a plan that sets them is followed.
REDUCE_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000
FOREACH_TENSORS = 1  # AdamW without a fused kernel makes one tensor more of each state's size, for the denominators (torch/optim/adam.py)
CHUNK = 2**22  # elements that trainer.optimizer and trainer.eight_bit have in float32 at a time
CHUNK_TENSORS = 8  # and how many such tensors: weight, gradient, both moments, two results, random words and their sum


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Bytes of one rank, `shares` by kind excepted, and `gradients_bytes`, which is of all ranks. `gradients_stand`: they have a place from
    the start on, which each micro-batch's are added into. `gathered_bytes`: weights that ZeRO 3 has
    whole for a while, at most; `bucket_bytes`: gradients on their way between ranks."""

    shares: Mapping[str, float] = field(default_factory=dict)
    trainable: int = 0
    optimizer_bytes: int = 0
    gradients_bytes: int = 0
    gradients_stand: bool = False
    gathered_bytes: int = 0
    bucket_bytes: int = 0
    update_bytes: int = 0
    host_bytes: int = 0
    notes: tuple[str, ...] = ()


def shard_step(model: torch.nn.Module, spec: TrainSpec) -> Sharding:
    zero = spec.deepspeed.get("zero_optimization", {})
    stage, ranks = zero.get("stage", 0), spec.device.world_size
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    gradients = trainable * gradient_width(spec)
    optimizer = optimizer_bytes(trained, spec, ranks=ranks if stage else 1, master=stage > 0)
    states_away, weights_away = (zero.get(name) is not None for name in ("offload_optimizer", "offload_param"))
    shares = {"weights": (0 if weights_away else 1 / ranks) if stage == 3 else 1.0}
    shares["gradients"] = 0.0 if states_away else 1 / ranks if stage >= 2 else 1.0
    return Sharding(
        shares=shares,
        trainable=trainable,
        optimizer_bytes=0 if states_away else optimizer,
        gradients_bytes=gradients,
        gradients_stand=spec.batch.accumulation > 1 or takes_bf16_optimizer(spec),
        gathered_bytes=gathered_bytes(model, zero) if stage == 3 else 0,
        bucket_bytes=bucket_bytes(spec, zero, gradients),
        update_bytes=0 if states_away else update_bytes(trained, spec, sharded=stage > 0, ranks=ranks),
        host_bytes=(optimizer + gradients // ranks if states_away else 0) + (weights // ranks if weights_away else 0),
        notes=("weights that ZeRO 3 gathers are counted at the most that DeepSpeed lets live at a time",) if stage == 3 else (),
    )


def takes_bf16_optimizer(spec: TrainSpec) -> bool:
    """Stage 1 with bfloat16 weights and float32 gradients is DeepSpeed's BF16_Optimizer (engine.py, _do_optimizer_sanity_check): every rank
    holds all gradients in float32 from the start, sums them over ranks where they lie, and updates from a view of its slice. Those in
    bfloat16, out of which it adds them up, it sets to zero and keeps (bf16_optimizer.py, clear_lp_grads)."""
    zero, precision = spec.deepspeed.get("zero_optimization", {}), spec.precision
    types = (precision.weights, precision.gradients) == ("bfloat16", "float32")
    return types and zero.get("stage", 0) == 1 and zero.get("offload_optimizer") is None


def gradient_width(spec: TrainSpec) -> int:
    """Bytes of an element's gradient, or gradients."""
    width = DTYPES[spec.precision.gradients].itemsize
    return width + DTYPES[spec.precision.weights].itemsize if takes_bf16_optimizer(spec) else width


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


def bucket_bytes(spec: TrainSpec, zero: Mapping[str, Any], gradients: int) -> int:
    """ZeRO 1 and 2 allocate the whole bucket when the backward pass begins (stage_1_and_2.py, setup_buckets), in float32 where gradients are
    added up in it in stage 1; without ZeRO the gradients are flattened, as many as a bucket takes. The CPU's is never touched as a whole."""
    stage = zero.get("stage", 0)
    if spec.device.accelerator == "cpu" or takes_bf16_optimizer(spec) or (stage == 0 and spec.device.world_size == 1):
        return 0
    width = DTYPES[spec.precision.gradients if stage <= 1 else spec.precision.weights].itemsize
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * width
    return bucket * (2 if zero.get("overlap_comm") else 1) if stage in (1, 2) else min(bucket, gradients)


def update_bytes(trained: list[torch.nn.Parameter], spec: TrainSpec, *, sharded: bool, ranks: int) -> int:
    """What exists during the update alone: under ZeRO the slice's gradients once more, flat and in the masters' dtype, a parameter group
    at a time; and what the optimizer itself makes."""
    size = DTYPES[spec.precision.optimizer].itemsize
    groups = [sum(p.numel() for p in trained if (p.ndim >= 2) == matrices) for matrices in (True, False)]
    largest = -(-max(groups) // ranks) if sharded else max(groups)
    flat = largest * size if sharded and not takes_bf16_optimizer(spec) else 0
    if spec.precision.rounding == "stochastic" or spec.optimizer.state_bits == 8:
        return flat + CHUNK_TENSORS * 4 * min(CHUNK, largest)
    return flat + (0 if spec.device.accelerator in FUSED else FOREACH_TENSORS * largest * size)
