"""AdamW over bfloat16 weights and moments without float32 copies, rounded stochastically so that small updates are not lost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.device.dtype import dtype_name
from trainer.optim.stochastic_rounding import derive_keys, random_words, round_stochastically, split_words

# Elements that are in float32 at a time: on a CPU as many as fit in its cache, elsewhere enough to hide the launch of each operation.
CHUNK = {"cpu": 2**17}
CHUNK_ELSEWHERE = 2**22
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """`count` elements of an optimizer's tensor, from `offset`, that are the elements from `start` of the parameter `name`."""

    name: str
    offset: int
    start: int
    count: int


class StochasticAdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, each element in float32 from its bfloat16 values to its rounding.

    The random bits of an update come from `seed`, the number of the update, and the parameter's name and element index, as set by
    `set_layout`; an unknown tensor is named by its index in the first update. Never holds more than a chunk in float32.
    State per tensor: step (int), exp_avg and exp_avg_sq (its shape, bfloat16).
    """

    def __init__(
        self,
        params: Any,
        *,
        seed: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.layout: dict[Tensor, tuple[ParameterSlice, ...]] = {}

    def set_layout(self, layout: Mapping[Tensor, tuple[ParameterSlice, ...]]) -> None:
        """Which parameters are where in the tensors that this rank updates. Elements outside all of them are padding."""
        self.layout = dict(layout)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. Raises ValueError as `find_gradients`."""
        for parameter, group in find_gradients(self, closure, torch.bfloat16):
            self.update(parameter, group)

    def update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, **{key: torch.zeros_like(parameter) for key in MOMENTS}}
        state["step"] += 1
        weights, gradients, *moments = (t.detach().view(-1) for t in (parameter, parameter.grad.contiguous(), *(state[k] for k in MOMENTS)))
        for piece in self.slices_of(parameter):
            for first in range(0, piece.count, size := CHUNK.get(parameter.device.type, CHUNK_ELSEWHERE)):
                index = slice(piece.offset + first, piece.offset + min(first + size, piece.count))
                held = (weights[index], *(moment[index] for moment in moments))
                values = adamw(*(tensor.float() for tensor in (*held, gradients[index])), step=state["step"], **group_settings(group))
                self.store(values, held, piece, first, state["step"])

    def slices_of(self, parameter: Tensor) -> tuple[ParameterSlice, ...]:
        if parameter not in self.layout:
            whole = ParameterSlice(name=f"#{len(self.layout)}", offset=0, start=0, count=parameter.numel())
            self.layout[parameter] = (whole,)
        return self.layout[parameter]

    def store(self, values: tuple[Tensor, ...], held: tuple[Tensor, ...], piece: ParameterSlice, first: int, step: int) -> None:
        """Round weight and moments, each with its own bits."""
        words = random_words(derive_keys(self.seed, step, piece.name), piece.start + first, len(values[0]), values[0].device)
        for bits, value, tensor in zip(split_words(words), values, held, strict=True):
            tensor.copy_(round_stochastically(value, bits))


def find_gradients(
    optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with a gradient, and its group. Raises ValueError for a closure, and for a tensor of another dtype or not contiguous."""
    name = type(optimizer).__name__
    if closure is not None:
        raise ValueError(f"{name} takes no closure")
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if p.grad is not None):
            if parameter.dtype != dtype or not parameter.is_contiguous():
                raise ValueError(f"{name} takes contiguous {dtype_name(dtype)} tensors, not {parameter.dtype} of {tuple(parameter.shape)}")
            yield parameter, group


def group_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def adamw(
    weight: Tensor,
    average: Tensor,
    square: Tensor,
    gradient: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) float32 each, changed in place: weight and both moments after the update. torch's order of operations."""
    average.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    spread = square.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    weight.mul_(1 - lr * weight_decay).addcdiv_(average, spread, value=-lr / (1 - betas[0] ** step))
    return weight, average, square


def parameter_slices(shards: Mapping[str, Any]) -> dict[Tensor, tuple[ParameterSlice, ...]]:
    """`shards`: trained parameter -> OptimizerShard."""
    found: dict[Tensor, list[ParameterSlice]] = {}
    for name, shard in shards.items():
        if shard.count:
            found.setdefault(shard.owner, []).append(ParameterSlice(name=name, offset=shard.offset, start=shard.start, count=shard.count))
    return {owner: tuple(layout) for owner, layout in found.items()}
