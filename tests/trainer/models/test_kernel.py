"""Fused kernels beside transformers' own layers: the same loss and gradients, names and checkpoints.

Triton has an interpreter for the CPU, in which liger-kernel's own code runs here where both are installed. Ascend's operators do not run
without an NPU: stand-ins of the same names and arguments compute their documented formulas, so that what is tested is how they are called.
"""

import copy
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, rotate_half
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from tests.trainer.models.conftest import TINY, Made, to_arguments
from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample
from trainer.kernels.fused import (
    PACKAGES,
    ROTARY,
    Kernels,
    fuse,
    open_liger,
    open_torch_npu,
    patch_rms_norm,
    refuse_difference,
    use_kernels,
)

# The number of layers of each tiny model that get a kernel: a class that transformers renames would be missed silently.
LAYERS: dict[str, dict[str, int]] = {
    "tiny_llava": {"rms_norm": 7, "rotate": 3, "swiglu": 3},
    "tiny_qwen2_5_vl": {"rms_norm": 10, "rotate": 2, "swiglu": 4},
    "tiny_internvl": {"rms_norm": 5, "rotate": 2, "swiglu": 2},
    "tiny_qwen2_5_omni": {"rms_norm": 10, "rotate": 2, "swiglu": 4},
    "tiny_minicpm_v_4_6": {"centred_rms_norm": 7, "swiglu": 2},
    "tiny_minicpm_v_2_6": {"rms_norm": 5, "rotate": 2, "swiglu": 2},
    "tiny_omnilmm_3b": {"rms_norm": 7, "rotate": 3, "swiglu": 3},
    "tiny_omnilmm_12b": {"rms_norm": 7, "rotate": 3, "swiglu": 3},
}
SCHEMAS = {  # torch_npu 2.7.1.post8, torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml
    "npu_rms_norm": "(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rotary_mul": "(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    "npu_swiglu": "(Tensor self, int dim=-1) -> Tensor",
}


@pytest.fixture(autouse=True)
def rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the functions that a kernel replaces for the whole process."""
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]:
        if ROTARY in vars(module):
            monkeypatch.setattr(module, ROTARY, vars(module)[ROTARY])


# ----------------------------------------------------------------------------------------------------------- the packages


def stand_in_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (x.float() * rstd).to(x.dtype) * gamma, rstd


def stand_in_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    assert x.ndim == r1.ndim == r2.ndim == 4 and r1.shape[1] == 1 and rotary_mode == "half" and rotate is None
    return x * r1 + rotate_half(x) * r2


def stand_in_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim=dim)
    return silu(gate) * up


@pytest.fixture(scope="session")
def operators() -> Iterator[None]:
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed here: its own operators stand under these names")
    library = torch.library.Library("npu", "FRAGMENT")
    for (name, schema), function in zip(SCHEMAS.items(), (stand_in_rms_norm, stand_in_rotary_mul, stand_in_swiglu), strict=True):
        library.define(name + schema)
        library.impl(name, function, "CompositeImplicitAutograd")
    yield
    library._destroy()


@pytest.fixture
def npu(operators: None, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.1" if name == "torch-npu" else version(name))
    return open_torch_npu(False)


@pytest.fixture(scope="session")
def liger() -> Iterator[Kernels]:
    """liger-kernel in Triton's interpreter. The interpreter passes Python floats where a compiled kernel gets float32 scalars, and lacks the
    GPU's math library, from which liger-kernel uses one function that Triton also has (and that it uses on an NPU)."""
    if not (importlib.util.find_spec("triton") and importlib.util.find_spec("liger_kernel")):
        pytest.skip("liger-kernel and triton are not installed here: pip install --no-deps liger-kernel triton")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported before TRITON_INTERPRET was set: run this file alone, with TRITON_INTERPRET=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import numpy
        from triton import language
        from triton.runtime import interpreter

        plain = interpreter._implicit_cvt

        def convert(value: Any) -> Any:
            if not isinstance(value, float):
                return plain(value)
            handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), language.float32)
            return language.tensor(handle, language.float32)

        patch.setattr(interpreter, "_implicit_cvt", convert)
        kernels = open_liger(False)
        patch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: language.math.rsqrt(x))  # interpreted while a kernel runs
        yield kernels


