"""Partitions a model among the ranks under ZeRO 3: rank 0 sends one parameter at a time, and each rank keeps its part of it.

deepspeed.initialize (0.19.8) needs the whole model on every rank's host, and moves all of it to the device before it partitions it. A
model that is already partitioned (`is_zero_init_model` in its engine.py) it neither moves nor casts.
"""

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList

from trainer.contract import InputRefused, TrainSpec
from trainer.device.dtype import loading_dtype
from trainer.device.rng import read_rng_state, set_rng_state
from trainer.distributed.collective import broadcast_object, refuse_on_all_ranks

SOURCE_RANK = 0  # the rank that has the values: zero.Init's own broadcast starts there
Holder = tuple[Module, str]  # a module, and its own name for a parameter or buffer


def partition_model(model: Module, spec: TrainSpec, device: torch.device) -> None:
    """Partition the parameters in place, in the form that deepspeed.initialize accepts, with the values, buffers and random numbers of rank
    0. On other ranks the model may be on the meta device. Every rank must call it.

    `device` holds a rank's parts and one whole parameter; rank 0's host frees each parameter as it is sent. Parameters become new objects
    of the dtype that DeepSpeed would give them. Raises InputRefused if a rank has another model than rank 0.
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
    """All modules that hold a tensor, for each tensor in the order of model.parameters(), which is that of DeepSpeed's numbers. Keeps no
    reference to a tensor: once its holders drop it, its memory is free."""
    found: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module, name))
    yield from found.values()


def list_tensors(model: Module) -> list[tuple[str, ...]]:
    """What must be equal on every rank."""
    parameters = [(name, str(tuple(p.shape)), f"trains: {p.requires_grad}") for name, p in model.named_parameters()]
    return parameters + [(name, str(tuple(buffer.shape)), str(buffer.dtype)) for name, buffer in model.named_buffers()]


def refuse_another_model(own: list[tuple[str, ...]]) -> None:
    expected = broadcast_object(own)
    if own == expected:
        return
    lacking, more = ([" ".join(line) for line in one if line not in other] for one, other in ((expected, own), (own, expected)))
    raise InputRefused(
        f"rank {torch.distributed.get_rank()} has another model than rank 0: it lacks {', '.join(lacking[:3]) or 'nothing'} and has "
        f"{', '.join(more[:3]) or 'nothing'} in addition. Its config.json must be that of the first node: let the nodes share the folder."
    )


def broadcast_buffer(holders: list[Holder], device: torch.device) -> None:
    module, name = holders[0]
    before: Tensor = getattr(module, name)
    value = before.to(device).contiguous() if is_source() else torch.empty(before.shape, dtype=before.dtype, device=device)
    if value.numel():
        torch.distributed.broadcast(value.view(-1).view(torch.uint8), SOURCE_RANK)  # as bytes: not every backend sends every dtype
    for module, name in holders:
        setattr(module, name, value)


def load_parameter(holders: list[Holder], device: torch.device, dtype: torch.dtype) -> Parameter:
    """The whole parameter on `device`: with values on rank 0, uninitialized on the others. It is a new object, since `.data` cannot move
    between all kinds of devices; a tied parameter stays tied."""
    module, name = holders[0]
    before: Parameter = getattr(module, name)
    value = before.detach().to(device, dtype) if is_source() else torch.empty(before.shape, dtype=dtype, device=device)
    whole = Parameter(value, requires_grad=before.requires_grad)
    for module, name in holders:
        setattr(module, name, whole)
    return whole


def partition_parameter(whole: Parameter, spec: TrainSpec, *, like: Parameter | None) -> Parameter:
    """Send rank 0's values to all ranks, which keep their part. `like`: a parameter that is already partitioned, to reuse its setup."""
    import deepspeed

    if like is None:
        deepspeed.zero.Init(module=ParameterList([whole]), config_dict_or_path=dict(spec.deepspeed))
    else:
        like.convert_to_zero_parameters(param_list=[whole])  # type: ignore[attr-defined]
    return whole


def broadcast_rng_state(device: torch.device) -> None:
    """Ranks whose model has no values have drawn no random numbers."""
    states = broadcast_object(read_rng_state(device) if is_source() else None)
    if not is_source():
        set_rng_state(states, device)


def is_source() -> bool:
    return torch.distributed.get_rank() == SOURCE_RANK
