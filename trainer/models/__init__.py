"""The families that the trainer has."""

from trainer.contract import InputRefused
from trainer.models.family import Family
from trainer.models.llava import LLAVA

FAMILIES = {"llava": LLAVA}


def find_family(name: str) -> Family:
    """Raises InputRefused listing the families that there are."""
    if name not in FAMILIES:
        raise InputRefused(f"model.family: the trainer has no module for {name!r}; it has {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]
