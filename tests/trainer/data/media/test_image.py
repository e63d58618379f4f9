import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.contract import InputRefused
from trainer.data.media.image import MAX_PIXELS, ORIENTATION, check_size, examine_image, hash_file, open_image


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.array([[0, 0x8000]], dtype=np.uint16))


# mode -> (image of 2x1 pixels, format, expected RGB)
MODES: dict[str, tuple[Callable[[], Image.Image], str, list[tuple[int, int, int]]]] = {
    "RGB": (lambda: Image.new("RGB", (2, 1), (1, 2, 3)), "png", [(1, 2, 3)] * 2),
    "grey": (lambda: Image.new("L", (2, 1), 7), "png", [(7, 7, 7)] * 2),
    "black and white": (lambda: Image.new("1", (2, 1), 1), "png", [(255, 255, 255)] * 2),
    "16-bit grey": (sixteen_bits, "png", [(0, 0, 0), (128, 128, 128)]),
    "palette": (palette, "png", [(255, 0, 0), (0, 255, 0)]),
    "CMYK": (lambda: Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "tiff", [(255, 0, 0)] * 2),
    "clear": (lambda: Image.new("RGBA", (2, 1), (9, 9, 9, 0)), "png", [(255, 255, 255)] * 2),
    "half clear": (lambda: Image.new("RGBA", (2, 1), (0, 0, 0, 128)), "png", [(127, 127, 127)] * 2),
    "grey with alpha": (lambda: Image.new("LA", (2, 1), (9, 255)), "png", [(9, 9, 9)] * 2),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path: Path, name: str) -> None:
    make, form, expected = MODES[name]
    path = tmp_path / f"image.{form}"
    make().save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (2, 1))
    assert [tuple(pixel) for pixel in np.asarray(image)[0].tolist()] == expected
    assert examine_image(path).problem is None


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    palette().save(tmp_path / "clear.png", transparency=1)
    assert np.asarray(open_image(tmp_path / "clear.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_a_photo_is_rotated_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


def broken(path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-600])


def bomb(path: Path) -> None:
    """The header of a PNG of 400 million pixels."""
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (20_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.png": (broken, "truncated"),
    "truncated.jpg": (broken, "truncated"),
    "text.png": (lambda path: path.write_text("not an image"), "is not an image in a supported format"),
    "empty.png": (lambda path: path.write_bytes(b""), "is empty"),
    "drawing.eps": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"),
        "is a PostScript document",
    ),
    "strip.png": (lambda path: Image.new("L", (201, 1)).save(path), "201x1 pixels: one side is more than 200 times the other"),
    "float.tiff": (lambda path: Image.new("F", (2, 2), -1.5).save(path), "floating-point pixels from -1.5 to -1.5 have no known range"),
    "bomb.png": (bomb, "20000x20000 pixels are more than the limit of 357913940"),
    "folder.png": (lambda path: path.mkdir(), "Is a directory"),
    "absent.png": (lambda _: None, "No such file"),
}


@pytest.mark.parametrize("name", FILES)
def test_unusable_files_are_refused_with_their_path(tmp_path: Path, name: str) -> None:
    make, expected = FILES[name]
    path = tmp_path / name
    make(path)
    problem = examine_image(path).problem
    assert problem and expected in problem
    with pytest.raises(InputRefused, match=name.split(".")[0]) as caught:
        open_image(path)
    assert problem in str(caught.value)


def test_a_damaged_chunk_is_found(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    assert examine_image(path).problem


def test_a_truncated_end_is_found_although_all_pixels_are_present(tmp_path: Path) -> None:
    path = tmp_path / "tail.png"
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:-12])
    assert open_image(path).size == (8, 8)
    assert examine_image(path).problem


def test_sizes() -> None:
    check_size((200, 1))
    check_size((MAX_PIXELS // 1000, 1000))
    with pytest.raises(ValueError, match="more than the limit"):
        check_size((MAX_PIXELS // 1000 + 1, 1000))


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


# conversions -> (mode, format, EXIF orientation)
CONVERTED = {
    (): ("RGB", "jpg", 1),
    ("grey",): ("L", "png", 1),
    ("CMYK",): ("CMYK", "jpg", 1),
    ("palette",): ("P", "png", 1),
    ("transparent",): ("RGBA", "png", 1),
    ("16-bit grey",): ("I;16", "png", 1),
    ("turned by EXIF",): ("RGB", "jpg", 6),
    ("grey", "turned by EXIF"): ("L", "jpg", 3),
}


@pytest.mark.parametrize("words", CONVERTED)
def test_conversions_are_reported(tmp_path: Path, words: tuple[str, ...]) -> None:
    mode, form, orientation = CONVERTED[words]
    path, exif = tmp_path / f"image.{form}", Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new(mode, (30, 20)).save(path, exif=exif)
    examined = examine_image(path)
    assert (examined.problem, examined.conversions) == (None, words)
    assert examined.size == open_image(path).size == ((20, 30) if orientation == 6 else (30, 20))
    assert examined.sha256 == hash_file(path)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["tiff", "jpeg", "webp", "png"])
def test_the_reported_size_is_that_of_the_upright_image(tmp_path: Path, form: str, turn: int) -> None:
    """Pillow swaps the size of a TIFF when it opens the file, but not of other formats."""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    path = tmp_path / f"image.{form}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    examined = examine_image(path)
    assert examined.size == open_image(path).size == ((20, 30) if turn > 4 else (30, 20))
    assert examined.conversions == (("turned by EXIF",) if turn > 1 else ())


@pytest.mark.parametrize("progressive", [False, True])
def test_the_check_of_a_truncated_jpeg_agrees_with_opening_it(tmp_path: Path, progressive: bool) -> None:
    """The check decodes at an eighth of the size; its result must be that of decoding all pixels."""
    path, noise = tmp_path / "photo.jpg", np.random.default_rng(1).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90, progressive=progressive)
    whole = path.read_bytes()
    refused = 0
    for length in range(len(whole), 100, -97):
        path.write_bytes(whole[:length])
        problem = examine_image(path).problem
        try:
            open_image(path)
        except InputRefused as error:
            refused += 1
            assert problem and problem.split(":")[0] in str(error), length
        else:
            assert problem is None, length
    assert refused > 50
