"""Image bombs: each is refused with a reason, quickly and within bounded memory, and the server keeps answering."""

import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image

from tests.trainer.serving.service import EchoAnswerer, data_uri, png, resident_bytes, serve
from trainer.data.media.image import open_image
from trainer.serving.image import decode, size_of
from trainer.serving.refusal import RequestRefused

MOST = 40 * 10**6
MIB = 2**20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def gif_of(width: int, height: int, frame: tuple[int, int, int, int] | None = None) -> bytes:
    left, top, wide, high = frame or (0, 0, width, height)
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    return header + b"," + struct.pack("<HHHHB", left, top, wide, high, 0) + b"\x02\x02\x4c\x01\x00;"


def webp_of(kind: bytes, data: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def large_webp() -> bytes:
    """A canvas of 268 million pixels, which a decoder allocates before it reads the first one."""
    return webp_of(b"VP8X", b"\x02\x00\x00\x00" + (16383).to_bytes(3, "little") * 2)


def jpeg_of(width: int, height: int, **options: object) -> bytes:
    file = BytesIO()
    Image.effect_noise((width, height), 90).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_sized(width: int, height: int) -> bytes:
    """A small JPEG whose header declares another size."""
    content = jpeg_of(16, 16)
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated a thousand times: each is a pass over all pixels."""
    content = png(2000, 2000, kind="JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * 1000 + b"\xff\xd9"


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (64, 64), (place % 256, 0, 0)) for place in range(200)]
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "png: 65535 x 65535 in its header": lambda: png_of(65535, 65535),
    "png: 2^31-1 x 2^31-1": lambda: png_of(2**31 - 1, 2**31 - 1),
    "png: one line too many for the limit": lambda: png_of(40_001, 1_000, data=bytes(120_004_000)),
    "png: a strip of a million": lambda: png_of(1_000_000, 8, data=bytes(24_000_008)),
    "png: 1 x 1": lambda: png(1, 1),
    "png: no pixel": lambda: png_of(0, 10),
    "png: text of 200 MB in a compressed chunk": lambda: png_of(
        32, 32, chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(200 * MIB), 9)), data=bytes(32 * 97)
    ),
    "png: a profile of 200 MB": lambda: png_of(32, 32, chunk(b"iCCP", b"p\x00\x00" + zlib.compress(bytes(200 * MIB), 9)), data=bytes(8)),
    "png: cut in its pixels": lambda: png(500, 500, mode="RGB")[:-40],
    "png: header alone": lambda: png()[:20],
    "gif: 65535 x 65535": lambda: gif_of(65535, 65535),
    "gif: a frame of 65535 x 65535 on a small screen": lambda: gif_of(16, 16, (0, 0, 65535, 65535)),
    "gif: no pixel": lambda: gif_of(0, 0),
    "gif: header alone": lambda: gif_of(16, 16)[:8],
    "webp: a canvas of 16384 x 16384": large_webp,
    "webp: lossless, 16384 x 16384": lambda: webp_of(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20)),
    "webp: lossy, 16383 x 16383": lambda: webp_of(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(20)),
    "webp: an unknown kind": lambda: webp_of(b"VP9X", bytes(20)),
    "jpeg: 65500 x 65500": lambda: jpeg_sized(65500, 65500),
    "jpeg: a thousand scans": many_scans,
    "jpeg: cut in its pixels": lambda: jpeg_of(500, 500)[:-5000],
    "jpeg: no frame": lambda: b"\xff\xd8\xff\xd9",
    "tiff": lambda: png(kind="TIFF"),
    "bmp": lambda: png(kind="BMP"),
    "eps, which another program would open": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "svg with an entity": lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "nothing": lambda: b"",
}


HARMLESS: dict[str, Callable[[], bytes]] = {  # no more is decompressed than the image has pixels
    "png: 300 MB behind the last pixel": lambda: png_of(32, 32, data=bytes(300 * MIB)),
    "gif: 200 frames": lambda: animation("GIF"),
    "png: 200 frames": lambda: animation("PNG"),
    "webp: 200 frames": lambda: animation("WEBP"),
}


def test_bombs_are_refused_and_the_server_keeps_running() -> None:
    with serve(EchoAnswerer(), max_batch=4) as served:
        good = data_uri(png())
        assert served.ask(image=good).status == 200
        before = resident_bytes()
        for name, make in BOMBS.items():
            uri = data_uri(make())
            began = time.monotonic()
            reply = served.ask(image=uri)
            assert reply.status == 400 and reply.error["code"] in ("invalid_image", "image_too_large"), (name, reply.data[:300])
            assert reply.error["param"] == "messages: image 1" and time.monotonic() - began < 5, name
            assert served.ask(image=good).status == 200, name
        assert len(BOMBS) >= 15 and set(served.chat.answerer.looked) == {(32, 32)}  # type: ignore[union-attr]
        assert [served.ask(image=data_uri(make())).status for make in HARMLESS.values()] == [200] * len(HARMLESS)
        assert resident_bytes() - before < 512 * MIB


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_only_the_first_frame_is_decoded(kind: str) -> None:
    image = decode(animation(kind), MOST, "image")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert max(channel[1] for channel in image.getextrema()) <= 2, "the first frame is black"


def test_pixels_equal_those_that_a_run_reads_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Rotated by its tag, transparent over white, palettes and greys."""
    noise = Image.effect_noise((48, 32), 90)
    made = {
        "turned.jpg": (
            noise.convert("RGB"),
            {"exif": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"},
        ),
        "clear.png": (Image.merge("RGBA", (noise, noise, noise, noise)), {}),
        "palette.gif": (noise.convert("P"), {}),
        "grey.png": (noise, {}),
        "deep.png": (noise.convert("I;16"), {}),
        "plain.webp": (noise.convert("RGB"), {}),
    }
    for name, (image, options) in made.items():
        image.save(tmp_path / name, **options)
        found = decode((tmp_path / name).read_bytes(), MOST, "image")
        assert found.tobytes() == open_image(tmp_path / name).tobytes(), name
    assert decode((tmp_path / "turned.jpg").read_bytes(), MOST, "image").size == (32, 48)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("GIF", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_sizes_are_read_from_headers(kind: str, options: dict) -> None:
    assert size_of(png(123, 45, kind=kind, **options)) == (123, 45)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("data:image/png;base64,@@@@", "is not base64"),
        ("data:image/png;base64,AAA", "is not base64"),
        ("data:image/png,AAAA", "a data URI must start with"),
        ("data:text/html;base64,AAAA", "a data URI must start with"),
        ("data:;base64,AAAA", "a data URI must start with"),
        ("data:image/svg+xml;base64,AAAA", "a data URI must start with"),
        ("DATA:image/png;charset=x;base64,AAAA", "a data URI must start with"),
        (data_uri(bytes(4000)), "more than 3000 bytes"),
    ],
)
def test_invalid_data_uris(uri: str, said: str) -> None:
    with serve(EchoAnswerer(), max_image_bytes=3000) as served:
        reply = served.ask(image=uri)
        assert reply.status == 400 and said in reply.error["message"]


def test_the_limit_counts_pixels_and_is_in_the_message() -> None:
    with pytest.raises(RequestRefused, match="101x100 pixels are more than the limit of 10000"):
        decode(png(101, 100), 10_000, "image")
    assert decode(png(100, 100), 10_000, "image").size == (100, 100)
