"""AdamW whose two moments are held in 8 bits an element, over float32 weights.

Our own and not bitsandbytes' AdamW8bit: that has kernels for CUDA, XPU and, lately, CPUs, none for an NPU, is in no lock of images/, and
counts its blocks from the start of the tensor that it is given. Under ZeRO that is a rank's slice of many parameters, so that its codes
mean nothing at another number of ranks, and whether a parameter is small enough to stay in float32 goes by the slice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.adamw import CHUNK, CHUNK_ELSEWHERE, MOMENTS, adamw, group_settings
from trainer.optim.blockwise import BLOCK, dequantize, quantize
from trainer.optim.optimizer_shard import OptimizerShard
from trainer.optim.stochastic_rounding import LOW, derive_keys, random_words

SMALLEST = 4096  # elements of a parameter whose moments are quantized, as in bitsandbytes: norms and biases stay in float32
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """`count` elements of a parameter's moment: codes (blocks, BLOCK) uint8 and scales (blocks,) float32, changed in place. Blocks are
    counted from the parameter's own start, so that those which no partition cuts are the same on any number of ranks. `first`: the number
    of the first block here, of which `lead` elements lie on another rank, and are zero."""

    codes: Tensor
    scales: Tensor
    signed: bool
    first: int
    lead: int
    count: int

    def read(self) -> Tensor:
        """(count,) float32."""
        return dequantize(self.codes, self.scales, signed=self.signed).view(-1).narrow(0, self.lead, self.count)

    def write(self, values: Tensor) -> None:
        """(count,) float32. What `read` gave goes back in bit by bit."""
        blocks = torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        blocks.view(-1).narrow(0, self.lead, self.count).copy_(values)
        self.close(slice(None), blocks)

    def open(self, place: slice) -> Tensor:
        """Some of the blocks, (blocks, BLOCK) float32."""
        return dequantize(self.codes[place], self.scales[place], signed=self.signed)

    def close(self, place: slice, blocks: Tensor, bits: Tensor | None = None) -> None:
        self.codes[place], self.scales[place] = quantize(blocks, signed=self.signed, bits=bits)


def make_moment(part: OptimizerShard, *, signed: bool) -> Quantized | Tensor:
    """Zero everywhere, on the owner's device; (count,) float32 where the parameter is small."""
    device = part.owner.device
    if part.numel < SMALLEST or not part.count:
        return torch.zeros(part.count, dtype=torch.float32, device=device)
    first, lead = divmod(part.start, BLOCK)
    blocks = -(-(lead + part.count) // BLOCK)
    codes = torch.zeros((blocks, BLOCK), dtype=torch.uint8, device=device)
    scales = torch.zeros(blocks, dtype=torch.float32, device=device)
    return Quantized(codes=codes, scales=scales, signed=signed, first=first, lead=lead, count=part.count)


class AdamW8bit(torch.optim.Optimizer):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float32 a chunk at a time, from the moments' codes to their new codes: of the
    first moment the nearest ones, of the second stochastically rounded ones. The random bits come from `seed`, the number of the update
    and the parameter's name and element, which `place` tells.

    State of a tensor: step (int); exp_avg and exp_avg_sq, name of a parameter that lies in it -> Quantized, or float32 where it is small.
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
        self.parts: dict[Tensor, dict[str, OptimizerShard]] = {}

    def place(self, parts: Mapping[str, OptimizerShard]) -> None:
        """Which parameters lie where in the tensors that this rank updates. What none of them covers is padding."""
        self.parts = {}
        for name, part in parts.items():
            self.parts.setdefault(part.owner, {})[name] = part

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. Raises ValueError for a tensor that is not float32 or not contiguous, and for a closure, of which nobody has need."""
        if closure is not None:
            raise ValueError("AdamW8bit takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise ValueError(f"AdamW8bit takes contiguous float32 tensors, not {parameter.dtype} of {tuple(parameter.shape)}")
        state = self.begin(parameter)
        state["step"] += 1
        gradients = parameter.grad.contiguous()  # type: ignore[union-attr]
        for name, part in self.cover(parameter).items():
            held, values = tuple(state[key][name] for key in MOMENTS), {"step": state["step"], **group_settings(group)}
            if isinstance(held[0], Tensor):
                adamw(part.of(parameter), *held, part.of(gradients).float(), **values)
            else:
                keys = derive_keys(self.seed, state["step"], name)
                update_blocks(part.of(parameter), held, part.of(gradients), keys, **values)

    def cover(self, parameter: Tensor) -> dict[str, OptimizerShard]:
        if parameter not in self.parts:
            count = parameter.numel()
            whole = OptimizerShard(parameter=parameter, numel=count, owner=parameter, offset=0, start=0, count=count)  # type: ignore[arg-type]
            self.parts[parameter] = {f"#{len(self.parts)}": whole}
        return self.parts[parameter]

    def begin(self, parameter: Tensor, steps: int = 0) -> dict[str, Any]:
        """The state of a tensor, made where there is none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            parts = self.cover(parameter)
            moments = {key: {name: make_moment(part, signed=SIGNED[key]) for name, part in parts.items()} for key in MOMENTS}
            state |= {"step": steps, **moments}
        return state

    def read_moments(self, owner: Tensor, name: str) -> dict[str, Tensor]:
        """What this rank holds of a parameter's moments, (count,) float32 each; {} before the first update."""
        state = self.state.get(owner) or {}
        held = {key: state[key][name] for key in MOMENTS if state}
        return {key: moment if isinstance(moment, Tensor) else moment.read() for key, moment in held.items()}

    def write_moments(self, owner: Tensor, name: str, moments: Mapping[str, Tensor], *, steps: int) -> None:
        """The other way round."""
        state = self.begin(owner, steps)
        for key, values in moments.items():
            held = state[key][name]
            held.copy_(values) if isinstance(held, Tensor) else held.write(values)


def update_blocks(weights: Tensor, held: tuple[Quantized, ...], gradients: Tensor, keys: tuple[int, int], **values: Any) -> None:
    """Weights and gradients (count,), and both moments of them, as many blocks at a time as make a chunk."""
    average, square = held
    lead, count, total = square.lead, square.count, len(square.scales)
    size = CHUNK.get(weights.device.type, CHUNK_ELSEWHERE) // BLOCK
    for first in range(0, total, size):
        blocks = slice(first, min(first + size, total))
        begin, end = max(0, first * BLOCK - lead), min(count, (first + size) * BLOCK - lead)
        averages, squares = average.open(blocks), square.open(blocks)
        moments = (opened.view(-1).narrow(0, begin + lead - first * BLOCK, end - begin) for opened in (averages, squares))
        adamw(weights[begin:end], *moments, gradients[begin:end].float(), **values)
        average.close(blocks, averages)
        words = random_words(keys, (square.first + first) * BLOCK, squares.numel(), squares.device)
        square.close(blocks, squares, words.bitwise_and_(LOW))
