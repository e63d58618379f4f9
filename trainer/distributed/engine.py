"""DeepSpeed behind the few operations that the training loop needs: forward, backward, step, and collectives.

DeepSpeed is imported inside the functions: its import selects an accelerator by DS_ACCELERATOR, which `start_distributed` sets.
"""

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.contract import DeviceSpec, Dtype, Optimizer, RunFailed, TrainSpec
from trainer.distributed.average import WeightAverage
from trainer.distributed.collective import gather_objects
from trainer.distributed.effective_config import refuse_mismatch
from trainer.kernels.cross_entropy import sum_loss
from trainer.kernels.noise import EmbeddingNoise
from trainer.optim.adamw import StochasticAdamW, parameter_slices
from trainer.optim.adamw_8bit import AdamW8bit
from trainer.optim.optimizer_shard import find_shards

RATE_FACTOR = "rate"  # key of a parameter group: its learning rate over that of the schedule
IGNORED = -100  # label of a token that is not in the loss
GLOO_WAIT_S = 0.3  # a hundred times what one of gloo's threads needs; it may run later on a busy machine
FUSED = ("cpu", "cuda")  # where torch has AdamW as one kernel: saves a tenth of a step of the digits job


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer step did. `grad_norm`: before clipping, over all ranks."""

    grad_norm: float
    loss_scale: float
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model in training. `handle`: the DeepSpeedEngine; `model`: the module in it. `loss_chunk`: TrainSpec.loss_chunk; `label_smoothing`:
    StageSpec.label_smoothing, of training only, as `noise`. `average`: kept for Optimizer.ema_decay; `exports_average`: it is what is
    evaluated and saved."""

    handle: Any
    model: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int
    loss_chunk: int = 0
    label_smoothing: float = 0.0
    noise: EmbeddingNoise | None = None
    average: WeightAverage | None = None
    exports_average: bool = False

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy summed over the trained tokens of a micro-batch, float32, scalar.

        `batch`: input_ids, attention_mask, labels (samples, length) int64, and the images of the family. Logits are computed at trained
        positions only: with a vocabulary of 150,000 all logits would be the largest tensor of the step. Packed rows
        (trainer.data.batch.pack) have position_ids, and the mask is replaced by the ends of their samples, or dropped.
        """
        kept = {"labels", "sample_ends", "noise_spans", *(("attention_mask",) if "position_ids" in batch else ())}
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items() if key not in kept}
        if "sample_ends" in batch:
            inputs["attention_mask"] = batch["sample_ends"]
        targets = batch["labels"][:, 1:]
        trained = targets != IGNORED
        positions = torch.nn.functional.pad(trained, (0, 1)).to(self.device, non_blocking=True)

        def run() -> Tensor:
            return self.handle(**inputs, logits_to_keep=positions, use_cache=False).logits  # type: ignore[no-any-return]

        smoothing = self.label_smoothing if self.model.training else 0.0
        noise = self.noise.adding(batch.get("noise_spans")) if self.noise and self.model.training else nullcontext()
        with noise:
            return sum_loss(
                self.model, run, targets[trained].to(self.device, non_blocking=True), chunk=self.loss_chunk, smoothing=smoothing
            )

    def begin_micro(self, *, last: bool) -> None:
        """Before each micro-batch: whether the weights are updated after it. DeepSpeed's own count does not know that packed steps have
        different numbers of micro-batches."""
        self.handle.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient to that of the step. DeepSpeed averages over ranks, but does not divide by the accumulation.

        A non-finite loss makes every gradient NaN, so that `step` updates nothing on any rank: the gradients of an infinite loss may be
        finite."""
        nan_or_one = 1 + (loss.detach() - loss.detach())
        self.handle.backward(loss * nan_or_one, scale_wrt_gas=False)

    def micro_step(self) -> None:
        """Tell DeepSpeed that a micro-batch ends; it updates the weights after the last one of the step."""
        self.handle.step()

    def step(self, lr: float) -> Update:
        """Update the weights after the last micro-batch of the step. With a non-finite gradient the update is skipped: by DeepSpeed in its own
        optimizers, and here if torch's optimizer is used."""
        for group in self.handle.optimizer.param_groups:
            group["lr"] = lr * group.get(RATE_FACTOR, 1.0)
        norm = self._fp32_norm()
        if norm is not None and not bool(norm.isfinite()):
            return Update(grad_norm=float(norm), loss_scale=1.0, skipped=True)
        scale = float(getattr(self.handle.optimizer, "loss_scale", 1.0))
        try:
            self.handle.step()
        except Exception as error:  # DeepSpeed raises a plain Exception
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
        """The gradient norm if the optimizer is torch's own (no ZeRO, float32), where DeepSpeed computes none; otherwise None."""
        if self.handle.optimizer is not self.handle.basic_optimizer:
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def sum_over_ranks(self, value: float) -> Tensor:
        """float32, scalar, on the device (so that nothing waits for it here)."""
        total = torch.tensor(value, dtype=torch.float32, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def gather_vectors(self, values: Tensor) -> Tensor:
        """Each rank's vector, float32: (n) -> (world_size, n), on the CPU. Only this call waits for the device within a step."""
        if self.world_size == 1:
            return values.unsqueeze(0).cpu()
        table = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(table, values)
        return torch.stack(table).cpu()

    def fail_together(self, problem: str) -> None:
        """Raises RunFailed on every rank if any of them passes a problem, so that no rank waits for the others forever."""
        if first := next(filter(None, gather_objects(problem)), ""):
            raise RunFailed(first)

    def with_exported_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated and saved. Every rank must enter and leave it."""
        return self.average.in_model() if self.average and self.exports_average else nullcontext()

    def gather_averages(self) -> dict[str, Tensor]:
        """What a checkpoint has beside the trained weights: whole averages on rank 0; {} on the others, and if they are the exported weights."""
        return self.average.gather() if self.average and not self.exports_average else {}

    def gather_weights(self) -> dict[str, Tensor]:
        """Names in memory -> whole tensors, on rank 0; {} on the others. Under ZeRO 3 a collective, one parameter at a time.

        With peft only trained parameters are gathered: an adapter holds nothing else.
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
    os.environ.setdefault("DS_ACCELERATOR", spec.accelerator)  # otherwise DeepSpeed guesses from the installed packages
    # DeepSpeed imports its Muon optimizer, which uses torch.compile, for every optimizer: 1.2 s of imports on every rank, and with Triton
    # a pool of compile processes. Nothing here is compiled by torch.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if spec.accelerator == "cpu" and "LOCAL_WORLD_SIZE" in os.environ:
        # DeepSpeed's shared-memory operator reads this variable of DeepSpeed's launcher, and takes its absence for zero ranks.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    import deepspeed
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get("deepspeed_shm_comm"):
        # On the CPU DeepSpeed would compile its shared-memory operator here, which takes a minute and needs a compiler. An empty table
        # means "no operator is compatible"; only deepspeed.comm.torch.build_shm_op reads it.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=spec.backend, timeout=timedelta(seconds=spec.timeout_s), verbose=False)


def start_single_process() -> None:
    """A process group of one, for a stage that runs without torchrun: no port, no DeepSpeed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def stop_distributed() -> None:
    """Leave the process group, after the last collective of all ranks.

    torch 2.7.1 joins gloo's threads while it holds Python's lock; a thread that still has to free the tensors of a collective waits for that
    lock, and the rank never ends. The wait lets the threads take the lock first. 2.13.0 does not need it (tests/trainer/distributed/test_leave.py)."""
    if torch.distributed.get_backend() == "gloo" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        time.sleep(GLOO_WAIT_S)
    torch.distributed.destroy_process_group()


def start_engine(model: torch.nn.Module, spec: TrainSpec, device: torch.device, *, rates: Mapping[str, float] | None = None) -> Engine:
    """Wrap a model whose trainable parameters are marked. `rates`: see build_optimizer. Raises RunFailed if DeepSpeed uses another config
    than planned."""
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    offload = spec.zero.get("offload_optimizer") is not None
    states = spec.precision.optimizer
    if spec.precision.rounding == "stochastic":
        optimizer: torch.optim.Optimizer = build_stochastic(model, spec, rates or {})
    else:
        fused = spec.device.accelerator in FUSED
        optimizer = build_optimizer(model, spec.optimizer, rates or {}, states=states, offload=offload, fused=fused, seed=spec.seed)
    handle, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(spec.deepspeed))
    if spec.device.world_size == 1 and (handle.zero_optimization_stage() == 0 or isinstance(handle.optimizer, BF16_Optimizer)):
        # Otherwise gradients are packed, summed over the one rank and unpacked: by BF16_Optimizer with two more copies, rounded to bfloat16.
        handle.enable_backward_allreduce = False
    engine = Engine(
        handle=handle,
        model=handle.module,
        device=device,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        loss_chunk=spec.loss_chunk,
        label_smoothing=spec.stage.label_smoothing,
        noise=EmbeddingNoise(handle.module.get_input_embeddings(), alpha) if (alpha := spec.stage.neftune_alpha) else None,
    )
    refuse_mismatch(engine, spec)
    if isinstance(optimizer, StochasticAdamW):
        optimizer.set_layout(parameter_slices(find_shards(engine)))
    if isinstance(optimizer, AdamW8bit):
        optimizer.set_layout(find_shards(engine))
    return keep_average(engine, spec.optimizer)


def keep_average(engine: Engine, optimizer: Optimizer) -> Engine:
    if not optimizer.ema_decay:
        return engine
    return replace(engine, average=WeightAverage(engine, optimizer.ema_decay), exports_average=optimizer.ema_weights == "average")


def build_optimizer(
    model: torch.nn.Module, optimizer: Optimizer, rates: Mapping[str, float], *, states: Dtype, offload: bool, fused: bool, seed: int
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. `rates`: name -> learning rate over that of the schedule; 1 for other names."""
    groups = group_parameters(model, optimizer, rates)
    values: dict[str, Any] = {"lr": optimizer.lr, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, fp32_optimizer_states=states == "float32", **values)
    if optimizer.state_bits == 8:
        return AdamW8bit(groups, seed=seed, **values)
    return torch.optim.AdamW(groups, fused=fused, **values)


def build_stochastic(model: torch.nn.Module, spec: TrainSpec, rates: Mapping[str, float]) -> StochasticAdamW:
    values = spec.optimizer
    groups = group_parameters(model, values, rates)
    return StochasticAdamW(groups, seed=spec.seed, lr=values.lr, betas=(values.beta1, values.beta2), eps=values.eps)


def group_parameters(model: torch.nn.Module, optimizer: Optimizer, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The trainable parameters by rate and by weight decay: only matrices decay, since decaying norms and biases has no benefit."""
    trainable = [(rates.get(name, 1.0), p) for name, p in model.named_parameters() if p.requires_grad]
    dimensions = {p: len(getattr(p, "ds_shape", p.shape)) for _, p in trainable}  # ZeRO 3 stores its part as a vector
    groups = [
        {
            "params": [p for own, p in trainable if own == rate and (dimensions[p] >= 2) == matrices],
            "weight_decay": decay,
            RATE_FACTOR: rate,
        }
        for rate in dict.fromkeys(rate for rate, _ in trainable)
        for matrices, decay in ((True, optimizer.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]
