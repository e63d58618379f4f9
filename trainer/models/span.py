"""The token ids that replace an image in a text, computed from the size of the image alone.

Plain arithmetic without pixels and without torch, so that lengths are known before anything is decoded. Each rule follows the image
processor of the family in transformers 5.23 and is compared with it in a test: Grid is `smart_resize` of Qwen2-VL, Tiles is
`get_optimal_tiled_canvas` of GOT-OCR 2 (InternVL), Slices is `get_sliced_grid` and `find_best_resize` of MiniCPM-V.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

Ids = tuple[int, ...]
Size = tuple[int, int]  # width, height in pixels, upright


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Every image becomes `tokens` times `image`, between `before` and `after`."""

    image: int
    tokens: int
    before: Ids = ()
    after: Ids = ()

    def __call__(self, size: Size, index: int) -> Ids:
        return (*self.before, *(self.image,) * self.tokens, *self.after)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One token for each unit x unit pixels of the scaled image. Its area is between the two limits if its aspect ratio permits."""

    before: Ids
    image: int
    after: Ids
    unit: int
    min_pixels: int
    max_pixels: int

    def __call__(self, size: Size, index: int) -> Ids:
        columns, rows = self.cells(size)
        return (*self.before, *(self.image,) * (columns * rows), *self.after)

    def scaled(self, size: Size) -> Size:
        """The size in pixels that the processor scales an image to."""
        columns, rows = self.cells(size)
        return columns * self.unit, rows * self.unit

    def cells(self, size: Size) -> Size:
        """(columns, rows) of tokens."""
        unit, (width, height) = self.unit, size
        scaled = [round(side / unit) * unit for side in size]
        if scaled[0] * scaled[1] > self.max_pixels:
            ratio = math.sqrt(width * height / self.max_pixels)
            scaled = [max(unit, math.floor(side / ratio / unit) * unit) for side in size]
        elif scaled[0] * scaled[1] < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (width * height))
            scaled = [math.ceil(side * ratio / unit) * unit for side in size]
        return scaled[0] // unit, scaled[1] // unit


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Square tiles of `tile` pixels, `least` to `most` of them in the arrangement nearest to the aspect ratio of the image, and a thumbnail
    if there is more than one tile. Each becomes `tokens` times `image`, all together between `before` and `after`."""

    before: Ids
    image: int
    after: Ids
    tokens: int
    tile: int
    least: int
    most: int

    def __call__(self, size: Size, index: int) -> Ids:
        columns, rows = nearest_arrangement(size, self.tile, self.least, self.most) if self.most > 1 else (1, 1)
        count = columns * rows + (columns * rows > 1)
        return (*self.before, *(self.image,) * (self.tokens * count), *self.after)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The token ids before and after a part of an image."""

    before: Ids
    after: Ids


@dataclass(frozen=True, kw_only=True)
class Slices:
    """An overview of the image, and for a large image its slices, row by row with `line` between the rows. One token for each `unit` x `unit`
    pixels, or `tokens` for each part if that is not 0. `number` spells the index of the image in its sample; None if the model does not
    number images."""

    image: int
    overview: Frame
    slice: Frame
    line: Ids
    number: Callable[[int], Ids] | None
    unit: int
    scale: int
    most: int
    tokens: int = 0

    def __call__(self, size: Size, index: int) -> Ids:
        number = self.number(index) if self.number else ()
        return (*number, *self.parts(size))

    def parts(self, size: Size) -> Iterator[int]:
        rows, columns = slice_grid(size, self.scale, self.most)
        yield from self._framed(self.overview, fit(size, self.scale, self.unit, upscale=rows == 0))
        if rows:
            # The image is divided at whole pixels, and each slice is scaled separately.
            cut = (divisible(size[0], columns) / columns, divisible(size[1], rows) / rows)
            part = tuple(self._framed(self.slice, fit(cut, self.scale, self.unit, upscale=True)))
            for row in range(rows):
                yield from self.line if row else ()
                yield from part * columns

    def _framed(self, frame: Frame, size: Size) -> Iterator[int]:
        yield from frame.before
        yield from (self.image,) * (self.tokens or (size[0] // self.unit) * (size[1] // self.unit))
        yield from frame.after


def nearest_arrangement(size: Size, tile: int, least: int, most: int) -> Size:
    """(columns, rows). Of several equally near ones the later is used, if the image fills more than half of it."""
    aspect, area = size[0] / size[1], size[0] * size[1]
    best, nearest = (1, 1), math.inf
    for columns, rows in arrangements(least, most):
        distance = abs(aspect - columns / rows)
        if distance < nearest or (distance == nearest and area > 0.5 * tile * tile * columns * rows):
            best, nearest = (columns, rows), distance
    return best


@lru_cache(maxsize=8)
def arrangements(least: int, most: int) -> tuple[Size, ...]:
    sides = range(1, most + 1)
    found = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(found, key=lambda pair: pair[0] * pair[1]))


def slice_grid(size: Size, scale: int, most: int) -> Size:
    """(rows, columns) of slices; (0, 0) for an image that is small enough without slices."""
    wanted = min(math.ceil(size[0] * size[1] / (scale * scale)), most)
    if wanted <= 1:
        return 0, 0
    aspect = math.log(size[0] / size[1])
    best, nearest = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            distance = abs(aspect - math.log(count // rows / rows))
            if distance < nearest or (distance == nearest and rows > best[0]):
                best, nearest = (rows, count // rows), distance
    return best


def fit(size: tuple[float, float], scale: int, unit: int, *, upscale: bool) -> Size:
    """The size that a part is scaled to: about scale x scale pixels if it is larger or `upscale`, with sides divisible by `unit`."""
    width, height = size
    if width * height > scale * scale or upscale:
        aspect = width / height
        height = int(scale / math.sqrt(aspect))
        width = int(height * aspect)
    return divisible(width, unit), divisible(height, unit)


def divisible(length: float, by: int) -> int:
    return max(round(length / by) * by, by)
