"""Gradient checkpointing of some or all layers: their activations are freed after the forward pass and recomputed in the backward pass
(Chen et al., arXiv 1604.06174)."""

import re

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.contract import InputRefused, TrainSpec
from trainer.stages.module import drop_input_gradients


def checkpoint_layers(model: torch.nn.Module, spec: TrainSpec) -> tuple[str, ...]:
    """Enable gradient checkpointing in every `checkpoint_every`th layer of each of `checkpoint_groups`; no groups = all that have layers.
    Returns the names of those layers. Raises InputRefused for a group without layers."""
    groups = {name: group for name, module in model.named_modules() if (group := find_group(name, module, spec)) is not None}
    wanted = spec.checkpoint_groups or tuple(dict.fromkeys(groups.values()))
    if missing := [group for group in wanted if group not in groups.values()]:
        raise InputRefused(
            f"strategy.checkpoint_groups: {', '.join(missing)} has no layers for gradient checkpointing; "
            f"{' and '.join(dict.fromkeys(groups.values()))} have."
        )
    # Reentrant checkpointing drops the gradients of layers whose inputs are frozen.
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    drop_input_gradients(model)
    chosen = {
        name
        for group in wanted
        for place, name in enumerate(name for name, own in groups.items() if own == group)
        if place % spec.checkpoint_every == 0
    }
    for name in groups:
        model.get_submodule(name).gradient_checkpointing = name in chosen
    return tuple(name for name in groups if name in chosen)


def find_group(name: str, module: torch.nn.Module, spec: TrainSpec) -> str | None:
    """The group of model.groups that a layer's parameters are in; None if the module is not a layer."""
    if not isinstance(module, GradientCheckpointingLayer):
        return None
    parameter = next((f"{name}.{own}" for own, _ in module.named_parameters()), name)
    return next((group for group, regex in spec.model.groups.items() if re.match(regex, parameter)), None)
