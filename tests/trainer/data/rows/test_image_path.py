"""Paths of images that are written otherwise than the files are named."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.contract import DataProblem
from trainer.data.rows.image_path import find_image, list_readings
from trainer.data.rows.parsed_row import ImageReference
from trainer.data.rows.request import read_requests
from trainer.data.rows.sample import read_samples

FILES = (
    "a.png",
    "sub/b.png",
    "my a.png",
    "Caf\u00e9.png",
    "x#1.png",
    "50%25.png",
    "one/c.png",
    "UPPER/D.PNG",
    "wide\\name.png",
    "two/e.png",
    "two/E.png",
)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `images`, with FILES in it."""
    for name in FILES:
        path = tmp_path / "data" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data" / "outside.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "images"


# path as it is written ({} is the folder) -> file that is found, form
FOUND = {
    "a.png": ("a.png", ""),
    "./a.png": ("a.png", ""),
    "sub/../a.png": ("a.png", ""),
    "{}/a.png": ("a.png", ""),
    "file://{}/a.png": ("a.png", ""),
    "file://sub/b.png": ("sub/b.png", ""),
    "50%25.png": ("50%25.png", ""),
    "wide\\name.png": ("wide\\name.png", ""),
    "two/e.png": ("two/e.png", ""),
    "../outside.png": ("../outside.png", ""),
    "a.png ": ("a.png", "without the spaces around it"),
    "\ta.png\n": ("a.png", "without the spaces around it"),
    "my%20a.png": ("my a.png", "with percent encoding decoded"),
    "Caf%C3%A9.png": ("Caf\u00e9.png", "with percent encoding decoded"),
    "x%231.png": ("x#1.png", "with percent encoding decoded"),
    "file://{}/my%20a.png": ("my a.png", "as the path of its file:// address and with percent encoding decoded"),
    "file://localhost{}/a.png": ("a.png", "as the path of its file:// address"),
    "FILE:{}/a.png": ("a.png", "as the path of its file:// address"),
    "sub\\b.png": ("sub/b.png", "with back slashes as slashes"),
    ".\\sub\\b.png": ("sub/b.png", "with back slashes as slashes"),
    "C:\\data\\images\\sub\\b.png": ("sub/b.png", "with back slashes as slashes and without the name of the folder at its beginning"),
    "D:/data/images/a.png": ("a.png", "without the name of the folder at its beginning"),
    "\\\\server\\share\\images\\a.png": ("a.png", "with back slashes as slashes and without the name of the folder at its beginning"),
    "file:///C:/images/a.png": ("a.png", "as the path of its file:// address and without the name of the folder at its beginning"),
    "images/a.png": ("a.png", "without the name of the folder at its beginning"),
    "data/images/sub/b.png": ("sub/b.png", "without the name of the folder at its beginning"),
    "images\\sub\\b.png": ("sub/b.png", "with back slashes as slashes and without the name of the folder at its beginning"),
    "~/images/a.png": ("a.png", "in the home folder"),
    "A.PNG": ("a.png", "in another case or Unicode form"),
    "upper/d.png": ("UPPER/D.PNG", "in another case or Unicode form"),
    "{}/upper/d.png": ("UPPER/D.PNG", "in another case or Unicode form"),
    "Cafe\u0301.png": ("Caf\u00e9.png", "in another case or Unicode form"),
    "Sub\\B.png": ("sub/b.png", "with back slashes as slashes and in another case or Unicode form"),
}


def find(name: str, images: Path) -> tuple[ImageReference, str]:
    return find_image(ImageReference(name=name.format(images), field="image"), images)


@pytest.mark.parametrize("name", FOUND, ids=ascii)
def test_a_path_leads_to_its_file(images: Path, name: str) -> None:
    file, form = FOUND[name]
    image, how = find(name, images)
    assert image.exists and how == (f"path of an image, read {form}" if form else "")
    written = str(image.name).removeprefix("file://")
    assert (images / written).resolve() == (images / file).resolve()


