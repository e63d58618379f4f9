"""Files that are not images are named as what they are."""

from pathlib import Path

import pytest

from trainer.contract import InputRefused
from trainer.data.media.image import examine_image, open_image, read_size

# first bytes of a file -> what it is, a word of the next step
CONTENTS = {
    b"": ("is empty", "copy or download"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": ("is a pointer of Git LFS", "git lfs pull"),
    b"<!DOCTYPE html><html>404</html>": ("is an HTML page", "download the image again"),
    b"\n  <HTML><head>": ("is an HTML page", "download"),
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': ("is XML", "download"),
    b'<?xml version="1.0"?>\n<!-- Inkscape -->\n<svg xmlns="http://www.w3.org/2000/svg"/>': ("is an SVG drawing", "convert it to PNG"),
    b"<svg width='1'/>": ("is an SVG drawing", "convert it to PNG"),
    b"%PDF-1.7\n": ("is a PDF document", "convert its pages"),
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": ("is a HEIC image", "convert it"),
    b"\0\0\0\x18ftypmp42\0\0\0\0": ("is a video", "frames"),
    b"\0\0\0\x14ftypqt  \0\0\0\0": ("is a video", "frames"),
    b"RIFF\0\0\0\0AVI LIST": ("is a video", "frames"),
    b"\x1aE\xdf\xa3\0\0webm": ("is a video", "frames"),
    b"RIFF\0\0\0\0WAVEfmt ": ("is a sound", "replace"),
    b"PAR1\x15\x04": ("is a parquet file", "data.train"),
    b"PK\x03\x04\x14\0": ("is an archive", "unpack"),
    b"\x1f\x8b\x08\0": ("is an archive", "unpack"),
    b"a/1.png".ljust(257, b"\0") + b"ustar": ("is an archive", "unpack"),
    b"\x93NUMPY\x01\0": ("is an array of NumPy", "convert"),
    b'{"error": "not found"}': ("is JSON", "replace"),
    b"[]": ("is JSON", "replace"),
    b"iVBORw0KGgoAAAANSUhEUgAA": ("is an image as base64 text", "decode it"),
    b"data:image/png;base64,iVBO": ("is an image as base64 text", "decode it"),
    b"\0" * 5000: ("holds zero bytes only", "copy or download"),
    b"anything else": ("is not an image in a supported format (PNG, JPEG", "replace"),
}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:12]))
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    what, step = CONTENTS[content]
    (tmp_path / "a.png").write_bytes(content)
    examined = examine_image(tmp_path / "a.png")
    assert examined.problem and what in examined.problem and step in examined.fix
    for read in (open_image, read_size):
        with pytest.raises(InputRefused) as caught:
            read(tmp_path / "a.png")
        assert what in str(caught.value) and step in str(caught.value)
