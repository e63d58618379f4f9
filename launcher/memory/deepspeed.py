"""The DeepSpeed config of a run, written by the plan and printed with it; the trainer reads it back from the engine and compares."""

from typing import Any

from launcher.config.schema import Strategy
from trainer.contract import Batch, Optimizer, Precision

ZERO_STAGES = {"single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
REDUCE_BUCKET = 500_000_000  # elements, DeepSpeed's own default
OFFLOAD = {"device": "cpu", "pin_memory": True}


def render_deepspeed(
    strategy: Strategy, precision: Precision, optimizer: Optimizer, batch: Batch, *, world_size: int, trained: int
) -> dict[str, Any]:
    """Keys as in DeepSpeed's config reference. `trained`: elements that get gradients. A strategy must be resolved: `auto` is a KeyError."""
    zero: dict[str, Any] = {"stage": ZERO_STAGES[strategy.name]}
    if precision.weights != "float32":
        # DeepSpeed 0.19.8 keeps float32 masters of 16-bit weights, and bfloat16 ones without float32 behind them, in its ZeRO optimizers
        # only; on one rank stage 1 shards nothing.
        zero["stage"] = max(zero["stage"], 1)
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = OFFLOAD
    if strategy.offload_parameters:
        zero["offload_param"] = OFFLOAD
    if zero["stage"]:
        # DeepSpeed allocates a whole bucket however little is trained: 1 to 2 GB beside an adapter of 20 MB (setup_buckets in
        # zero/stage_1_and_2.py, zero/stage3.py). One that holds all gradients goes through at once, as in the larger one.
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, max(1, trained))
    if zero["stage"] == 3:
        # One file of weights under published names, gathered from all ranks.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_batch_size": batch.micro_batch * batch.accumulation * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": zero,
        **ELEMENT_TYPES[precision.name],
        **({"zero_allow_untested_optimizer": True} if precision.rounding == "stochastic" or optimizer.state_bits else {}),
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


ELEMENT_TYPES: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}},
    "pure_bf16": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "bf16"},
    },
    # Dynamic: starts at 2**16, halves on overflow, doubles after 1,000 good steps.
    "fp16": {
        "bf16": {"enabled": False},
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