# What stays missing: another file or several could be meant, or it would leave the folder.
MISSING = (
    "none.png", "TWO/e.PNG", "..\\outside.png", "%2e%2e/outside.png", "..%2Foutside.png", "sub/%2e%2e/%2e%2e/outside.png", "%2Fetc%2Fpasswd",
    "/home/someone/images/a.png", "/a.png", "C:\\work\\other\\a.png", "other/images/a.png", "images/../outside.png", "", "sub", "~other/a.png",
    "https://example.org/a.png", "data:image/png;base64,aaaa", "a%00.png", "x" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("name", MISSING, ids=lambda name: ascii(name[:30]))
def test_a_path_that_stays_missing(images: Path, name: str) -> None:
    image, how = find(name, images)
    assert (image.exists, how, image.name) == (False, "", name)


def test_a_decoded_path_never_climbs(images: Path) -> None:
    """An absolute path as it is written leads anywhere, but not through `..` that only its decoded form has."""
    for name in (f"file://{images}/%2e%2e/outside.png", f"{images}/%2e%2e/outside.png"):
        assert not find(name, images)[0].exists
    assert all(".." not in reading.text for reading in list_readings("%2e%2e/%2e%2e/etc/passwd", images))


@pytest.mark.parametrize("name", [None, 3, [], {"path": 1}, True])
def test_a_value_that_is_no_path_is_left_to_the_checks(images: Path, name: object) -> None:
    assert find_image(ImageReference(name=name, field="image"), images) == (ImageReference(name=name, field="image"), "")


@pytest.fixture
def rows(images: Path) -> Callable[..., Path]:
    def write(*names: str) -> Path:
        content = [
            {"image": name, "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]}
            for name in names
        ]
        (images.parent / "rows.json").write_text(json.dumps(content))
        return images.parent / "rows.json"

    return write


def test_rows_have_the_files_and_count_the_forms(images: Path, rows: Callable[..., Path]) -> None:
    samples, problems = read_samples(rows("a.png", "A.png", "sub\\b.png"), images)
    assert problems == () and [sample.images for sample in samples] == [(images / "a.png",), (images / "a.png",), (images / "sub/b.png",)]
    assert [sample.adjustments for sample in samples] == [
        (), ("path of an image, read in another case or Unicode form",), ("path of an image, read with back slashes as slashes",),
    ]  # fmt: skip


# missing path -> the file that is suggested
HINTS = {
    "a.jpg": "a.png",
    "sub/b.jpeg": "sub/b.png",
    "my_a.png": "my a.png",
    "onee/c.png": "one/c.png",
    "sbu/b.png": "sub/b.png",
    "TWO/e.PNG": "two/E.png",
    "/elsewhere/a.jpg": "",
    "zzz/a.png": "",
    "b.png": "",
    "../outside.jpg": "",
}


@pytest.mark.parametrize("name", HINTS)
def test_a_missing_image_names_the_nearest_file(images: Path, rows: Callable[..., Path], name: str) -> None:
    _, problems = read_samples(rows(name), images)
    (problem,) = problems
    assert isinstance(problem, DataProblem) and problem.problem == f"no image file at {images / name}"
    hint = HINTS[name]
    start = f"write {hint!r} if that is meant; else put the file there" if hint else "put the file there"
    assert problem.fix.startswith(start)


def test_numbered_files_are_not_near(images: Path, rows: Callable[..., Path]) -> None:
    (images / "image_0001.png").touch()
    _, (problem,) = read_samples(rows("image_0002.png"), images)
    assert problem.fix.startswith("put the file there")


def test_a_file_that_is_added_later_is_found(images: Path) -> None:
    assert not find("NEW.png", images)[0].exists
    (images / "new.png").touch()
    assert find("NEW.png", images)[0].exists


def test_unicode_forms_of_korean(images: Path) -> None:
    (images / unicodedata.normalize("NFD", "\ud55c\uae00.png")).touch()
    assert find("\ud55c\uae00.png", images)[0].exists


def test_rows_to_ask(images: Path) -> None:
    (images / "ask.jsonl").write_text('{"prompt": "What?", "image": "sub\\\\b.png"}\n{"prompt": "What?", "image": "none.png"}\n')
    requests = read_requests(images / "ask.jsonl", images)
    assert [request.images for request in requests] == [(images / "sub/b.png",), (images / "none.png",)]
