"""DeepSpeed behind the few words that the loop needs: forward, backward, step, gather.

DeepSpeed is imported inside the functions: its import picks an accelerator by DS_ACCELERATOR, which `start_distributed` sets.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.contract import DeviceSpec, Dtype, Optimizer, RunFailed, TrainSpec
from trainer.precision import dtype_name

IGNORED = -100  # label of a token that is not trained on
FUSED = ("cpu", "cuda")  # where torch has AdamW as one kernel: on the digits job a tenth of a step faster than one op at a time


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer step did. `grad_norm`: before clipping, over all ranks."""

    grad_norm: float
    loss_scale: float
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model that trains. `handle` is the DeepSpeedEngine, `model` the module in it."""

    handle: Any
    model: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy summed over the trained tokens of a micro-batch, float32, scalar.

        `batch`: input_ids, attention_mask, labels (samples, length) int64, and the images of the family. Logits are made at
        trained positions alone: at 150,000 tokens of vocabulary the others would be the largest tensor of the step.
        """
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items() if key != "labels"}
        targets = batch["labels"][:, 1:]
        trained = targets != IGNORED
        positions = torch.nn.functional.pad(trained, (0, 1)).to(self.device, non_blocking=True)
        logits = self.handle(**inputs, logits_to_keep=positions, use_cache=False).logits
        return cross_entropy(logits.float(), targets[trained].to(self.device, non_blocking=True), reduction="sum")

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient to the step's. DeepSpeed means over ranks, and is kept from dividing by the accumulation."""
        self.handle.backward(loss, scale_wrt_gas=False)

    def micro_step(self) -> None:
        """Tell DeepSpeed that a micro-batch is done; it updates the weights after the last one of the step."""
        self.handle.step()

    def step(self, lr: float) -> Update:
        """Update the weights after the last micro-batch of the step."""
        for group in self.handle.optimizer.param_groups:
            group["lr"] = lr
        norm = self._fp32_norm()
        scale = float(getattr(self.handle.optimizer, "loss_scale", 1.0))
        try:
            self.handle.step()
        except Exception as error:  # DeepSpeed raises a bare Exception here
            if "loss scale already at minimum" not in str(error):
                raise
            raise RunFailed(
                "the gradients overflow float16 even at a loss scale of 1. Train in bf16 or fp32, or lower stage.optimizer.lr."
            ) from error
        return Update(
            grad_norm=float(self.handle.get_global_grad_norm() if norm is None else norm),
            loss_scale=scale,
            skipped=not self.handle.was_step_applied(),
        )

    def _fp32_norm(self) -> Tensor | None:
        """DeepSpeed keeps no norm where the optimizer is torch's own (no ZeRO, float32); everywhere else it does."""
        if self.handle.optimizer is not self.handle.basic_optimizer:
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def add(self, value: float) -> Tensor:
        """The sum over all ranks, float32, scalar, on the device (so that nothing waits for it here)."""
        total = torch.tensor(value, dtype=torch.float32, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Each rank's vector, float32: (n) -> (world_size, n), on the CPU. The one place of a step that waits for the device."""
        if self.world_size == 1:
            return values.unsqueeze(0).cpu()
        table = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(table, values)
        return torch.stack(table).cpu()

    def agree(self, problem: str) -> None:
        """Raises RunFailed on every rank when any of them says a problem, so that none of them waits for the others for ever."""
        said = [problem] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(said, problem)
        if any(said):
            raise RunFailed(next(filter(None, said)))

    def gather_weights(self) -> dict[str, Tensor]:
        """Names in memory -> whole tensors, on rank 0; {} on the others. A collective under ZeRO 3, one parameter at a time.

        With peft only what trains is gathered: an adapter holds nothing else.
        """
        adapter = hasattr(self.model, "peft_config")
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad or not adapter}
        if self.handle.zero_optimization_stage() < 3:
            weights = {name: p.detach() for name, p in parameters.items()}
        else:
            weights = {name: tensor for name, p in parameters.items() if (tensor := self._whole(p)) is not None}
        kept = self.model.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return {**weights, **buffers} if self.rank == 0 else {}

    def _whole(self, parameter: torch.nn.Parameter) -> Tensor | None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone() if self.rank == 0 else None


