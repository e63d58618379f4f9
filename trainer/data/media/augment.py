"""Random changes of an image, decided by a text alone: the same key gives the same pixels, on every machine and in every order of calls."""

import hashlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from trainer.contract import Augmentation

BEST_JPEG = 100  # InternVL draws the quality from 75 to 100 (internvl_chat/internvl/train/dataset.py, simulate_jpeg_degradation)
COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def augment(image: Image.Image, options: Augmentation, key: str) -> Image.Image:
    """An RGB image of the same size. Every option takes its own numbers, so that one of them does not change what another one draws."""
    crop, left, top, flip, *colours, jpeg = draw_numbers(key, 5 + len(COLOURS))
    if options.crop:
        image = crop_and_scale(image, 1 - (1 - options.crop) * crop, left, top)
    if flip < options.flip:
        image = ImageOps.mirror(image)
    if options.colour:
        for enhance, number in zip(COLOURS, colours, strict=True):
            image = enhance(image).enhance(1 + options.colour * (2 * number - 1))
    if options.jpeg:
        image = degrade(image, options.jpeg + int(jpeg * (BEST_JPEG + 1 - options.jpeg)))
    return image


def draw_numbers(key: str, count: int) -> list[float]:
    """`count` numbers from 0 to below 1: the upper 53 bits of the raw words of Philox, which numpy guarantees (NEP 19)."""
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")).random_raw(count)
    return [int(word >> np.uint64(11)) * 2.0**-53 for word in words]


def crop_and_scale(image: Image.Image, area: float, left: float, top: float) -> Image.Image:
    """A rectangle of the image's own shape with this share of its area, at a place from 0 to 1 of what is free on either side. It is scaled to
    the whole size again: the number of tokens stays as it was counted, and nothing is distorted."""
    side = area**0.5
    width, height = (max(1, round(side * length)) for length in image.size)
    x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))


def degrade(image: Image.Image, quality: int) -> Image.Image:
    """What a JPEG of this quality keeps."""
    stream = BytesIO()
    image.save(stream, format="JPEG", quality=quality)
    stream.seek(0)
    with Image.open(stream, formats=("JPEG",)) as read:
        return read.convert("RGB")