# -------------------------------------------------------------------------------------------------------------- one layer


def results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of a weighted sum of them."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    made = function(*(leaf * 1 for leaf in leaves))  # like the output of a linear layer, which a kernel may overwrite
    outputs = list(made) if isinstance(made, tuple) else [made]
    kept = [output.detach().clone() for output in outputs]
    random = torch.Generator().manual_seed(1)
    sum((output.float() * torch.randn(output.shape, generator=random)).sum() for output in outputs).backward()  # type: ignore[union-attr]
    return [*kept, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(function: Callable[..., Any], plain: Callable[..., Any], inputs: tuple[Tensor, ...], bound: float) -> None:
    """Each output and gradient, within `bound` of its largest value."""
    ours, theirs = results(function, inputs), results(plain, inputs)
    assert len(ours) == len(theirs) > len(inputs) - 1
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert float((one.float() - other.float()).abs().max()) <= bound * float(other.float().abs().max())


# A kernel that computes in float32 to its end differs by one ulp from operators that round in between: 2^-10 in float16, which is also used
# for bfloat16, because the interpreter multiplies the bits of two bfloat16 values as integers.
BOUNDS = [(torch.float32, 2e-6), (torch.float16, 2**-9)]


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=random).to(dtype) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("width", [96, 1024])
def test_ligers_norms_equal_those_of_transformers(width: int, dtype: torch.dtype, bound: float, liger: Kernels) -> None:
    x, weight = draw(dtype, (2, 3, width), (width,))
    for module, kernel in ((LlamaRMSNorm(width), liger.rms_norm), (Qwen3_5RMSNorm(width), liger.centred_rms_norm)):
        assert kernel is not None

        def plain(x: Tensor, weight: Tensor, module: torch.nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, {"weight": weight}, (x,))

        def fused(x: Tensor, weight: Tensor, kernel: Any = kernel) -> Tensor:
            return kernel(x, weight, 1e-6)  # type: ignore[no-any-return]

        assert_near(fused, plain, (x, weight), bound)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_ligers_swiglu_and_rotation_equal_those_of_transformers(dtype: torch.dtype, bound: float, liger: Kernels) -> None:
    assert_near(liger.swiglu, lambda gate, up: silu(gate) * up, draw(dtype, (2, 3, 200), (2, 3, 200)), bound)
    q, k = draw(dtype, (2, 3, 4, 16), (2, 3, 2, 16))  # (samples, T, heads, width), as the output of the linear layers
    angles = torch.rand(2, 3, 8).repeat(1, 1, 2) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotate = liger.rotate
    assert rotate is not None
    assert_near(
        lambda q, k: rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        lambda q, k: apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        (q, k),
        bound,
    )


# ----------------------------------------------------------------------------------------------------------- whole models


