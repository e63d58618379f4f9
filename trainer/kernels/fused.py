"""Fused kernels: one kernel for a layer's operations, from liger-kernel (Triton) on CUDA and from torch_npu's operators on an NPU.

They are patched into a built model. Parameters, their names and checkpoints stay the same. Liger's own patches of whole families are not
used: they replace the model's forward pass and with it the logits at trained positions only (trainer.distributed.engine), and those of
0.8.5 look in Qwen2.5-VL for a rotary function that transformers 5.23 has renamed. Liger's cross-entropy is not used either, since
trainer.kernels.cross_entropy needs no package. LayerNorm is one kernel in torch already. The CPU has none: torch.nn.functional.rms_norm is
a chain of the same operators there (torch 2.13; 512 rows of 1024: 7.2 ms, transformers' 7.4 ms).
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

Normalize = Callable[[Tensor, Tensor, float], Tensor]  # x (..., width), weight (width,), epsilon -> like x
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ROTARY = "apply_rotary_pos_emb"  # in every modeling module of transformers with a decoder


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of a package; None = it has none for this. All inputs and the output have one dtype.

    `rms_norm`: weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, in float32 up to the product with the weight (Zhang and
    Sennrich, arXiv 1910.07467). `centred_rms_norm`: the same with 1 + weight, in float32 to its end. `swiglu(gate, up)`: silu(gate) * up
    (Shazeer, arXiv 2002.05202). `rotate(q, k, cos, sin)`: x * cos + rotate_half(x) * sin (Su et al., arXiv 2104.09864); q and k (samples,
    heads, T, width), cos and sin (samples or 1, T, width).
    """

    source: str
    rms_norm: Normalize
    centred_rms_norm: Normalize | None
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Rotate | None


def open_liger(deterministic: bool) -> Kernels:
    """Raises ImportError without liger-kernel or Triton. `in_place` is False: otherwise the norm's backward pass overwrites a gradient that
    the residual stream may still need. Rotation and SwiGLU overwrite the output of a linear layer, which nothing else reads."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    return Kernels(
        source=f"liger-kernel {importlib.metadata.version('liger-kernel')}",
        rms_norm=lambda x, weight, epsilon: LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False),
        centred_rms_norm=lambda x, weight, epsilon: LigerRMSNormFunction.apply(x, weight, epsilon, 1.0, "gemma", False),
        swiglu=LigerSiLUMulFunction.apply,
        rotate=LigerRopeFunction.apply,
    )


def open_torch_npu(deterministic: bool) -> Kernels:
    """The operators that torch_npu registers when it is imported (trainer.device.device). Raises AttributeError if one is missing. A
    deterministic run gets no rotation: its backward pass is not reproducible (Ascend/MindSpeed, docs/ops/npu_rotary_position_embedding.md)."""
    normalize, swiglu, rotate = torch.ops.npu.npu_rms_norm, torch.ops.npu.npu_swiglu, torch.ops.npu.npu_rotary_mul

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return Kernels(
        source=f"torch_npu {importlib.metadata.version('torch-npu')}",
        rms_norm=lambda x, weight, epsilon: normalize(x, weight, epsilon)[0],
        centred_rms_norm=None,
        swiglu=lambda gate, up: swiglu(torch.cat((gate, up), dim=-1), -1),
        rotate=None if deterministic else rotate_both,
    )


PACKAGES: dict[str, Callable[[bool], Kernels]] = {"cuda": open_liger, "npu": open_torch_npu}


def patch_rms_norm(module: Any, normalize: Normalize, *, epsilon: str) -> bool:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        return normalize(hidden_states, self.weight, getattr(self, epsilon))

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
    """Replaces the function that attention calls in the layer's module of transformers: for all models of this process."""
    modeling = sys.modules[type(module).__module__]
    plain = getattr(modeling, ROTARY)
    plain = getattr(plain, "replaced", plain)  # this runs once per layer of the class

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
    """`kernel`: a field of Kernels. `put(module, kernel)` returns False if this layer computes something else after all."""

    kernel: str
    put: Callable[..., bool]


NORM = Layer(kernel="rms_norm", put=functools.partial(patch_rms_norm, epsilon="variance_epsilon"))
CENTRED_NORM = Layer(kernel="centred_rms_norm", put=functools.partial(patch_rms_norm, epsilon="eps"))
SWIGLU = Layer(kernel="swiglu", put=patch_swiglu)
ROTATION = Layer(kernel="rotate", put=patch_rotary)

# Classes of transformers by name. Left out, since they compute something else: Qwen3_5Attention, which rotates a part of each head,
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


def use_kernels(model: torch.nn.Module, spec: TrainSpec) -> dict[str, str]:
    """Patch fused kernels into a model as spec.kernels says. Returns kernel -> number of layers and package, {"plain": reason} if `auto`
    found none, {} if none was looked for. Raises InputRefused if `fused` is not available, and if the ranks differ."""
    found = find_kernels(spec)
    used = fuse(model, found) if isinstance(found, Kernels) else {"plain": found} if found else {}
    if spec.kernels == "fused" and not (isinstance(found, Kernels) and used):
        why = found if isinstance(found, str) else f"no layer of {spec.model.name} has one"
        raise InputRefused(
            f"strategy.kernels=fused: {why}. Install what is missing (docs/training.md), or set strategy.kernels=auto, which continues "
            "without fused kernels."
        )
    refuse_difference(used)
    return used


def find_kernels(spec: TrainSpec) -> Kernels | str:
    """The accelerator's kernels, or the reason why there are none ('' where none are expected)."""
    accelerator = spec.device.accelerator
    if spec.kernels == "plain" or (spec.kernels == "auto" and accelerator not in PACKAGES):
        return ""
    if accelerator not in PACKAGES:
        return f"there are none for {accelerator} devices, only for {' and '.join(PACKAGES)}"
    try:
        return PACKAGES[accelerator](spec.deterministic)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: Triton without a driver
        return f"{type(error).__name__}: {error}"


def fuse(model: torch.nn.Module, kernels: Kernels) -> dict[str, str]:
    """Patch every layer that has a kernel: kernel -> number of layers and package."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        layer = LAYERS.get(type(module).__name__)
        kernel = getattr(kernels, layer.kernel) if layer is not None else None
        if layer is not None and kernel is not None and type(module).__module__.startswith("transformers."):
            counts[layer.kernel] += layer.put(module, kernel)
    return {name: f"{count} layers, {kernels.source}" for name, count in sorted(counts.items()) if count}


def refuse_difference(used: dict[str, str]) -> None:
    """Raises InputRefused on every rank if ranks would compute differently because their nodes have other packages."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, used)
    if other := next((rank for rank, own in enumerate(gathered) if own != gathered[0]), 0):
        raise InputRefused(
            f"rank {other} has other kernels than rank 0: {gathered[other]}, not {gathered[0]}. Install the same packages on every node, or set "
            "strategy.kernels=plain."
        )
