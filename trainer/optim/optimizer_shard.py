"""Where each trained parameter is stored in the tensors that this rank's optimizer updates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OptimizerShard:
    """What this rank's optimizer holds of one parameter: `count` elements, from index `start` of the flattened parameter and from `offset`
    of `owner`, the flat tensor that the optimizer updates and by which it keeps its states. `count` 0: nothing."""

    parameter: torch.nn.Parameter
    numel: int
    owner: Tensor
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """This shard in the owner, or in one of its states."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)


def find_shards(engine: Any) -> dict[str, OptimizerShard]:
    """For each trained parameter, in the order of the model. `engine`: a trainer.distributed.engine.Engine, which calls this itself."""
    handle = engine.handle
    if handle.optimizer is handle.basic_optimizer:
        trained = (p for p in engine.model.parameters() if p.requires_grad)
        shards = [OptimizerShard(parameter=p, numel=p.numel(), owner=p, offset=0, start=0, count=p.numel()) for p in trained]
    elif handle.zero_optimization_stage() == 3:
        shards = list(zero3_shards(handle.optimizer, engine.rank))
    else:
        shards = list(flat_shards(handle.optimizer))
    by_parameter = {id(shard.parameter): shard for shard in shards}
    return {name: by_parameter[id(p)] for name, p in engine.model.named_parameters() if p.requires_grad}


def flat_shards(optimizer: Any) -> Iterator[OptimizerShard]:
    """ZeRO 1 and 2, and DeepSpeed's BF16_Optimizer: a flat group is split into equal partitions; a parameter may be in several."""
    bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if bf16 else optimizer.bit16_groups
    owners = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    for parameters, owner in zip(groups, owners, strict=True):
        for p in parameters:
            held = p._hp_mapping
            offset = held.hp_fragment_address.start if held else 0
            start, count = (held.lp_fragment_address.start, held.lp_fragment_address.numel) if held else (0, 0)
            yield OptimizerShard(parameter=p, numel=p.numel(), owner=owner, offset=offset, start=start, count=count)


def zero3_shards(optimizer: Any, rank: int) -> Iterator[OptimizerShard]:
    """ZeRO 3: every parameter is split into equal parts, the last one padded."""
    for group in optimizer.fp16_groups:
        for p in group:
            index, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = min(rank * size, p.ds_numel)
            count = min(size, p.ds_numel - start)
            owner = optimizer.fp32_partitioned_groups_flat[index]
            yield OptimizerShard(parameter=p, numel=p.ds_numel, owner=owner, offset=offset, start=start, count=count)
