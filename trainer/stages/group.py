"""A stage as a table of parameter groups: which of them are trained, and how many parameters they have."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from trainer.contract import InputRefused, TrainSpec
from trainer.contract.listing import list_some
from trainer.stages.adapter_layout import AdapterLayout, base_name
from trainer.stages.lora import ADAPTER, add_lora
from trainer.stages.rate import find_rates
from trainer.stages.token_row import TOKEN_ROWS

Names = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Numbers of parameters. `unused`: in a trainable group, but without an effect on the output; they stay frozen."""

    name: str
    parameters: int
    trainable: int
    unused: int = 0


@dataclass(frozen=True, kw_only=True)
class Staged:
    """`model`: wrapped by peft if the stage has LoRA. `groups`: those of model.groups, and `lora`. `rates`: trained parameter of `model` ->
    its learning rate over that of the schedule, for groups in optimizer.group_lr; 1 for all others."""

    model: torch.nn.Module
    groups: tuple[Group, ...]
    rates: Mapping[str, float] = field(default_factory=dict)


def apply_stage(model: torch.nn.Module, spec: TrainSpec, unused: frozenset[str], continued: AdapterLayout | None = None) -> Staged:
    """Mark what this stage trains, with `requires_grad` of the parameters: that of a module has no effect.

    `unused`: Family.unused. `continued`: the adapter that a LoRA stage continues with. Raises InputRefused if the groups do not divide the
    parameters into disjoint parts, and for a stage that trains nothing.
    """
    names = assign_groups(spec.model.groups, [name for name, _ in model.named_parameters()])
    missing = sorted(set(spec.stage.trainable) - set(spec.model.groups))
    if missing:
        raise InputRefused(f"stage.trainable: the model has no group {', '.join(missing)}; it has {', '.join(spec.model.groups)}.")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    wanted = {name for name, group in names.items() if group in spec.stage.trainable}
    if spec.stage.lora is not None:
        model = add_lora(model, spec.stage.lora, spec.model, wanted - unused, continued)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, wanted - unused, lora=spec.stage.lora is not None))
    groups = tuple(
        Group(
            name=group,
            parameters=count(sizes, (n for n, g in names.items() if g == group)),
            trainable=count(sizes, (n for n, g in names.items() if g == group and n in wanted - unused)),
            unused=count(sizes, (n for n, g in names.items() if g == group and n in wanted & unused)),
        )
        for group in spec.model.groups
    )
    if spec.stage.lora is not None:
        adapters = sum(p.numel() for name, p in model.named_parameters() if ADAPTER in name or TOKEN_ROWS in name)
        groups = (*groups, Group(name="lora", parameters=adapters, trainable=adapters))
    if spec.stage.kind == "train" and not any(group.trainable for group in groups):
        raise InputRefused(f"stage {spec.stage.name} trains no parameter. Set stage.trainable to some of {', '.join(spec.model.groups)}.")
    return Staged(model=model, groups=groups, rates=find_rates(model, spec, names))


def is_trained(name: str, wanted: set[str], *, lora: bool) -> bool:
    """Under peft a module that is trained whole is a copy beside the frozen original: only the copy is trained."""
    if not lora:
        return name in wanted
    return ADAPTER in name or TOKEN_ROWS in name or (base_name(name) in wanted and ".original_module." not in name)


def count(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)


def assign_groups(groups: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Parameter name -> group. A regex matches from the beginning of a name.

    Raises InputRefused, naming all of them, for parameters in no group or in two, and for a regex that matches nothing. A head that is tied
    to the embeddings has no parameter of its own, so only `head` may be empty.
    """
    names = list(names)
    patterns = {group: re.compile(regex) for group, regex in groups.items()}
    found = {name: [group for group, pattern in patterns.items() if pattern.match(name)] for name in names}
    problems = [f"{name} is in no group" for name, where in found.items() if not where]
    problems += [f"{name} is in {' and '.join(where)}" for name, where in found.items() if len(where) > 1]
    empty = set(groups) - {group for where in found.values() for group in where} - {"head"}
    problems += [f"{group}: {groups[group]!r} matches no parameter" for group in sorted(empty)]
    if problems:
        raise InputRefused(f"model.groups must put every parameter into one group: {list_some(problems, 10, '; ')}.")
    return {name: where[0] for name, where in found.items()}


def trainable_table(groups: Iterable[Group], write: Callable[[str], None]) -> None:
    write(f"{'group':<12}{'parameters':>16}{'trainable':>16}")
    for group in groups:
        note = f"  {group.unused:,} do not affect the output and stay frozen" if group.unused else ""
        write(f"{group.name:<12}{group.parameters:>16,}{group.trainable:>16,}{note}")
