"""Each option alone, on an image whose pixels say where they are from."""

import numpy as np
import pytest
from PIL import Image

from trainer.contract import Augmentation
from trainer.data.media.augment import augment, draw_numbers

KEYS = [f"1:image:{step}:0:0" for step in range(200)]


@pytest.fixture(scope="module")
def gradient() -> Image.Image:
    """64x48: red grows to the right, green downwards; blue is noise, which a JPEG changes."""
    red = np.tile(np.linspace(0, 252, 64), (48, 1))
    green = np.tile(np.linspace(0, 188, 48)[:, None], (1, 64))
    blue = np.random.default_rng(0).integers(0, 255, (48, 64))
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


ALL = Augmentation(crop=0.5, flip=0.5, colour=0.4, jpeg=75)


def test_the_key_alone_decides(gradient: Image.Image) -> None:
    first = [augment(gradient, ALL, key).tobytes() for key in KEYS[:20]]
    assert [augment(gradient, ALL, key).tobytes() for key in reversed(KEYS[:20])] == first[::-1]
    assert len(set(first)) == 20
    assert {augment(gradient, ALL, key).size for key in KEYS[:20]} == {gradient.size}
    assert augment(gradient, Augmentation(), KEYS[0]).tobytes() == gradient.tobytes()


def test_the_numbers_are_those_of_a_fixed_stream() -> None:
    """A key gives the same numbers in every version: a record is repeated by it."""
    assert draw_numbers("1:image:0:0:0", 3) == [0.1958770976091866, 0.6575074967167618, 0.7562143054902049]
    many = [number for key in KEYS for number in draw_numbers(key, 8)]
    assert min(many) >= 0 and max(many) < 1 and np.mean(many) == pytest.approx(0.5, abs=0.02)


def test_flip_mirrors_with_its_probability(gradient: Image.Image) -> None:
    mirrored = pixels(gradient)[:, ::-1]
    found = [pixels(augment(gradient, Augmentation(flip=0.3), key)) for key in KEYS]
    flipped = [bool((one == mirrored).all()) for one in found]
    assert all(flip or (one == pixels(gradient)).all() for flip, one in zip(flipped, found, strict=True))
    assert 0.2 < np.mean(flipped) < 0.4
    assert all((pixels(augment(gradient, Augmentation(flip=1.0), key)) == mirrored).all() for key in KEYS[:5])


def test_crop_keeps_at_least_its_share_and_the_shape(gradient: Image.Image) -> None:
    """The red that is left spans the side that is kept; both sides shrink alike."""
    sides = []
    for key in KEYS:
        found = pixels(augment(gradient, Augmentation(crop=0.25), key))
        wide, high = (np.ptp(found[..., 0]) / 252, np.ptp(found[..., 1]) / 188)
        assert wide == pytest.approx(high, abs=0.06)
        sides.append(wide)
    assert 0.45 < min(sides) < 0.6 and max(sides) > 0.95


def test_colour_keeps_within_its_factor() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation leave one grey as it is
    found = [int(pixels(augment(grey, Augmentation(colour=0.4), key))[0, 0, 0]) for key in KEYS]
    assert 59 <= min(found) < 70 and 130 < max(found) <= 141


def test_jpeg_is_that_of_a_drawn_quality(gradient: Image.Image) -> None:
    found = {augment(gradient, Augmentation(jpeg=75), key).tobytes() for key in KEYS}
    assert len(found) == 26, "every quality from 75 to 100"

    def distance(quality: int) -> float:
        changed = (pixels(augment(gradient, Augmentation(jpeg=quality), key)) - pixels(gradient) for key in KEYS[:20])
        return float(np.mean([np.abs(one).mean() for one in changed]))

    assert distance(1) > distance(50) > distance(95) > 0


def test_one_option_does_not_change_what_another_draws(gradient: Image.Image) -> None:
    for key in KEYS[:20]:
        alone, with_jpeg = (augment(gradient, Augmentation(flip=0.5, jpeg=jpeg), key) for jpeg in (0, 100))
        assert np.abs(pixels(alone)[..., :2] - pixels(with_jpeg)[..., :2]).mean() < 25
