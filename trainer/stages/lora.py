"""LoRA inside the language model (Hu et al., arXiv 2106.09685), by peft.

The targets are given to peft as one regex over module names: a bare list of layer names would also hit the vision tower.
"""

import re
from pathlib import Path

import torch

from trainer.contract import InputRefused, Lora, ModelSpec

ADAPTER = ".lora_"  # in the names of the parameters that peft adds
WRAPPER = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.(?:modules_to_save\.default|original_module)(?=\.)")


def add_lora(model: torch.nn.Module, lora: Lora, spec: ModelSpec, whole: set[str]) -> torch.nn.Module:
    """Wrap the model. `whole`: names of parameters that train besides; their modules are saved with the adapter.

    Raises InputRefused when a target names no linear layer of the language model, or when a bare parameter should train whole.
    """
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, lora.targets, spec.groups["lm"])
    modules = find_modules(model, whole)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rank_stabilised,
        modules_to_save=list(modules) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # which names the folder or hub id that the model came from in the adapter's config


def merge_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with the adapter of `folder` added into its weights, without a trace of peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def find_targets(model: torch.nn.Module, targets: tuple[str, ...], lm: str) -> str:
    """A regex that peft matches against whole module names."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and re.match(lm, f"{name}.weight")]
    names = {name.rpartition(".")[2] for name in linear}
    missing = sorted(set(targets) - names)
    if missing:
        known = ", ".join(sorted(names))
        raise InputRefused(f"stage.lora.targets: the language model has no linear layer {', '.join(missing)}; it has {known}.")
    return rf"(?={lm}).*\.(?:{'|'.join(map(re.escape, targets))})"


def find_modules(model: torch.nn.Module, whole: set[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are in `whole`; together they hold every name in it."""
    found: list[str] = []
    for name, module in model.named_modules():
        names = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()} if name else set()
        if names and names <= whole and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    bare = sorted(name for name in whole if not any(name.startswith(f"{outer}.") for outer in found))
    if bare:
        raise InputRefused(
            f"stage.trainable with LoRA: {', '.join(bare)} are not whole modules and cannot be saved with an adapter. "
            "Leave their group out."
        )
    return tuple(found)


def base_name(name: str) -> str:
    """A parameter's name before peft wrapped the model."""
    return WRAPPER.sub("", name)
