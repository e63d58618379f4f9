"""The DeepSpeed config of a run, derived from the strategy and from the fields of the precision, never from their file names' meaning.

The plan prints it; the trainer starts DeepSpeed with it, then asks the engine what it took and compares. The facts about DeepSpeed 0.19.8
that the memory estimate counts with are here too.
"""

from typing import Any

from launcher.config.schema import Strategy
from trainer.contract import Batch, Optimizer, Precision

# ZeRO stage of each strategy; `auto` counts as unsharded until it is resolved.
ZERO_STAGE = {"auto": 0, "single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# Defaults of deepspeed/runtime/zero/config.py, in elements.
REDUCE_BUCKET = 5 * 10**8  # reduce_bucket_size
SUB_GROUP = 10**9  # sub_group_size: what ZeRO 3 updates at a time
LIVE_PARAMETERS = 10**9  # max_live_parameters: what ZeRO 3 holds gathered, at most
PREFETCH = 5 * 10**7  # prefetch_bucket_size

OFFLOAD = {"device": "cpu", "pin_memory": True}
GRADIENT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # values of data_types.grad_accum_dtype
# Dynamic loss scaling starts at 2**16, halves on overflow, and doubles after 1,000 steps without one. loss_scale 0 means dynamic.
DYNAMIC_LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
NO_LOSS_SCALE = {"loss_scale": 1}


def render_deepspeed(
    strategy: Strategy, precision: Precision, optimizer: Optimizer, batch: Batch, *, world_size: int, trained: int
) -> dict[str, Any]:
    """Keys as in DeepSpeed's config reference. `trained`: number of elements that get gradients."""
    untested = precision.rounding == "stochastic" or optimizer.state_bits  # our own optimizers
    return {
        "train_batch_size": batch.micro_batch * batch.accumulation * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": render_zero(strategy, precision, trained),
        **render_dtypes(precision),
        **({"zero_allow_untested_optimizer": True} if untested else {}),
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def render_zero(strategy: Strategy, precision: Precision, trained: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": rendered_stage(strategy, precision)}
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = OFFLOAD
    if strategy.offload_parameters:
        zero["offload_param"] = OFFLOAD
    if zero["stage"]:
        # DeepSpeed allocates the whole bucket, however little is trained: 1 to 2 GB for an adapter of 20 MB (setup_buckets in
        # zero/stage_1_and_2.py, zero/stage3.py). A bucket that holds all gradients sends them at once, as a larger one would.
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, max(1, trained))
    if zero["stage"] == 3:
        # Needed to save one file of weights under the published names, gathered from all ranks.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return zero


def rendered_stage(strategy: Strategy, precision: Precision) -> int:
    """DeepSpeed keeps float32 masters of 16-bit weights, and bfloat16 states, in its ZeRO optimizers only: those of ddp and of one device are
    in stage 1 too, which shards nothing on one rank."""
    return max(ZERO_STAGE[strategy.name], 0 if precision.weights == "float32" else 1)


def render_dtypes(precision: Precision) -> dict[str, Any]:
    """`bf16`, `fp16` and `data_types` for any combination that launcher.check.precision accepts. Without either flag DeepSpeed trains in
    float32, with gradients in float32."""
    bf16: dict[str, Any] = {"enabled": precision.weights == "bfloat16"}
    fp16: dict[str, Any] = {"enabled": precision.weights == "float16"}
    if precision.optimizer == "bfloat16":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if fp16["enabled"]:
        fp16 |= DYNAMIC_LOSS_SCALE if precision.loss_scaling == "dynamic" else NO_LOSS_SCALE
    sections: dict[str, Any] = {"bf16": bf16, "fp16": fp16}
    if precision.weights != "float32":
        sections["data_types"] = {"grad_accum_dtype": GRADIENT_DTYPES[precision.gradients]}
    return sections
