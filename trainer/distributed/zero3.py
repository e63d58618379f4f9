"""How a model comes to the ranks under ZeRO 3: from rank 0 alone, one parameter at a time, each cut into the ranks' parts as it arrives.

deepspeed.initialize (0.19.8) wants the whole model on every rank's host, and moves all of it to the device before it cuts it. Given a
model that is cut already (`is_zero_init_model` in its engine.py) it moves nothing, and casts nothing either.
"""

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList

from trainer.checkpoint.resume import refuse_on_all_ranks, broadcast_object
from trainer.checkpoint.state import read_rng_state, set_rng_state
from trainer.contract import InputRefused, TrainSpec
from trainer.device.dtype import loading_dtype

SOURCE_RANK = 0  # the rank whose values all take: zero.Init's own broadcast begins there
Holder = tuple[Module, str]  # a module, and its own name for a parameter or buffer


def partition_model(model: Module, spec: TrainSpec, device: torch.device) -> None:
    """Cut the parameters among the ranks, in place and for deepspeed.initialize to take, with the values, buffers and random numbers of
    rank 0. The other ranks' model may be without values, on the meta device. Every rank must call it.

    `device`, the device, holds a rank's parts and one whole parameter; rank 0's host lets go of each as it leaves. Parameters become new
    objects of the dtype that DeepSpeed would give them. Raises InputRefused where a rank has another model than rank 0.
    """
    with refuse_on_all_ranks():
        refuse_another_model(list_tensors(model))
    for holders in group_by_tensor(model, "_buffers"):
        broadcast_buffer(holders, device)
    dtype, cut = loading_dtype(spec.precision), None
    for holders in group_by_tensor(model, "_parameters"):
        whole = load_parameter(holders, device, dtype)
        cut = partition_parameter(whole, spec, like=cut)
    broadcast_rng_state(device)


def group_by_tensor(model: Module, kind: str) -> Iterator[list[Holder]]:
    """All modules that hold a tensor, for each tensor in the order of DeepSpeed's numbers, which is that of model.parameters(). It keeps
    none of them: what its holders let go of is gone."""
    found: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module, name))
    yield from found.values()


def list_tensors(model: Module) -> list[tuple[str, ...]]:
    """What must be the same on every rank for the tensors to meet."""
    parameters = [(name, str(tuple(p.shape)), f"trains: {p.requires_grad}") for name, p in model.named_parameters()]
    return parameters + [(name, str(tuple(buffer.shape)), str(buffer.dtype)) for name, buffer in model.named_buffers()]


def refuse_another_model(own: list[tuple[str, ...]]) -> None:
    expected = broadcast_object(own)
    if own == expected:
        return
    lacking, more = ([" ".join(line) for line in one if line not in other] for one, other in ((expected, own), (own, expected)))
    raise InputRefused(
        f"rank {torch.distributed.get_rank()} has another model than rank 0: it lacks {', '.join(lacking[:3]) or 'nothing'} and has "
        f"{', '.join(more[:3]) or 'nothing'} besides. Its config.json must be that of the first node: let the nodes share the folder."
    )


def broadcast_buffer(holders: list[Holder], device: torch.device) -> None:
    module, name = holders[0]
    before: Tensor = getattr(module, name)
    value = before.to(device).contiguous() if is_source() else torch.empty(before.shape, dtype=before.dtype, device=device)
    if value.numel():
        torch.distributed.broadcast(value.view(-1).view(torch.uint8), SOURCE_RANK)  # as bytes: not every backend sends every type
    for module, name in holders:
        setattr(module, name, value)


def load_parameter(holders: list[Holder], device: torch.device, dtype: torch.dtype) -> Parameter:
    """Whole on `device`: the values on rank 0, memory for them on the others. A new object, since `.data` does not go from one kind of
    device to every other; a tied parameter is one again."""
    module, name = holders[0]
    before: Parameter = getattr(module, name)
    value = before.detach().to(device, dtype) if is_source() else torch.empty(before.shape, dtype=dtype, device=device)
    whole = Parameter(value, requires_grad=before.requires_grad)
    for module, name in holders:
        setattr(module, name, whole)
    return whole


def partition_parameter(whole: Parameter, spec: TrainSpec, *, like: Parameter | None) -> Parameter:
    """Send the values of rank 0 to all, who keep their part. `like`: one that was cut before, which saves a setup for each."""
    import deepspeed

    if like is None:
        deepspeed.zero.Init(module=ParameterList([whole]), config_dict_or_path=dict(spec.deepspeed))
    else:
        like.convert_to_zero_parameters(param_list=[whole])  # type: ignore[attr-defined]
    return whole


def broadcast_rng_state(device: torch.device) -> None:
    """A model without values draws none."""
    states = broadcast_object(read_rng_state(device) if is_source() else None)
    if not is_source():
        set_rng_state(states, device)


def is_source() -> bool:
    return torch.distributed.get_rank() == SOURCE_RANK
