"""Fused kernels: a layer's passes over its tensors as one, by liger-kernel (Triton) on CUDA and by torch_npu's operators on an NPU.

They are put into a model that is built. Its layers keep their parameters, and so the names and the checkpoints; they compute by another
function. Liger's own patches of whole families are not used: they replace the model's forward pass and with it the logits at trained
positions alone (trainer.distributed.engine), and those of 0.8.5 look in Qwen2.5-VL for a rotary function that transformers 5.23 has under another name.
Its cross-entropy is not either, since that of trainer.kernels.cross_entropy needs no package. LayerNorm is one kernel in torch already. On the CPU there is
nothing: torch.nn.functional.rms_norm is there a chain of the same operators (torch 2.13; 512 rows of 1024: 7.2 ms, transformers' 7.4 ms).
"""

import functools
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.contract import InputRefused, TrainSpec

Normalise = Callable[[Tensor, Tensor, float], Tensor]  # x (..., width), weight (width,), epsilon -> like x
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ROTARY = "apply_rotary_pos_emb"  # of every modeling module of transformers that has a decoder


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What a package has, by what it computes; None = nothing of the kind. Element types are one among the inputs, and that of the output.

    `rms_norm`: weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, in float32 up to the product with the weight (Zhang and
    Sennrich, arXiv 1910.07467). `centred_rms_norm`: the same with 1 + weight, in float32 to its end. `swiglu(gate, up)`: silu(gate) * up
    (Shazeer, arXiv 2002.05202). `rotate(q, k, cos, sin)`: x * cos + rotate_half(x) * sin (Su et al., arXiv 2104.09864); q and k (samples,
    heads, T, width), cos and sin (samples or 1, T, width).
    """

    source: str
    rms_norm: Normalise
    centred_rms_norm: Normalise | None
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Rotate | None


# ----------------------------------------------------------------------------------------------------------------- packages


def open_liger(deterministic: bool) -> Kernels:
    """Raises ImportError without liger-kernel or Triton. `in_place` False: else the norm's backward pass writes into a gradient that the
    residual stream may still need. The rotation and SwiGLU write into what a linear layer has made, which nothing else reads."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    return Kernels(
        source=f"liger-kernel {importlib.metadata.version('liger-kernel')}",
        rms_norm=lambda x, weight, epsilon: LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False),
        centred_rms_norm=lambda x, weight, epsilon: LigerRMSNormFunction.apply(x, weight, epsilon, 1.0, "gemma", False),
        swiglu=LigerSiLUMulFunction.apply,
        rotate=LigerRopeFunction.apply,
    )


def open_torch_npu(deterministic: bool) -> Kernels:
    """The operators that torch_npu registers on its import (trainer.device.device). Raises AttributeError where one is missing. The rotation's
    backward pass is not reproducible (Ascend/MindSpeed, docs/ops/npu_rotary_position_embedding.md), so that a deterministic run is without."""
    normalise, swiglu, rotate = torch.ops.npu.npu_rms_norm, torch.ops.npu.npu_swiglu, torch.ops.npu.npu_rotary_mul

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return Kernels(
        source=f"torch_npu {importlib.metadata.version('torch-npu')}",
        rms_norm=lambda x, weight, epsilon: normalise(x, weight, epsilon)[0],
        centred_rms_norm=None,
        swiglu=lambda gate, up: swiglu(torch.cat((gate, up), dim=-1), -1),
        rotate=None if deterministic else rotate_both,
    )


PACKAGES: dict[str, Callable[[bool], Kernels]] = {"cuda": open_liger, "npu": open_torch_npu}


# ------------------------------------------------------------------------------------------------------------------- layers


def patch_rms_norm(module: Any, normalise: Normalise, *, epsilon: str) -> bool:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        return normalise(hidden_states, self.weight, getattr(self, epsilon))

    module.forward = MethodType(forward, module)
    return True


def patch_swiglu(module: Any, swiglu: Callable[[Tensor, Tensor], Tensor]) -> bool:
    if type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))  # type: ignore[no-any-return]

    module.forward = MethodType(forward, module)
    return True


