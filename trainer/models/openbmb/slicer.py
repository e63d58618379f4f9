"""The image processor of MiniCPM-V 2.6: an overview and slices of a large image, each of about scale x scale pixels at its own aspect ratio.

The rule is that of the published image processor (MiniCPM-V, arXiv 2408.01800, section 3.2), and compared with it in a test. The arithmetic is
shared with trainer.models.span, which counts the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.models.span import divisible, fit, slice_grid


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """`saved`: preprocessor_config.json with all its keys. Defaults are those of the published class."""

    saved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> int:
        return int(self.saved.get("scale_resolution", 448))

    @property
    def patch(self) -> int:
        return int(self.saved.get("patch_size", 14))

    @property
    def most(self) -> int:
        """Slices per image."""
        return int(self.saved.get("max_slice_nums", 9)) if self.saved.get("slice_mode", True) else 1

    @property
    def tokens(self) -> int:
        """Tokens per part."""
        return int(self.saved.get("image_feature_size", 64))

    @property
    def numbered(self) -> bool:
        return bool(self.saved.get("use_image_id", False))

    def features(self, image: Image.Image) -> dict[str, Tensor]:
        """pixel_values (1, 3, patch, patches x patch) float32 and target_sizes (parts, 2) int64, rows and columns of patches."""
        parts = self.cut(image)
        pixels = torch.cat([lay_out(normalise(part, self.saved), self.patch) for part in parts], dim=-1)
        sizes = [[part.height // self.patch, part.width // self.patch] for part in parts]
        return {"pixel_values": pixels.unsqueeze(0), "target_sizes": torch.tensor(sizes)}

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The overview, then the slices row by row."""
        rows, columns = slice_grid(image.size, self.scale, self.most)
        overview = image.resize(fit(image.size, self.scale, self.patch, upscale=rows == 0), resample=Image.Resampling.BICUBIC)
        if not rows:
            return [overview]
        nominal = (divisible(image.width, columns) / columns, divisible(image.height, rows) / rows)
        width, height = fit(nominal, self.scale, self.patch, upscale=True)
        large = image.resize((width * columns, height * rows), resample=Image.Resampling.BICUBIC)
        corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
        return [overview, *(large.crop((left, top, left + width, top + height)) for left, top in corners)]


def normalise(image: Image.Image, saved: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(height, width, 3) float32."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mean, std = (np.asarray(saved.get(key, (0.5, 0.5, 0.5)), dtype=np.float32) for key in ("norm_mean", "norm_std"))
    return (pixels - mean) / std  # type: ignore[no-any-return]


def lay_out(pixels: np.ndarray[Any, np.dtype[np.float32]], patch: int) -> Tensor:
    """(height, width, 3) -> (3, patch, patches x patch): the patches, row by row, side by side."""
    height, width, channels = pixels.shape
    cells = pixels.reshape(height // patch, patch, width // patch, patch, channels)
    return torch.from_numpy(np.ascontiguousarray(cells.transpose(4, 1, 0, 2, 3)).reshape(channels, patch, -1))
