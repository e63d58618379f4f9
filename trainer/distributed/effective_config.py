"""Compares the config that DeepSpeed uses, read from its objects, with the planned one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer.contract import RunFailed, TrainSpec
from trainer.device.dtype import dtype_name
from trainer.optim.adamw import StochasticAdamW
from trainer.optim.adamw_8bit import AdamW8bit


def read_effective_config(engine: Any) -> dict[str, Any]:
    """What the engine runs with, read from its objects where possible and from its accessors elsewhere, never from our config."""
    handle = engine.handle
    masters = master_weights(handle)
    return {
        "train_batch_size": handle.train_batch_size(),
        "train_micro_batch_size_per_gpu": handle.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": handle.gradient_accumulation_steps(),
        "gradient_clipping": handle.gradient_clipping(),
        "zero_stage": int(handle.zero_optimization_stage()),
        "weights": dtype_name(next(p.dtype for p in engine.model.parameters() if p.requires_grad)),
        "optimizer": dtype_name(masters.dtype),
        "gradients": dtype_name(handle.get_data_types()[1]),
        "rounding": "stochastic" if isinstance(handle.basic_optimizer, StochasticAdamW) else "nearest",
        "state_bits": 8 if isinstance(handle.basic_optimizer, AdamW8bit) else 0,
        "loss_scaling": "dynamic" if handle.fp16_enabled() and handle.dynamic_loss_scale() else "none",
        "offload_optimizer": is_offloaded(handle.zero_offload_optimizer()),
        "offload_parameters": is_offloaded(handle.zero_offload_param()),
        "masters_on": masters.device.type,
    }


def is_offloaded(config: Any) -> bool:
    """DeepSpeed's configs hold the value of an enum."""
    return config is not None and config.device != "none"


def master_weights(handle: Any) -> Tensor:
    """One of the tensors that the optimizer updates: a slice of float32 master weights, or the weights themselves."""
    by_stage: dict[str, Callable[[], Tensor]] = {
        "single_partition_of_fp32_groups": lambda: handle.optimizer.single_partition_of_fp32_groups[0],  # ZeRO 1, 2
        "fp32_partitioned_groups_flat": lambda: handle.optimizer.fp32_partitioned_groups_flat[0],  # ZeRO 3
        "fp32_groups": lambda: handle.optimizer.fp32_groups[0][0],  # 16 bit without ZeRO
    }
    for attribute, find in by_stage.items():
        if hasattr(handle.optimizer, attribute):
            return find()
    return handle.optimizer.param_groups[0]["params"][0]


def planned_config(spec: TrainSpec) -> dict[str, Any]:
    """The same keys as `read_effective_config`, from the plan."""
    zero = spec.zero
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return {
        "train_batch_size": spec.batch.global_batch,
        "train_micro_batch_size_per_gpu": spec.batch.micro_batch,
        "gradient_accumulation_steps": spec.batch.accumulation,
        "gradient_clipping": spec.optimizer.clip_norm,
        "zero_stage": zero.get("stage", 0),
        "weights": spec.precision.weights,
        "optimizer": spec.precision.optimizer,
        "gradients": spec.precision.gradients,
        "rounding": spec.precision.rounding,
        "state_bits": spec.optimizer.state_bits,
        "loss_scaling": spec.precision.loss_scaling,
        "offload_optimizer": offload,
        "offload_parameters": (zero.get("offload_param") or {}).get("device", "none") != "none",
        "masters_on": "cpu" if offload else spec.device.accelerator,
    }


def refuse_mismatch(engine: Any, spec: TrainSpec) -> None:
    """Raises RunFailed naming every key in which the engine differs from the plan."""
    planned, taken = planned_config(spec), read_effective_config(engine)
    wrong = [f"{key}: planned {planned[key]!r}, the engine has {taken[key]!r}" for key in planned if planned[key] != taken[key]]
    if wrong:
        raise RunFailed(
            f"DeepSpeed does not use the planned config: {'; '.join(wrong)}. The planned config is in spec.json, key deepspeed."
        )