def patch_rotary(module: Any, rotate: Rotate) -> bool:
    """Into the module of transformers that has the layer's class, whose attention calls it by name: for all models of this process."""
    modeling = sys.modules[type(module).__module__]
    plain = getattr(modeling, ROTARY)
    plain = getattr(plain, "replaced", plain)  # each layer of a class comes by here

    @functools.wraps(plain)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or cos.dtype != q.dtype:
            return plain(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
        return rotate(q, k, cos, sin)

    apply.replaced = plain  # type: ignore[attr-defined]
    setattr(modeling, ROTARY, apply)
    return True


@dataclass(frozen=True, kw_only=True)
class Layer:
    """`kernel`: the field of Kernels. `put(module, kernel)`: False where this one computes something else after all."""

    kernel: str
    put: Callable[..., bool]


NORM = Layer(kernel="rms_norm", put=functools.partial(patch_rms_norm, epsilon="variance_epsilon"))
CENTRED_NORM = Layer(kernel="centred_rms_norm", put=functools.partial(patch_rms_norm, epsilon="eps"))
SWIGLU = Layer(kernel="swiglu", put=patch_swiglu)
ROTATION = Layer(kernel="rotate", put=patch_rotary)

# transformers' classes by name. Not here, since they compute something else: Qwen3_5Attention, which rotates a part of each head,
# Qwen3_5RMSNormGated, and the MLPs of CLIP, InternViT and SigLIP, which have no gate.
LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen2_5_VLRMSNorm", "Qwen2_5OmniRMSNorm"), NORM),
    **dict.fromkeys(("InternVLVisionRMSNorm", "GraniteRMSNorm", "MistralRMSNorm"), NORM),
    **dict.fromkeys(("Qwen3_5RMSNorm",), CENTRED_NORM),
    **dict.fromkeys(("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "Qwen2_5_VLMLP", "Qwen2_5OmniMLP", "Qwen3_5MLP"), SWIGLU),
    **dict.fromkeys(("GraniteMLP", "MistralMLP"), SWIGLU),
    **dict.fromkeys(("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Qwen2_5_VLAttention", "Qwen2_5OmniAttention"), ROTATION),
    **dict.fromkeys(("GraniteAttention", "MistralAttention"), ROTATION),
}


# -------------------------------------------------------------------------------------------------------------------- a run


def use_kernels(model: torch.nn.Module, spec: TrainSpec) -> dict[str, str]:
    """Put fused kernels into a model as spec.kernels says. Returns kernel -> in how many layers and whose, or {"plain": why} where `auto`
    found none; {} where none was looked for. Raises InputRefused for `fused` that cannot be had, and where the ranks differ."""
    found = find_kernels(spec)
    used = fuse(model, found) if isinstance(found, Kernels) else {"plain": found} if found else {}
    if spec.kernels == "fused" and not (isinstance(found, Kernels) and used):
        why = found if isinstance(found, str) else f"no layer of {spec.model.name} has one"
        raise InputRefused(
            f"strategy.kernels=fused: {why}. Install what is missing (docs/training.md), or set strategy.kernels=auto, which goes on without."
        )
    refuse_difference(used)
    return used


def find_kernels(spec: TrainSpec) -> Kernels | str:
    """Those of the accelerator; else why there are none, '' where nobody misses them."""
    accelerator = spec.device.accelerator
    if spec.kernels == "plain" or (spec.kernels == "auto" and accelerator not in PACKAGES):
        return ""
    if accelerator not in PACKAGES:
        return f"there are none for {accelerator} devices, but for {' and '.join(PACKAGES)}"
    try:
        return PACKAGES[accelerator](spec.deterministic)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: Triton without a driver
        return f"{type(error).__name__}: {error}"


def fuse(model: torch.nn.Module, kernels: Kernels) -> dict[str, str]:
    """Put them into every layer that has one: kernel -> in how many layers, and whose it is."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        layer = LAYERS.get(type(module).__name__)
        kernel = getattr(kernels, layer.kernel) if layer is not None else None
        if layer is not None and kernel is not None and type(module).__module__.startswith("transformers."):
            counts[layer.kernel] += layer.put(module, kernel)
    return {name: f"{count} layers, {kernels.source}" for name, count in sorted(counts.items()) if count}


def refuse_difference(used: dict[str, str]) -> None:
    """Raises InputRefused on every rank where the ranks, on nodes with other packages, would not compute alike."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    said: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, used)
    if other := next((rank for rank, own in enumerate(said) if own != said[0]), 0):
        raise InputRefused(
            f"rank {other} has other kernels than rank 0: {said[other]}, not {said[0]}. Install the same packages on every node, or set "
            "strategy.kernels=plain."
        )