def measure(made: Made, model: Any, samples: tuple[Sample, ...]) -> tuple[float, dict[str, Tensor]]:
    batch = collate(samples, made.processor, made.spec)
    trained = batch["labels"][:, 1:] != IGNORED
    positions = torch.nn.functional.pad(trained, (0, 1))
    model.zero_grad()
    logits = model(**to_arguments(batch, "labels"), logits_to_keep=positions, use_cache=False).logits
    loss = cross_entropy(logits.float(), batch["labels"][:, 1:][trained])
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(made: Made, kernels: Kernels, samples: tuple[Sample, ...]) -> None:
    """The loss within 1e-5; gradients within 1e-5 of the largest of their parameter or 1e-6 of the largest of the model."""
    loss, gradients = measure(made, copy.deepcopy(made.model), samples)
    model = copy.deepcopy(made.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = {name: where.split()[0] for name, where in fuse(model, kernels).items()}
    expected = {name: str(count) for name, count in LAYERS[made.name].items() if getattr(kernels, name) is not None}
    assert counts == expected
    fused_loss, fused = measure(made, model, samples)
    assert fused_loss == pytest.approx(loss, rel=1e-5) and gradients.keys() == fused.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((fused[name] - gradient).abs().max()) <= max(1e-5 * float(gradient.abs().max()), 1e-6 * largest), name
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_ascends_operators_are_called_as_documented(tiny: Made, samples: tuple[Sample, ...], npu: Kernels) -> None:
    assert_same_step(tiny, npu, samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_step_with_ligers_kernels_is_the_same(
    name: str, make_tiny: Callable[[str], Made], samples: tuple[Sample, ...], liger: Kernels
) -> None:
    assert_same_step(make_tiny(name), liger, samples[:1])


def test_every_kernel_is_called(make_tiny: Callable[[str], Made], samples: tuple[Sample, ...], npu: Kernels) -> None:
    """transformers must call the replaced functions."""
    made, calls = make_tiny("tiny_internvl"), dict.fromkeys(("rms_norm", "swiglu", "rotate"), 0)

    def counting(name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            calls[name] += 1
            return getattr(npu, name)(*values)

        return call

    model = copy.deepcopy(made.model)
    fuse(model, replace(npu, **{name: counting(name) for name in calls}))
    measure(made, model, samples[:1])
    assert calls == LAYERS[made.name]


def test_inputs_of_another_dtype_than_the_weight_use_the_plain_path() -> None:
    norm, x = LlamaRMSNorm(8), torch.randn(2, 8).bfloat16()
    plain = norm(x)
    patch_rms_norm(norm, lambda *_: pytest.fail("the kernel was called"), epsilon="variance_epsilon")
    assert torch.equal(norm(x), plain) and plain.dtype == torch.float32


def test_torchs_norm_equals_that_of_transformers_up_to_rounding() -> None:
    """The CPU has no kernel because of its speed, not because of its results (trainer.kernels.fused)."""
    (x,) = draw(torch.float32, (4, 96))
    norm = LlamaRMSNorm(96)
    assert torch.allclose(rms_norm(x, (96,), norm.weight, norm.variance_epsilon), norm(x), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ a run


def asked(made: Made, kernels: str, accelerator: str, **changes: Any) -> TrainSpec:
    return replace(made.spec, kernels=kernels, device=replace(made.spec.device, accelerator=accelerator), **changes)


def missing(_: bool) -> Kernels:
    raise ImportError("No module named 'liger_kernel'")


def test_auto_uses_the_installed_package(make_tiny: Callable[[str], Made], npu: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tiny("tiny_llava")
    for kernels, accelerator in (("plain", "npu"), ("plain", "cuda"), ("auto", "cpu")):
        assert use_kernels(made.model, asked(made, kernels, accelerator)) == {}
    monkeypatch.setitem(PACKAGES, "cuda", missing)
    assert use_kernels(made.model, asked(made, "auto", "cuda")) == {"plain": "ImportError: No module named 'liger_kernel'"}
    assert not any("forward" in vars(module) for module in made.model.modules())
    model = copy.deepcopy(made.model)
    where = {name: f"{count} layers, torch_npu 2.7.1" for name, count in LAYERS["tiny_llava"].items()}
    assert use_kernels(model, asked(made, "auto", "npu")) == use_kernels(model, asked(made, "fused", "npu")) == where
    del where["rotate"]
    assert use_kernels(copy.deepcopy(made.model), asked(made, "fused", "npu", deterministic=True)) == where


@pytest.mark.parametrize(
    ("accelerator", "says"), [("cpu", "none for cpu devices, only for cuda and npu"), ("cuda", "No module named 'liger_kernel'")]
)
def test_kernels_that_are_not_available_are_refused(
    accelerator: str, says: str, make_tiny: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "cuda", missing)
    made = make_tiny("tiny_llava")
    with pytest.raises(InputRefused, match=rf"strategy\.kernels=fused: .*{says}.*strategy\.kernels=auto"):
        use_kernels(made.model, asked(made, "fused", accelerator))


def test_a_model_without_such_layers_is_refused(make_tiny: Callable[[str], Made], npu: Kernels) -> None:
    made = make_tiny("tiny_llava")
    with pytest.raises(InputRefused, match=f"no layer of {made.spec.model.name} has one"):
        use_kernels(torch.nn.Linear(2, 2), asked(made, "fused", "npu"))


def test_ranks_with_other_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(said: list[Any], own: dict[str, str]) -> None:
        said[:] = [own, own, {"plain": "No module named 'liger_kernel'"}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(InputRefused, match=r"rank 2 has other kernels than rank 0: .*strategy\.kernels=plain"):
        refuse_difference({"swiglu": "3 layers, liger-kernel 0.8.5"})
    refuse_difference({"plain": "No module named 'liger_kernel'"})
