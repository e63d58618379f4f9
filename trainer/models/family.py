"""What the trainer needs of a family of models, as data and functions. A new family is one module, and one row in `registry`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.contract import LINE_FEED, ImageForm, ModelSpec
from trainer.data.processor import Processor as Processor


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The maximum size of an image, 0 = the default of the processor: `max_pixels` of a whole image (Qwen), `max_tiles` for its tiles or
    slices (InternVL, MiniCPM). A saved processor keeps the limit, so that a server processes images as in training."""

    max_pixels: int = 0
    max_tiles: int = 0


UNBOUND = Limit()
# The names in `registry`, for error messages of the families, which cannot import it.
FAMILY_NAMES = (
    "internvl", "llava", "minicpm_o_2_6", "minicpm_v_2_6", "minicpm_v_4_6", "omnilmm", "omnilmm_3b", "qwen2_5_omni", "qwen2_5_vl",
)  # fmt: skip


def nothing_unused(model: torch.nn.Module) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True, kw_only=True)
class Family:
    """`create`: random weights in float32, drawn from torch's current seed. `load`: weights from a local folder in a dtype; with `on_meta`
    without values, on the meta device, which reads only the config of the folder.
    `create_processor`, `load_processor`: with a limit on the size of an image.
    `unused`: names of parameters that are computed in the forward pass but not used, so that they get no gradient. `images`: how the owner's
    own template shows them in a question, for weights that none of our runs saved."""

    name: str
    create: Callable[[ModelSpec], torch.nn.Module]
    load: Callable[..., torch.nn.Module]  # (folder, model, dtype, *, on_meta=False)
    create_processor: Callable[..., Processor]  # (model, limit=UNBOUND)
    load_processor: Callable[..., Processor]  # (folder, model, limit=UNBOUND)
    unused: Callable[[torch.nn.Module], frozenset[str]] = nothing_unused
    images: ImageForm = LINE_FEED


def named_parts(model: torch.nn.Module, parts: tuple[str, ...]) -> frozenset[str]:
    """The names of parameters that contain one of `parts`."""
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in parts))
