"""AdamW over weights and moments that are bfloat16 and nothing else, rounded stochastically so that small updates are not lost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.stochastic_rounding import derive_keys, random_words, round_stochastically, split_words

# Elements that are in float32 at a time: on a CPU as many as stay in its cache, elsewhere enough to hide that each operation is started.
CHUNK = {"cpu": 2**17}
CHUNK_ELSEWHERE = 2**22
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """`count` elements of an optimizer's tensor, from `offset` on, that are the elements from `start` on of the parameter `name`."""

    name: str
    offset: int
    start: int
    count: int


class StochasticAdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, each element in float32 from its bfloat16 values to its rounding.

    The random bits of an update come from `seed`, the number of the update and the parameter's name and element, which `place` tells; a
    tensor that it does not know counts by its place in the first update. Never holds more than a chunk in float32.
    State of a tensor: step (int), exp_avg and exp_avg_sq (its shape, bfloat16).
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
        self.stretches: dict[Tensor, tuple[ParameterSlice, ...]] = {}

    def place(self, stretches: Mapping[Tensor, tuple[ParameterSlice, ...]]) -> None:
        """Which parameters lie where in the tensors that this rank updates. What none of them covers is padding."""
        self.stretches = dict(stretches)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. Raises ValueError for a tensor that is not bfloat16 or not contiguous, and for a closure, of which nobody has need."""
        if closure is not None:
            raise ValueError("StochasticAdamW takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if parameter.dtype != torch.bfloat16 or not parameter.is_contiguous():
            raise ValueError(f"StochasticAdamW takes contiguous bfloat16 tensors, not {parameter.dtype} of {tuple(parameter.shape)}")
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, **{key: torch.zeros_like(parameter) for key in MOMENTS}}
        state["step"] += 1
        weights, gradients, *moments = (t.detach().view(-1) for t in (parameter, parameter.grad.contiguous(), *(state[k] for k in MOMENTS)))
        for stretch in self.cover(parameter):
            for first in range(0, stretch.count, size := CHUNK.get(parameter.device.type, CHUNK_ELSEWHERE)):
                place = slice(stretch.offset + first, stretch.offset + min(first + size, stretch.count))
                held = (weights[place], *(moment[place] for moment in moments))
                values = adamw(*(tensor.float() for tensor in (*held, gradients[place])), step=state["step"], **group_settings(group))
                self.store(values, held, stretch, first, state["step"])

    def cover(self, parameter: Tensor) -> tuple[ParameterSlice, ...]:
        if parameter not in self.stretches:
            whole = ParameterSlice(name=f"#{len(self.stretches)}", offset=0, start=0, count=parameter.numel())
            self.stretches[parameter] = (whole,)
        return self.stretches[parameter]

    def store(self, values: tuple[Tensor, ...], held: tuple[Tensor, ...], stretch: ParameterSlice, first: int, step: int) -> None:
        """Each of weight and moments rounded by bits of its own."""
        words = random_words(derive_keys(self.seed, step, stretch.name), stretch.start + first, len(values[0]), values[0].device)
        for bits, value, tensor in zip(split_words(words), values, held, strict=True):
            tensor.copy_(round_stochastically(value, bits))


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


def parameter_slices(parts: Mapping[str, Any]) -> dict[Tensor, tuple[ParameterSlice, ...]]:
    """`parts`: trained parameter -> trainer.checkpoint.state.Part."""
    found: dict[Tensor, list[ParameterSlice]] = {}
    for name, part in parts.items():
        if part.count:
            found.setdefault(part.owner, []).append(ParameterSlice(name=name, offset=part.offset, start=part.start, count=part.count))
    return {owner: tuple(stretches) for owner, stretches in found.items()}
