"""Tensors without memory: they have shape, dtype and device, and operations on them compute only these.

torch's FakeTensorMode makes all tensors fake, so that a model that reads its inputs (the grid of an image, the lengths of windows, whether
anything is padded) fails. Here integers stay real, so the model takes the same branches as in a run; only large tensors of floats, such as
weights and activations, are fake.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

REAL_BYTES = 2**16  # tensors of floats up to this size stay real: an operator may read their values, as for positions on a grid
INDEXING = {torch.ops.aten.index.Tensor: False, torch.ops.aten.index_put.default: True, torch.ops.aten.index_put_.default: True}


class FakeTensors(TorchDispatchMode):  # type: ignore[misc]
    """While it is active, new large tensors of floats are fake, and so are the results of operations on fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor in types:
            return self.choose(func, args) if is_mask_indexing(func, args) else func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in tree_iter((args, kwargs))):
            return func(*args, **kwargs)
        with self.fakes:
            made = func(*args, **kwargs)
        large = isinstance(made, Tensor) and made.is_floating_point() and made.nbytes > REAL_BYTES
        return made if large else func(*args, **kwargs)

    def choose(self, func: Any, args: Any) -> Any:
        """Indexing by a real mask: the result has one row for each True."""
        if INDEXING[func]:
            return args[0] if func is torch.ops.aten.index_put_.default else self.empty_like(args[0], tuple(args[0].shape))
        source, (mask, *_) = args[0], args[1]
        shape = (int(torch.count_nonzero(mask)), *source.shape[mask.ndim :])
        return self.empty_like(source, shape)

    def empty_like(self, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        with self.fakes:
            return torch.empty(shape, dtype=source.dtype, device=source.device)

    def fake(self, source: Tensor) -> Tensor:
        """A fake tensor of the same shape and dtype."""
        return self.empty_like(source, tuple(source.shape))


def is_mask_indexing(func: Any, args: Any) -> bool:
    """Whether the first dimensions are indexed by one real mask."""
    if func not in INDEXING:
        return False
    masks = [index for index in args[1] if index is not None]
    return len(masks) == 1 and args[1][0] is not None and masks[0].dtype == torch.bool and not isinstance(masks[0], FakeTensor)


def empty_weights(model: torch.nn.Module, fakes: FakeTensors, dtype: torch.dtype) -> None:
    """Replace all parameters by fake ones, in place and in `dtype`; ties between them stay."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = fakes.fake(parameter.to(dtype) if parameter.is_floating_point() else parameter)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]


@contextmanager
def conversion_by_replacement() -> Iterator[None]:
    """Within it Module.to and similar methods replace tensors by new ones. torch would swap the contents of the two if one is fake, and refuses
    that because the mode refers to the fake one."""
    before = torch.nn.Module._apply
    torch.nn.Module._apply = replace_tensors  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module._apply = before  # type: ignore[method-assign]


def replace_tensors(module: torch.nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    for part in module.modules() if recurse else (module,):
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made = convert(tensor.detach())
                    whole = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if whole else made
    return module


@contextmanager
def kernels_of_an_accelerator(*, dropout: bool) -> Iterator[None]:
    """Attention, and optionally dropout, keep for the backward pass what the kernels of CUDA and of an NPU keep. The CPU keeps more: for
    attention with grouped heads the whole matrix of scores, for dropout a mask as wide as its input."""
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention, functional.dropout
    functional.scaled_dot_product_attention, functional.dropout = fake_attention, fake_dropout if dropout else before[1]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = before


def fake_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Replaces torch.nn.functional.scaled_dot_product_attention. (B, heads, T, width); key and value may have fewer heads."""
    result: Tensor = FakeAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return result


class FakeAttention(torch.autograd.Function):
    """Flash attention keeps query, key, value, its result and the log-sum-exp of each row, float32 (Dao, arXiv 2307.08691, algorithm 1); with a
    mask the memory-efficient kernel keeps that too, in the dtype of the query. The result is stored as (B, T, heads, width). Values are not
    computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty((batch, heads, length), dtype=torch.float32)
        kept = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, result, rows, kept)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def fake_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Replaces torch.nn.functional.dropout: one kernel, which keeps a mask of one byte per element."""
    return torch.native_dropout(input, p, True)[0] if training and p else input
