"""Draws a parameter group again: a new projector between a vision tower and a language model that were not trained together.

Each module is initialized as transformers initializes the family (`_init_weights` of the nearest PreTrainedModel above it, children first),
in float32 and from the run's seed only, so that one seed gives the same start in every precision.
"""

import copy

import torch
from transformers import PreTrainedModel

from trainer.contract import InputRefused, TrainSpec
from trainer.stages.group import assign_groups
from trainer.stages.module import find_whole_modules

LOADED = "_is_hf_initialized"  # transformers 5 does not initialize tensors and modules with this attribute


def reset_groups(model: torch.nn.Module, spec: TrainSpec) -> None:
    """Draw the parameters of `spec.stage.reset` again, in place; the process's random state does not change.

    Raises InputRefused for a group that the model lacks, for one that the stage leaves frozen (it would stay noise), and for a parameter
    that transformers cannot initialize.
    """
    wanted = spec.stage.reset
    if not wanted:
        return
    missing = sorted(set(wanted) - set(spec.model.groups))
    frozen = sorted(set(wanted) - set(spec.stage.trainable))
    if missing:
        raise InputRefused(f"stage.reset: the model has no group {', '.join(missing)}; it has {', '.join(spec.model.groups)}.")
    if frozen:
        raise InputRefused(
            f"stage.reset: {', '.join(frozen)} would be drawn again and never trained: add it to stage.trainable, or remove it here."
        )
    groups = assign_groups(spec.model.groups, [name for name, _ in model.named_parameters()])
    modules, bare = find_whole_modules(model, {name for name, group in groups.items() if group in wanted})
    if bare:
        raise InputRefused(f"stage.reset: {', '.join(bare)} are not whole modules and cannot be initialized alone. Remove their group.")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(spec.seed)
        for name in modules:
            reinitialize(model.get_submodule(name), name, find_owner(model, name))


def find_owner(model: torch.nn.Module, name: str) -> PreTrainedModel:
    """The nearest PreTrainedModel above a module, or the module itself."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next(module for module in above if isinstance(module, PreTrainedModel))


def reinitialize(module: torch.nn.Module, name: str, owner: PreTrainedModel) -> None:
    """New values for all parameters of `module`, computed in a float32 copy, where NaN marks parameters that no rule initializes."""
    twin = copy.deepcopy(module).float()
    for part in (*twin.modules(), *twin.parameters()):
        part.__dict__.pop(LOADED, None)
    for parameter in twin.parameters():
        parameter.fill_(torch.nan)
    initialize(twin, owner)
    unruled = [f"{name}.{key}" for key, value in twin.named_parameters() if value.isnan().any()]
    if unruled:
        raise InputRefused(f"stage.reset: transformers has no rule to initialize {', '.join(unruled)}. Remove their group.")
    for parameter, fresh in zip(module.parameters(), twin.parameters(), strict=True):
        parameter.copy_(fresh)


def initialize(module: torch.nn.Module, owner: PreTrainedModel) -> None:
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        initialize(child, owner)
    owner._init_weights(module)
