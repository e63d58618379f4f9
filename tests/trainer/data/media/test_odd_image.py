"""Formats, depths and pages other than plain RGB of 8 bits, and images above 89 megapixels."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from trainer.contract import InputRefused
from trainer.data.media import image as image_module, large
from trainer.data.media.image import ORIENTATION, examine_image, open_image, read_size

RED, BLUE = (255, 0, 0), (0, 0, 255)
PAGES = [Image.new("RGB", (30, 20), RED), Image.new("RGB", (30, 20), BLUE)]
# name of the file -> options of Image.save, conversions
FORMATS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "plain.avif": ({}, ()),
    "plain.jp2": ({}, ()),
    "plain.tga": ({}, ()),
    "moving.gif": ({"save_all": True, "append_images": PAGES[1:]}, ("palette", "the first frame of an animation")),
    "moving.png": ({"save_all": True, "append_images": PAGES[1:]}, ("the first frame of an animation",)),
    "moving.webp": ({"save_all": True, "append_images": PAGES[1:], "lossless": True}, ("the first frame of an animation",)),
    "moving.avif": ({"save_all": True, "append_images": PAGES[1:]}, ("the first frame of an animation",)),
    "pages.tiff": ({"save_all": True, "append_images": PAGES[1:]}, ("the first of several pages",)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_further_formats_and_the_first_frame(tmp_path: Path, name: str) -> None:
    options, words = FORMATS[name]
    PAGES[0].save(tmp_path / name, **options)  # type: ignore[arg-type]
    read, examined = open_image(tmp_path / name), examine_image(tmp_path / name)
    assert (examined.problem, examined.conversions) == (None, words)
    assert examined.size == read.size == read_size(tmp_path / name) == (30, 20)
    assert np.abs(np.asarray(read).astype(int) - RED).max() < 8


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_an_avif_is_turned_by_its_tag(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    PAGES[0].save(tmp_path / "turned.avif", exif=exif)
    size = open_image(tmp_path / "turned.avif").size
    assert (
        size == read_size(tmp_path / "turned.avif") == examine_image(tmp_path / "turned.avif").size == ((20, 30) if turn == 6 else (30, 20))
    )


# pixels -> grey levels of the image, conversions; None where it is refused
DEPTHS: dict[str, tuple[list[float], str, list[int] | None, tuple[str, ...]]] = {
    "shares of white": ([0, 0.5, 1], "F", [0, 128, 255], ("floating point",)),
    "grey levels": ([0, 2, 254.6], "F", [0, 2, 255], ("floating point",)),
    "metres": ([0, 2, 3000], "F", None, ()),
    "negative": ([-1, 0, 1], "F", None, ()),
    "not a number": ([0, float("nan"), 1], "F", None, ()),
    "16 bits": ([0, 0x8000, 0xFFFF], "I;16", [0, 128, 255], ("16-bit grey",)),
    "12 bits": ([0, 0x800, 0xFFF], "I;16", [0, 8, 15], ("16-bit grey", "16-bit grey that uses at most 12 bits, so that it is dark")),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths(tmp_path: Path, name: str) -> None:
    values, mode, levels, words = DEPTHS[name]
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.array([values], dtype=np.float32 if mode == "F" else np.uint16)).save(path)
    examined = examine_image(path)
    if levels is None:
        assert examined.problem and "have no known range; scale them to 0 to 1" in examined.problem
        with pytest.raises(InputRefused, match="no known range"):
            open_image(path)
    else:
        assert (examined.problem, examined.conversions) == (None, words)
        assert np.asarray(open_image(path))[0, :, 0].tolist() == levels


# --------------------------------------------------------------------------------------------------- above 89 megapixels


def noise(shape: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, shape, dtype=np.uint8))


LARGE: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: noise((601, 97, 3)).save(path),
    "rgba.png": lambda path: noise((513, 98, 4)).save(path),
    "grey_alpha.png": lambda path: noise((513, 98, 2)).save(path),
    "clear_colour.png": lambda path: noise((600, 97, 3)).save(path, transparency=(1, 2, 3)),
    "grey.png": lambda path: noise((513, 98)).save(path),
    "palette.png": lambda path: noise((513, 98, 3)).quantize(16).save(path),
    "photo.jpg": lambda path: noise((601, 97, 3)).save(path),
    "progressive.jpg": lambda path: noise((601, 97, 3)).save(path, progressive=True),
    "cmyk.jpg": lambda path: noise((601, 97, 4)).convert("CMYK").save(path),
    "plain.webp": lambda path: noise((601, 97, 3)).save(path, lossless=True),
    "plain.tiff": lambda path: noise((601, 97, 3)).save(path),
    "plain.bmp": lambda path: noise((601, 97, 3)).save(path),
    "deep.png": lambda path: Image.fromarray(np.arange(601 * 97, dtype=np.uint16).reshape(601, 97)).save(path),
}


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "MAX_PIXELS", 50_000)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_image_is_read_at_half_of_its_sides(tmp_path: Path, name: str, low_limit: None) -> None:
    path = tmp_path / name
    LARGE[name](path)
    read, examined = open_image(path), examine_image(path)
    with Image.open(path) as whole:
        expected = image_module.flatten(whole).reduce(2)
    assert read.size == expected.size == examined.size == read_size(path)
    assert image_module.HALVED in examined.conversions and examined.problem is None
    if not name.endswith("jpg"):  # libjpeg scales by its own transform
        assert np.array_equal(np.asarray(read), np.asarray(expected))


@pytest.mark.parametrize("form", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("turn", [1, 3, 6])
def test_a_large_image_is_turned(tmp_path: Path, form: str, turn: int, low_limit: None) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    noise((601, 97, 3)).save(tmp_path / f"large.{form}", exif=exif)
    size = open_image(tmp_path / f"large.{form}").size
    assert size == read_size(tmp_path / f"large.{form}") == examine_image(tmp_path / f"large.{form}").size
    assert size == ((301, 49) if turn == 6 else (49, 301))


def test_a_large_image_that_is_truncated(tmp_path: Path, low_limit: None) -> None:
    noise((601, 97, 3)).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    (tmp_path / "large.png").write_bytes(content[:-3000])
    with pytest.raises(InputRefused, match="is truncated"):
        open_image(tmp_path / "large.png")
    assert "truncated" in str(examine_image(tmp_path / "large.png").problem)
    assert open_image(tmp_path / "large.png", truncated=True).size == (49, 301)


def test_the_real_limit(tmp_path: Path) -> None:
    """A PNG of 90 million pixels is decoded some rows at a time."""
    rows = bytes(1 + 9500 * 3) * 9500
    Image.new("RGB", (1, 1)).save(tmp_path / "90.png")
    chunks = [
        (b"IHDR", (9500).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    ]
    written = b"".join(len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks)
    (tmp_path / "90.png").write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    assert open_image(tmp_path / "90.png").size == examine_image(tmp_path / "90.png").size == (4750, 4750)


# --------------------------------------------------------------------------------------------------------- damaged files


def with_text(path: Path, *, large_text: bool = False, after: bool = False) -> None:
    """A PNG whose text has a wrong checksum, or is larger than Pillow reads."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (3 * 2**20 if large_text else 10), zip=large_text)
    noise((20, 30, 3)).save(path, pnginfo=info)
    content = path.read_bytes()
    if not large_text:
        at = content.index(b"tEXt")
        content = content[: at + 20] + bytes([content[at + 20] ^ 1]) + content[at + 21 :]
    if after:
        at, end = content.index(b"tEXt") - 4, content.index(b"IDAT") - 4
        content = content[:at] + content[end:-12] + content[at:end] + content[-12:]
    path.write_bytes(content)


