"""One model over several cards, by the memory that each has free: the decoder's layers one after the other, what sees the images and the
embeddings, whose results meet, on the first."""

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.contract import InputRefused
from trainer.device.device import Device
from trainer.stages.group import assign_groups

WEIGHT_SHARE = 0.85  # of what is free, for weights; the rest is for the answers' caches and activations
PINNED = ("vision", "projector")
UNSPLIT_CLASSES = ("Resampler", "QueryResampler", "Block")  # of families of our own, which name no such classes; they use their own parameters
Budgets = dict[int | str, int]  # card, or "cpu" -> bytes; what does not fit goes to "disk"


def measure_free_memory(device: Device, cards: int, first: int = 0) -> Budgets:
    """Bytes that weights may take of each card, by what its driver says is free now. The first one is at work afterwards."""
    budgets: Budgets = {}
    for card in range(first, first + cards):
        device.activate(card)
        budgets[card] = int(device.memory()[0] * WEIGHT_SHARE)
    device.activate(first)
    return budgets


def dispatch_over_cards(model: nn.Module, groups: Mapping[str, str], budgets: Budgets, *, offload: Path | None = None) -> dict[str, int | str]:
    """Put the model's modules where they are to be, and return the map. `groups`: ModelSpec.groups. `offload`: a folder for what fits
    nowhere else; without one that is refused. Raises InputRefused with the numbers."""
    from accelerate import dispatch_model

    placed = make_device_map(model, groups, budgets)
    if offload is None and "disk" in placed.values():
        raise InputRefused(describe_shortage(model, budgets))
    first = next(iter(budgets))
    dispatch_model(model, placed, main_device=first, offload_dir=offload, force_hooks=True)
    return placed


def make_device_map(model: nn.Module, groups: Mapping[str, str], budgets: Budgets) -> dict[str, int | str]:
    """Module -> card, for modules that together are the model and of which none lies within another. Raises InputRefused where the parts
    that belong on the first card do not fit there."""
    from accelerate import infer_auto_device_map

    pinned = find_first_card_modules(model, groups)
    first = next(iter(budgets))
    held = sum(module_bytes(model.get_submodule(name)) for name in pinned)
    if held > budgets[first]:
        raise InputRefused(describe_shortage(model, budgets, f"what sees the images and the embeddings, {held:,} bytes, belong on the first. "))
    room = {**budgets, first: budgets[first] - held}
    rest = copy_without(model, pinned)
    names = sorted({name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()} | set(UNSPLIT_CLASSES))
    found = infer_auto_device_map(rest, max_memory=room, no_split_module_classes=names)
    placed: dict[str, int | str] = dict.fromkeys(pinned, first)
    for name, place in found.items():
        placed |= dict.fromkeys(split_around(model, name, pinned), place)
    return placed


def find_first_card_modules(model: nn.Module, groups: Mapping[str, str]) -> tuple[str, ...]:
    """The outermost modules of the pinned groups, and the one that embeds text."""
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
    """The same tree, sharing all its tensors, but for the modules in `names`."""
    clone = copy.copy(module)
    children = {name: (f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()}
    clone._modules = {name: copy_without(child, names, place) for name, (place, child) in children.items() if place not in names}
    return clone


def split_around(model: nn.Module, name: str, pinned: tuple[str, ...]) -> list[str]:
    """The module itself, or of one that holds pinned ones its children, which do not."""
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in pinned):
        return [name]
    below = [prefix + child for child, _ in model.get_submodule(name).named_children() if prefix + child not in pinned]
    return [found for child in below for found in split_around(model, child, pinned)]


def module_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe_shortage(model: nn.Module, budgets: Budgets, more: str = "") -> str:
    said = ", ".join(f"{place}: {size:,}" for place, size in budgets.items())
    return (
        f"the model's {module_bytes(model):,} bytes do not fit the cards of this node (bytes for weights by card: {said}). {more}\n    free their "
        "memory, take a node with more cards, or a narrower precision; stage=quantize makes the weights smaller"
    )
