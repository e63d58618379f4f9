"""AdamW over float32 weights, with both moments in 8 bits per element.

Why not bitsandbytes' AdamW8bit: it has kernels for CUDA, XPU and lately CPUs, but none for an NPU; it is in no lock of images/; and it
counts blocks from the start of the tensor that it is given. Under ZeRO that tensor is a rank's slice of many parameters, so its codes are
useless on another number of ranks, and the slice decides whether a parameter is small enough to stay in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.adamw import CHUNK, CHUNK_ELSEWHERE, MOMENTS, adamw, find_gradients, group_settings
from trainer.optim.blockwise import BLOCK, dequantize, quantize
from trainer.optim.optimizer_shard import OptimizerShard
from trainer.optim.stochastic_rounding import LOW, derive_keys, random_words

SMALLEST = 4096  # elements of a parameter whose moments are quantized, as in bitsandbytes: norms and biases stay in float32
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """`count` elements of a parameter's moment: codes (blocks, BLOCK) uint8 and scales (blocks,) float32, changed in place. Blocks are
    counted from the start of the parameter, so that blocks inside a partition are the same on any number of ranks. `first`: number of the
    first block here; its first `lead` elements belong to another rank, and are zero."""

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
        """(count,) float32. Writing what `read` returned restores bitwise identical codes."""
        blocks = torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        blocks.view(-1).narrow(0, self.lead, self.count).copy_(values)
        self.write_blocks(slice(None), blocks)

    def read_blocks(self, index: slice) -> Tensor:
        """Some of the blocks, (blocks, BLOCK) float32."""
        return dequantize(self.codes[index], self.scales[index], signed=self.signed)

    def write_blocks(self, index: slice, blocks: Tensor, bits: Tensor | None = None) -> None:
        self.codes[index], self.scales[index] = quantize(blocks, signed=self.signed, bits=bits)


def make_moment(shard: OptimizerShard, *, signed: bool) -> Quantized | Tensor:
    """Zeros on the owner's device; (count,) float32 if the parameter is small."""
    device = shard.owner.device
    if shard.numel < SMALLEST or not shard.count:
        return torch.zeros(shard.count, dtype=torch.float32, device=device)
    first, lead = divmod(shard.start, BLOCK)
    blocks = -(-(lead + shard.count) // BLOCK)
    codes = torch.zeros((blocks, BLOCK), dtype=torch.uint8, device=device)
    scales = torch.zeros(blocks, dtype=torch.float32, device=device)
    return Quantized(codes=codes, scales=scales, signed=signed, first=first, lead=lead, count=shard.count)


class AdamW8bit(torch.optim.Optimizer):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float32, a chunk at a time. The first moment is rounded to the nearest code,
    the second one stochastically, with bits from `seed`, the number of the update, and the parameter's name and element index.

    State per tensor: step (int); exp_avg and exp_avg_sq: name of a parameter in it -> Quantized, or a float32 tensor if it is small.
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
        self.shards: dict[Tensor, dict[str, OptimizerShard]] = {}

    def set_layout(self, shards: Mapping[str, OptimizerShard]) -> None:
        """Which parameters are where in the tensors that this rank updates. Elements outside all of them are padding."""
        self.shards = {}
        for name, shard in shards.items():
            self.shards.setdefault(shard.owner, {})[name] = shard

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. Raises ValueError as `find_gradients`."""
        for parameter, group in find_gradients(self, closure, torch.float32):
            self.update(parameter, group)

    def update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.begin(parameter)
        state["step"] += 1
        gradients = parameter.grad.contiguous()  # type: ignore[union-attr]
        for name, shard in self.shards_of(parameter).items():
            held, values = tuple(state[key][name] for key in MOMENTS), {"step": state["step"], **group_settings(group)}
            if isinstance(held[0], Tensor):
                adamw(shard.of(parameter), *held, shard.of(gradients).float(), **values)
            else:
                keys = derive_keys(self.seed, state["step"], name)
                update_blocks(shard.of(parameter), held, shard.of(gradients), keys, **values)

    def shards_of(self, parameter: Tensor) -> dict[str, OptimizerShard]:
        if parameter not in self.shards:
            count = parameter.numel()
            whole = OptimizerShard(parameter=parameter, numel=count, owner=parameter, offset=0, start=0, count=count)  # type: ignore[arg-type]
            self.shards[parameter] = {f"#{len(self.shards)}": whole}
        return self.shards[parameter]

    def begin(self, parameter: Tensor, steps: int = 0) -> dict[str, Any]:
        """The state of a tensor, created if there is none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            shards = self.shards_of(parameter)
            moments = {key: {name: make_moment(shard, signed=SIGNED[key]) for name, shard in shards.items()} for key in MOMENTS}
            state |= {"step": steps, **moments}
        return state

    def read_moments(self, owner: Tensor, name: str) -> dict[str, Tensor]:
        """This rank's elements of a parameter's moments, (count,) float32 each; {} before the first update."""
        state = self.state.get(owner) or {}
        held = {key: state[key][name] for key in MOMENTS if state}
        return {key: moment if isinstance(moment, Tensor) else moment.read() for key, moment in held.items()}

    def write_moments(self, owner: Tensor, name: str, moments: Mapping[str, Tensor], *, steps: int) -> None:
        """The reverse of `read_moments`."""
        state = self.begin(owner, steps)
        for key, values in moments.items():
            held = state[key][name]
            held.copy_(values) if isinstance(held, Tensor) else held.write(values)


def update_blocks(weights: Tensor, held: tuple[Quantized, ...], gradients: Tensor, keys: tuple[int, int], **values: Any) -> None:
    """Weights and gradients (count,), with both moments; as many blocks at a time as fit in a chunk."""
    average, square = held
    lead, count, total = square.lead, square.count, len(square.scales)
    size = CHUNK.get(weights.device.type, CHUNK_ELSEWHERE) // BLOCK
    for first in range(0, total, size):
        blocks = slice(first, min(first + size, total))
        begin, end = max(0, first * BLOCK - lead), min(count, (first + size) * BLOCK - lead)
        averages, squares = average.read_blocks(blocks), square.read_blocks(blocks)
        moments = (opened.view(-1).narrow(0, begin + lead - first * BLOCK, end - begin) for opened in (averages, squares))
        adamw(weights[begin:end], *moments, gradients[begin:end].float(), **values)
        average.write_blocks(blocks, averages)
        words = random_words(keys, (square.first + first) * BLOCK, squares.numel(), squares.device)
        square.write_blocks(blocks, squares, words.bitwise_and_(LOW))