@pytest.mark.parametrize("options", [{}, {"large_text": True}, {"after": True}])
def test_a_broken_text_in_a_png_is_ignored(tmp_path: Path, options: dict[str, bool]) -> None:
    with_text(tmp_path / "text.png", **options)
    examined = examine_image(tmp_path / "text.png")
    assert (examined.problem, examined.conversions, examined.size) == (None, ("with a broken text, ignored",), (30, 20))
    assert np.array_equal(np.asarray(open_image(tmp_path / "text.png")), np.asarray(noise((20, 30, 3))))
    assert read_size(tmp_path / "text.png") == (30, 20)


# name -> (options of Image.save, bytes that are missing at the end, whether enough of it can be read)
CUT: dict[str, tuple[dict[str, object], int, bool]] = {
    "end.jpg": ({}, 2, True),
    "some.jpg": ({}, 15, True),
    "half.jpg": ({}, 10_000, False),
    "some_progressive.jpg": ({"progressive": True}, 300, True),
    "end.png": ({}, 12, True),
    "some.png": ({}, 300, True),
    "half.png": ({}, 20_000, False),
}


@pytest.mark.parametrize("name", CUT)
def test_truncated_images(tmp_path: Path, name: str) -> None:
    options, missing, enough = CUT[name]
    path = tmp_path / name
    noise((120, 160, 3)).save(path, quality=90, **options)  # type: ignore[arg-type]
    with Image.open(path) as opened:
        whole = np.asarray(opened.convert("RGB"))
    path.write_bytes(path.read_bytes()[:-missing])
    refused, read = examine_image(path), examine_image(path, truncated=True)
    assert refused.problem and "truncated" in refused.problem
    assert ("data.truncated_images=read" in refused.fix) is enough
    if not enough:
        assert read.problem and "can be decoded, less than 75%" in read.problem
        return
    assert (read.problem, read.conversions, read.size) == (None, ("truncated, read as far as it goes",), (160, 120))
    assert read_size(path, truncated=True) == (160, 120)
    pixels = np.asarray(open_image(path, truncated=True))
    if "progressive" not in name:
        assert np.array_equal(pixels[:96], whole[:96])


def test_other_formats_that_are_truncated_stay_refused(tmp_path: Path) -> None:
    noise((120, 160, 3)).save(tmp_path / "a.webp")
    (tmp_path / "a.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:-50])
    examined = examine_image(tmp_path / "a.webp", truncated=True)
    assert examined.problem and "truncated_images" not in examined.fix


def test_an_interlaced_png_is_completed(tmp_path: Path) -> None:
    """Its rows are stored in seven passes: the last one, of every second row, is what a few bytes at the end are."""
    content = interlaced(np.asarray(noise((9, 11))))
    (tmp_path / "whole.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_image(tmp_path / "whole.png"))[..., 0], np.asarray(noise((9, 11))))
    (tmp_path / "cut.png").write_bytes(content[:-26])
    assert np.array_equal(np.asarray(open_image(tmp_path / "cut.png", truncated=True))[:7:2, :, 0], np.asarray(noise((9, 11)))[:7:2])


def interlaced(pixels: np.ndarray) -> bytes:
    """(rows, columns) uint8 as an Adam7 PNG without compression."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(b"\0" + row.tobytes() for left, top, across, down in passes for row in pixels[top::down, left::across])
    header = pixels.shape[1].to_bytes(4) + pixels.shape[0].to_bytes(4) + bytes((8, 0, 0, 0, 1))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks
    )
