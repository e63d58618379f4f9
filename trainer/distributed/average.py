"""A moving average of the trained weights (EMA), in float32, of the part that this rank's optimizer updates.

average = d * average + (1 - d) * weight after each update, from the weights that the run begins with. d is `decay`, at the beginning
(1 + step) / (10 + step) if that is less, as in TensorFlow's ExponentialMovingAverage: a short run would otherwise average its start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from trainer.contract import RunFailed
from trainer.optim.optimizer_shard import OptimizerShard, find_shards


class WeightAverage:
    """`values`: name of a trained parameter -> the averages of this rank's elements of it, (count,) float32. The averaged weights are the
    optimizer's own: with 16-bit weights its master weights, which a rounded average would lose."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shards = find_shards(engine)
        self.values = {name: shard.of(shard.owner).to(torch.float32, copy=True) for name, shard in self.shards.items()}

    def update(self, step: int) -> None:
        """After the update of `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, shard in self.shards.items():
            self.values[name].lerp_(shard.of(shard.owner).float(), 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it the model has the averages, rounded to the dtype of its weights. Every rank must enter and leave it."""
        own = self.engine.handle.optimizer is self.engine.handle.basic_optimizer  # the optimizer updates the model's own weights
        kept = {name: shard.parameter.detach().clone() for name, shard in self.shards.items()} if own else {}
        self._write(lambda name, _: self.values[name])
        try:
            yield
        except (
            RunFailed
        ):  # raised on all ranks; another exception may be one rank's alone, and no other rank would take part in a collective
            self._restore(kept)
            raise
        self._restore(kept)

    def _restore(self, kept: dict[str, Tensor]) -> None:
        if kept:
            self._write(lambda name, _: kept[name].view(-1))
        else:
            self.load_masters()

    def load_masters(self) -> None:
        """Give the model the optimizer's weights, as an update of DeepSpeed does. Every rank must call it."""
        if self.engine.handle.optimizer is not self.engine.handle.basic_optimizer:
            self._write(lambda _, shard: shard.of(shard.owner))

    def gather(self) -> dict[str, Tensor]:
        """Whole averages in the dtype of the weights, on the host of rank 0; {} on the other ranks. Every rank must call it."""
        found = {}
        for name, shard in self.shards.items():
            whole = self._whole(shard, self.values[name])
            if self.engine.rank == 0:
                shape = getattr(shard.parameter, "ds_shape", shard.parameter.shape)
                found[name] = whole.to("cpu", shard.parameter.dtype, copy=True).view(shape)
        return found

    @torch.no_grad()
    def _write(self, part_of: Callable[[str, OptimizerShard], Tensor]) -> None:
        partitioned = self.engine.handle.zero_optimization_stage() == 3
        for name, shard in self.shards.items():
            part = part_of(name, shard)
            if partitioned:
                shard.parameter.ds_tensor.detach().view(-1).narrow(0, 0, shard.count).copy_(part)
            else:
                shard.parameter.detach().view(-1).copy_(self._whole(shard, part))
        # ZeRO 3 keeps small parameters whole: they are gathered again, as its own update does (deepspeed 0.19.8, stage3.py, _post_step).
        if partitioned and (lasting := self.engine.handle.optimizer.persistent_parameters):
            lasting[0].partition(lasting)
            lasting[0].all_gather(lasting)

    def _whole(self, shard: OptimizerShard, part: Tensor) -> Tensor:
        """The whole parameter, (numel,) float32. The bits are summed as integers: one rank holds each element, and only zeros are added."""
        if self.engine.world_size == 1 or self.engine.handle.zero_optimization_stage() == 0:
            return part
        bits = torch.zeros(shard.numel, dtype=torch.int32, device=self.engine.device)
        whole = bits.view(torch.float32)
        whole.narrow(0, shard.start, shard.count).copy_(part)
        torch.distributed.all_reduce(bits)
        return whole
