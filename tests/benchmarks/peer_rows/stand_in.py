"""Make torchvision importable beside the CPU build of torch, which has no torchvision of its own: declare its operators, which nothing here calls;
and stand in for modules that a peer imports at its top and does not use for rows of text and images."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import torch

OPERATORS = (
    "_deform_conv2d_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward", "_roi_align_backward", "_roi_pool_backward",
    "deform_conv2d", "nms", "ps_roi_align", "ps_roi_pool", "qnms", "qroi_align", "roi_align", "roi_pool",
)  # fmt: skip
_KEPT: list[torch.library.Library] = []


def declare_operators() -> None:
    """To be called before the first import of torchvision."""
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    _KEPT.append(library)


def add_modules(*names: str) -> None:
    """Modules in which every public name exists and does nothing."""
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        module.__getattr__ = anything
        sys.modules[name] = module


def anything(name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
