"""Spreads one model over several cards by their free memory: the decoder's layers one after the other; the modules that process images and
the embeddings, whose outputs are combined, on the first card."""

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.contract import InputRefused
from trainer.device.device import Device
from trainer.stages.group import assign_groups

WEIGHT_SHARE = 0.85  # of the free memory, for weights; the rest is for caches and activations
PINNED = ("vision", "projector")
UNSPLIT_CLASSES = ("Resampler", "QueryResampler", "Block")  # of our own families, whose models list no such classes
Budgets = dict[int | str, int]  # card, or "cpu" -> bytes; what does not fit goes to "disk"


def measure_free_memory(device: Device, cards: int, first: int = 0) -> Budgets:
    """Bytes that weights may use on each card, from the free memory that the driver reports. Afterwards the first card is active."""
    budgets: Budgets = {}
    for card in range(first, first + cards):
        device.activate(card)
        budgets[card] = int(device.memory()[0] * WEIGHT_SHARE)
    device.activate(first)
    return budgets


def dispatch_over_cards(
    model: nn.Module, groups: Mapping[str, str], budgets: Budgets, *, offload: Path | None = None
) -> dict[str, int | str]:
    """Move the model's modules to their cards, and return the device map. `groups`: ModelSpec.groups. `offload`: a folder for modules that fit
    on no card; without it they are refused. Raises InputRefused with the numbers."""
    from accelerate import dispatch_model

    placed = make_device_map(model, groups, budgets)
    if offload is None and "disk" in placed.values():
        raise InputRefused(describe_shortage(model, budgets))
    first = next(iter(budgets))
    dispatch_model(model, placed, main_device=first, offload_dir=offload, force_hooks=True)
    return placed


def make_device_map(model: nn.Module, groups: Mapping[str, str], budgets: Budgets) -> dict[str, int | str]:
    """Module -> card, for disjoint modules that together are the model. Raises InputRefused if the modules for the first card do not fit
    there."""
    from accelerate import infer_auto_device_map

    pinned = find_first_card_modules(model, groups)
    first = next(iter(budgets))
    held = sum(module_bytes(model.get_submodule(name)) for name in pinned)
    if held > budgets[first]:
        raise InputRefused(
            describe_shortage(model, budgets, f"vision, projector and embeddings, {held:,} bytes, must be on the first card. ")
        )
    room = {**budgets, first: budgets[first] - held}
    rest = copy_without(model, pinned)
    names = sorted({name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()} | set(UNSPLIT_CLASSES))
    found = infer_auto_device_map(rest, max_memory=room, no_split_module_classes=names)
    placed: dict[str, int | str] = dict.fromkeys(pinned, first)
    for name, place in found.items():
        placed |= dict.fromkeys(split_around(model, name, pinned), place)
    return placed


def find_first_card_modules(model: nn.Module, groups: Mapping[str, str]) -> tuple[str, ...]:
    """The outermost modules of the pinned groups, and the text embedding."""
    names = assign_groups(groups, [name for name, _ in model.named_parameters()])
    owned = {name for name, group in names.items() if group in PINNED}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    found: list[str] = []
    for name, module in model.named_modules():
        inside = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if name and not any(name.startswith(f"{outer}.") for outer in found) and inside and (inside <= owned or module is embedding):
            found.append(name)
    return tuple(found)


def copy_without(module: nn.Module, names: tuple[str, ...], path: str = "") -> nn.Module:
    """The same module tree, sharing all tensors, without the modules in `names`."""
    clone = copy.copy(module)
    children = {name: (f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()}
    clone._modules = {name: copy_without(child, names, place) for name, (place, child) in children.items() if place not in names}
    return clone


def split_around(model: nn.Module, name: str, pinned: tuple[str, ...]) -> list[str]:
    """The module itself; if it contains pinned modules, its children that do not."""
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in pinned):
        return [name]
    below = [prefix + child for child, _ in model.get_submodule(name).named_children() if prefix + child not in pinned]
    return [found for child in below for found in split_around(model, child, pinned)]


def module_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe_shortage(model: nn.Module, budgets: Budgets, more: str = "") -> str:
    each = ", ".join(f"{card}: {size:,}" for card, size in budgets.items())
    return (
        f"the model's {module_bytes(model):,} bytes do not fit the cards of this node (bytes for weights by card: {each}). {more}\n    free their "
        "memory, use a node with more cards or a narrower precision, or make the weights smaller with stage=quantize"
    )
