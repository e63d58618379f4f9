"""Images that are written in a row: data: URIs and base64, in every place where a row names an image."""

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from trainer.data.media.store import MediaStore
from trainer.data.rows.request import read_requests
from trainer.data.rows.sample import read_samples


def encode(form: str) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(buffer, form)
    return buffer.getvalue()


PNG = encode("PNG")
TEXT = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{TEXT}"
ANSWER = {"role": "assistant", "content": "b"}


def asked(**images: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "<image>a"}, ANSWER], **images}


def block(**image: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "a"}]}, ANSWER]}


GOOD = {
    "a data: URI": asked(images=[URI]),
    "as image": asked(image=URI),
    "base64": asked(images=[TEXT]),
    "base64 in lines": asked(image=base64.encodebytes(PNG).decode()),
    "base64 for URLs": asked(image=base64.urlsafe_b64encode(PNG).decode()),
    "without padding": asked(image=f"data:image/png;base64,{TEXT.rstrip('=')}"),
    "escaped for a URL": asked(image=f"data:image/png;base64,{quote(TEXT, safe='')}"),
    "without a type": asked(image=f"data:;base64,{TEXT}"),
    "in capitals": asked(image=f"DATA:IMAGE/PNG;BASE64,{TEXT}"),
    "OpenAI's image_url": block(type="image_url", image_url={"url": URI}),
    "an image block": block(type="image", image=URI),
    "bytes of the datasets library": asked(images=[{"bytes": TEXT, "path": None}]),
    "bytes and a name": asked(images=[{"bytes": TEXT, "path": "a.png"}]),
    "a list in a list": asked(images=[[URI]]),
}


def read(folder: Path, *rows: Any) -> Any:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder / "a.jsonl", folder, store=MediaStore(folders=(folder / "media",)))


@pytest.mark.parametrize("name", GOOD)
def test_is_read_as_the_file(tmp_path: Path, name: str) -> None:
    (sample,), problems = read(tmp_path, GOOD[name])
    digest = hashlib.sha256(PNG).hexdigest()
    assert problems == () and sample.images == (tmp_path / "media" / digest[:2] / f"{digest}.png",)
    assert sample.images[0].read_bytes() == PNG and sample.messages[0].content == "<image>a"


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_base64_of_each_format(tmp_path: Path, form: str) -> None:
    content = encode(form)
    (sample,), problems = read(tmp_path, asked(image=base64.b64encode(content).decode()))
    assert problems == () and sample.images[0].read_bytes() == content


NOISE = base64.b64encode(bytes(range(7, 256)) * 9).decode()
BAD = {
    "base64 of no image": (asked(images=[NOISE]), "images[0]", "is base64 of 2,241 bytes that do not begin as an image does"),
    "a data: URI of a video": (asked(images=["data:video/mp4;base64,AAAA"]), "images[0]", "a data: URI of 'video/mp4', not of an image"),
    "a data: URI without base64": (asked(images=["data:image/svg+xml,<svg/>"]), "images[0]", "that is not in base64"),
    "characters that are not base64": (asked(images=["data:image/png;base64,iVBO!!!!"]), "images[0]", "is not valid base64"),
    "nothing": (asked(images=["data:image/png;base64,"]), "images[0]", "is base64 of 0 bytes"),
    "a page": (block(type="image_url", image_url={"url": "data:text/html;base64,PGh0bWw+"}), "messages[0].content[0].image_url", "'text/html'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_in_a_few_words(tmp_path: Path, name: str) -> None:
    row, field, expected = BAD[name]
    samples, (problem,) = read(tmp_path, row)
    assert samples == () and (problem.row, problem.field) == (1, field) and expected in problem.problem
    assert len(str(problem)) < 400 and "base64 of an image file" in problem.fix


def test_a_path_that_looks_like_base64_is_a_path(tmp_path: Path) -> None:
    name = "iVBORw0KGgo" + "a" * 80
    (tmp_path / name).write_bytes(PNG)
    (sample,), problems = read(tmp_path, asked(image=name))
    assert problems == () and sample.images == (tmp_path / name,)


def test_a_url_is_not_fetched(tmp_path: Path) -> None:
    _, (problem,) = read(tmp_path, asked(image="https://images.invalid/a.png"))
    assert "images are not downloaded" in problem.problem and "omnilaunch data fetch" in problem.fix


def test_questions_to_infer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,image\nWhat?,{TEXT}\n")
    (request,) = read_requests(tmp_path / "a.csv", tmp_path, store=MediaStore(folders=(tmp_path / "media",)))
    assert request.images[0].read_bytes() == PNG and request.messages[0].content == "<image>\nWhat?"


LEFT_OUT = ("empty entry of a list of images, left out",)
EMPTY = {
    "an empty path": ({"image": ""}, ()),
    "null in a list": ({"images": [None]}, LEFT_OUT),
    "empty in a list": ({"images": ["", None]}, LEFT_OUT),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_image_in_a_row_without_a_mark_is_no_image(tmp_path: Path, name: str) -> None:
    given, adjustments = EMPTY[name]
    (sample,), problems = read(tmp_path, {"messages": [{"role": "user", "content": "a"}, ANSWER], **given})
    assert (problems, sample.images, sample.adjustments) == ((), (), adjustments)
    assert read(tmp_path, asked(**given))[1], "with a mark it is a problem"


def test_several_paths_in_one_text(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    row = {"messages": [{"role": "user", "content": "<image><image>?"}, ANSWER], "images": ["a.png, b.png"]}
    assert 'write a list: ["a.png", "b.png"]' in read(tmp_path, row)[1][0].fix