def start_distributed(spec: DeviceSpec) -> None:
    """Join the process group that torchrun describes in the environment."""
    os.environ.setdefault("DS_ACCELERATOR", spec.accelerator)  # else DeepSpeed guesses from what is installed
    if spec.accelerator == "cpu" and "LOCAL_WORLD_SIZE" in os.environ:
        # DeepSpeed's shared-memory op reads what its own launcher would have set, and takes the absence for no rank at all.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get("deepspeed_shm_comm"):
        # On the CPU DeepSpeed compiles its shared-memory op here, for a minute and with a compiler that may not be there. An
        # empty table says "no op is compatible"; deepspeed.comm.torch.build_shm_op is its only reader.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=spec.backend, timeout=timedelta(seconds=spec.timeout_s), verbose=False)


def start_engine(model: torch.nn.Module, spec: TrainSpec, device: torch.device) -> Engine:
    """Wrap a model whose trainable parameters are marked. Raises RunFailed when DeepSpeed took another config than planned."""
    import deepspeed

    offload = spec.deepspeed.get("zero_optimization", {}).get("offload_optimizer") is not None
    states = spec.precision.optimizer
    optimizer = build_optimizer(model, spec.optimizer, states=states, offload=offload, fused=spec.device.accelerator in FUSED)
    handle, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(spec.deepspeed))
    if spec.device.world_size == 1 and handle.zero_optimization_stage() == 0:
        handle.enable_backward_allreduce = False  # else gradients are packed, summed over the one rank and unpacked
    engine = Engine(
        handle=handle,
        model=handle.module,
        device=device,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
    )
    refuse_mismatch(engine, spec)
    return engine


def build_optimizer(model: torch.nn.Module, optimizer: Optimizer, *, states: Dtype, offload: bool, fused: bool) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. Decay on matrices alone: decaying norms and biases pulls them to zero for nothing."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    values: dict[str, Any] = {"lr": optimizer.lr, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    groups = [group for group in groups if group["params"]]
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, fp32_optimizer_states=states == "float32", **values)
    return torch.optim.AdamW(groups, fused=fused, **values)


def taken_config(engine: Engine) -> dict[str, Any]:
    """What the engine runs with, asked of its objects where they tell and of its accessors elsewhere, never of our config."""
    handle = engine.handle
    masters = master_weights(handle)
    offloaded = handle.zero_offload_optimizer()
    return {
        "train_batch_size": handle.train_batch_size(),
        "train_micro_batch_size_per_gpu": handle.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": handle.gradient_accumulation_steps(),
        "gradient_clipping": handle.gradient_clipping(),
        "zero_stage": int(handle.zero_optimization_stage()),
        "weights": dtype_name(next(p.dtype for p in engine.model.parameters() if p.requires_grad)),
        "optimizer": dtype_name(masters.dtype),
        "gradients": dtype_name(handle.get_data_types()[1]),
        "loss_scaling": "dynamic" if handle.fp16_enabled() and handle.dynamic_loss_scale() else "none",
        "offload_optimizer": offloaded is not None and offloaded.device != "none",  # DeepSpeed's configs hold the text of an enum
        "masters_on": masters.device.type,
    }


def master_weights(handle: Any) -> Tensor:
    """One of the tensors that the optimizer updates: a slice of float32 masters, or the weights themselves."""
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
    """The same keys as `taken_config`, from the plan."""
    zero = spec.deepspeed.get("zero_optimization", {})
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
        "loss_scaling": spec.precision.loss_scaling,
        "offload_optimizer": offload,
        "masters_on": "cpu" if offload else spec.device.accelerator,
    }


def refuse_mismatch(engine: Engine, spec: TrainSpec) -> None:
    """Raises RunFailed naming every key in which the engine differs from the plan."""
    planned, taken = planned_config(spec), taken_config(engine)
    wrong = [f"{key}: planned {planned[key]!r}, the engine has {taken[key]!r}" for key in planned if planned[key] != taken[key]]
    if wrong:
        said = "; ".join(wrong)
        raise RunFailed(f"DeepSpeed did not take the planned config. {said}. The plan's dict is in spec.json, key deepspeed.")
