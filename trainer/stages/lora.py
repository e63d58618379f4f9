"""LoRA inside the language model (Hu et al., arXiv 2106.09685), by peft.

The targets are given to peft as one regex over module names: a list of layer names would also match the vision tower. With `base: nf4` the
linear layers of `base_groups` are quantized first, and the adapters are trained on top of them.
"""

import re
from typing import TYPE_CHECKING

import torch

from trainer.contract import InputRefused, Lora, ModelSpec
from trainer.stages.adapter import make_config
from trainer.stages.adapter_layout import AdapterLayout
from trainer.stages.module import drop_input_gradients, find_whole_modules
from trainer.stages.nf4_linears import quantize_linears
from trainer.stages.token_row import find_token_rows, train_rows

if TYPE_CHECKING:
    from peft import LoraConfig

REGEX = "re:"  # prefix of a target that is a regex
ADAPTER = ".lora_"  # part of the names of parameters that peft adds


def add_lora(
    model: torch.nn.Module, lora: Lora, spec: ModelSpec, whole: set[str], continued: AdapterLayout | None = None
) -> torch.nn.Module:
    """Wrap the model. `whole`: names of parameters that are also trained, whole; their modules are saved with the adapter. `continued`: the adapter
    that the stage continues with, which decides what is wrapped.

    Raises InputRefused if a target matches no linear layer of the language model, or if a bare parameter should be trained whole.
    """
    from peft import get_peft_model

    targets = "" if continued and not covers(model, lora, spec, continued) else find_targets(model, lora.targets, spec.groups["lm"])
    if lora.base:
        quantize_linears(model, frozen_groups(lora, spec, whole))
    modules = find_modules(model, whole)
    if targets:
        config = config_of(lora, targets, modules)
    else:
        assert continued is not None
        config = make_config(continued, model)
        config.lora_dropout, config.modules_to_save = lora.dropout, list(modules) or None
    config.trainable_token_indices = token_rows_of(model, modules, continued) or None
    wrapped = get_peft_model(model, config)  # stores the folder or hub id of the model in the adapter's config
    train_rows(wrapped)
    drop_input_gradients(model)
    return wrapped


def token_rows_of(model: torch.nn.Module, whole: tuple[str, ...], continued: AdapterLayout | None) -> dict[str, list[int]]:
    """Module -> the rows that are trained: of the tokens that the model adds, and those that the adapter has. A module in `whole` trains all of its
    rows."""
    rows = find_token_rows(model)
    for name, of_adapter in continued.rows.items() if continued else ():
        own = rows.setdefault(name.rpartition(".")[0], [])
        own += [row for row in of_adapter.ids if row not in own]
    return {name: ids for name, ids in rows.items() if not any(f"{name}.".startswith(f"{outer}.") for outer in whole)}


def config_of(lora: Lora, targets: str, modules: tuple[str, ...]) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rank_stabilised,
        modules_to_save=list(modules) or None,
        task_type="CAUSAL_LM",
    )


def frozen_groups(lora: Lora, spec: ModelSpec, whole: set[str]) -> list[str]:
    """The regexes of `lora.base_groups`. Raises InputRefused for a group that is trained: 4-bit weights have no gradient."""
    regexes = {group: spec.groups[group] for group in lora.base_groups}
    trained = [group for group, regex in regexes.items() if any(re.match(regex, name) for name in whole)]
    if trained:
        raise InputRefused(
            f"stage.lora.base_groups: {', '.join(trained)} is trained whole, which is not possible in {lora.base}. Remove it there or from "
            "stage.trainable."
        )
    return list(regexes.values())


def covers(model: torch.nn.Module, lora: Lora, spec: ModelSpec, layout: AdapterLayout) -> bool:
    """Whether the settings of the stage describe the adapter: plain LoRA of exactly their targets, of one rank and alpha, as our runs save it."""
    plain = all(
        (one.rank, one.alpha, set(one.tensors)) == (lora.r, lora.alpha, {"A", "B"}) and not one.table for one in layout.factors.values()
    )
    try:
        pattern = re.compile(find_targets(model, lora.targets, spec.groups["lm"]))
    except InputRefused:
        return False
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and pattern.fullmatch(name)}
    return plain and linear == layout.factors.keys()


def find_targets(model: torch.nn.Module, targets: tuple[str, ...], lm: str) -> str:
    """A regex that peft matches against full module names. A target that matches nothing is refused: it would have no effect."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and re.match(lm, f"{name}.weight")]
    patterns = {target: compile_target(target) for target in targets}
    missing = [target for target, pattern in patterns.items() if not any(pattern.fullmatch(name) for name in linear)]
    if missing or not targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        what = f"the language model has no linear layer {', '.join(missing)}" if missing else "names no layer of the language model"
        example = f"a regex is matched against full names, as {linear[0]}" if linear else "it has no linear layer at all"
        raise InputRefused(f"stage.lora.targets: {what}; it has {known} ({example}).")
    if not any(target.startswith(REGEX) for target in targets):
        return rf"(?={lm}).*\.(?:{'|'.join(map(re.escape, targets))})"
    chosen = (name for name in linear if any(pattern.fullmatch(name) for pattern in patterns.values()))
    return "|".join(map(re.escape, chosen))  # listed one by one: a user's regex may match layers that an adapter cannot wrap


def compile_target(target: str) -> re.Pattern[str]:
    """A layer's own name, or with `re:` a regex over full module names. Raises InputRefused for an invalid regex."""
    try:
        return re.compile(target.removeprefix(REGEX) if target.startswith(REGEX) else rf".*\.{re.escape(target)}")
    except re.error as error:
        raise InputRefused(f"stage.lora.targets: {target!r} is not a regular expression: {error}.") from error


def find_modules(model: torch.nn.Module, whole: set[str]) -> tuple[str, ...]:
    """The outermost modules whose parameters are all in `whole`; together they hold every name in it."""
    found, bare = find_whole_modules(model, whole)
    if bare:
        raise InputRefused(
            f"stage.trainable with LoRA: {', '.join(bare)} are not whole modules and cannot be saved with an adapter. "
            "Remove their group from stage.trainable."
        )
    return found
