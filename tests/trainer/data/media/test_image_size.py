"""The size of an image from its header equals that of the decoded image."""

from pathlib import Path

import pytest
from PIL import Image

from trainer.contract import InputRefused
from trainer.data.media.image import open_image, read_size

TAGGED = ("png", "jpeg", "webp", "tiff")


@pytest.mark.parametrize("form", [*TAGGED, "bmp", "gif", "ppm"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_read_from_the_header(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{form}"
    Image.new("RGB", (40, 30)).save(path, **({"exif": exif} if form in TAGGED else {}))
    assert read_size(path) == open_image(path).size
    if form in ("png", "jpeg"):
        assert read_size(path) == ((30, 40) if orientation > 4 else (40, 30))


def test_a_size_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(InputRefused, match=r"text.png: is not an image in a supported format"):
        read_size(tmp_path / "text.png")
    Image.new("RGB", (500, 1)).save(tmp_path / "strip.png")
    with pytest.raises(InputRefused, match="one side is more than 200 times the other"):
        read_size(tmp_path / "strip.png")
