"""webdataset: the groups of a tar file as rows, with their images kept as files."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.data.row_count import count_rows
from trainer.data.containers.annotation import read_rows
from trainer.data.media.store import MediaStore
from trainer.data.rows.indexed_samples import index_samples
from trainer.data.rows.sample import read_samples

PNG = b"\x89PNG\r\n\x1a\n one"
JPEG = b"\xff\xd8\xff two"
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def pack(*members: tuple[str, bytes | dict[str, Any]], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            member.type, member.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


GOOD: dict[str, tuple[tuple[tuple[str, Any], ...], list[dict[str, Any]]]] = {
    "a row and its image": ((("1.jpg", JPEG), ("1.json", TALK)), [{**TALK, "image": "JPEG"}]),
    "in folders, with the json first": ((("./a/1.json", TALK), ("./a/1.jpg", JPEG), ("./b/1.json", TALK)), [{**TALK, "image": "JPEG"}, TALK]),
    "two images, in the order of their names": ((("1.1.png", PNG), ("1.0.jpg", JPEG), ("1.json", TALK)), [{**TALK, "images": ["JPEG", "PNG"]}]),
    "images that the row names": (
        (("1.a.png", PNG), ("1.b.jpg", JPEG), ("1.json", {**TALK, "images": ["1.b.jpg", "1.a.png"]})), [{**TALK, "images": ["JPEG", "PNG"]}],
    ),
    "an image that a block names": (
        (("1.png", PNG), ("1.json", {"messages": [{"content": [{"type": "image", "image": "1.png"}]}]})),
        [{"messages": [{"content": [{"type": "image", "image": "PNG"}]}]}],
    ),
    "a caption": ((("1.png", PNG), ("1.txt", b"a cat\n")), [{"image": "PNG", "text": "a cat"}]),
    "a caption that the json has too": ((("1.png", PNG), ("1.txt", b"a cat"), ("1.json", {"caption": "a cat"})), [{"caption": "a cat", "image": "PNG"}]),
    "endings in capitals": ((("1.PNG", PNG), ("1.JSON", TALK)), [{**TALK, "image": "PNG"}]),
}  # fmt: skip


def short(value: Any, folder: Path) -> Any:
    """With the kind of the image instead of the path of its file."""
    if isinstance(value, dict):
        return {key: short(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [short(item, folder) for item in value]
    named = isinstance(value, str) and value.startswith(str(folder))
    return {PNG: "PNG", JPEG: "JPEG"}[Path(value).read_bytes()] if named else value


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("file", ["a.tar", "a.tar.gz"])
def test_rows(tmp_path: Path, name: str, file: str) -> None:
    members, expected = GOOD[name]
    content = pack(*members)
    (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    rows, problems = read_rows(tmp_path / file, MediaStore(folders=(tmp_path / "media",)))
    assert problems == () and [short(row, tmp_path) for _, row in rows] == expected
    assert [number for number, _ in rows] == list(range(1, len(expected) + 1)) and count_rows(tmp_path / file) == len(expected)


def test_samples_by_index(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack(("1.png", PNG), ("1.json", TALK), ("2.png", PNG), ("2.json", TALK)))
    store = MediaStore(folders=(tmp_path / "media",))
    samples, problems = read_samples(tmp_path / "a.tar", tmp_path, store=store)
    assert problems == () and len(samples) == 2 and samples[0].images == samples[1].images
    assert tuple(index_samples(tmp_path / "a.tar", tmp_path, tmp_path, store)) == samples


OTHER = (("0.json", TALK),)
BAD = {
    "an image alone": (pack(*OTHER, ("1.png", PNG)), 2, "1.png has neither a .json nor a .txt"),
    "a json that is broken": (pack(*OTHER, ("1.png", PNG), ("1.json", b"{1}")), 2, "1.json is not valid JSON"),
    "a json that is a list": (pack(*OTHER, ("1.json", b"[]")), 2, "1.json is not an object"),
    "a key twice in a json": (pack(*OTHER, ("1.json", b'{"a": 1, "a": 2}')), 2, "1.json has the key 'a' twice"),
    "a member of another kind": (pack(*OTHER, ("1.json", TALK), ("1.npy", b"x")), 2, "1.npy is not read"),
    "an empty image": (pack(*OTHER, ("1.json", TALK), ("1.png", b"")), 2, "1.png has no bytes"),
    "a group in two places": (pack(*OTHER, ("1.json", TALK), ("0.png", PNG), ("0.txt", b"x")), 3, "the members of '0' are not next to each other"),
    "a link": (pack(("1.json", b""), kind=tarfile.SYMTYPE), 1, "1.json is not a file, but a link"),
    "no members": (pack(), 0, "has no members"),
    "cut off": (pack(*OTHER, ("1.png", PNG * 900))[:2000], 0, "cannot be read"),
    "no tar file": (b"x" * 2000, 0, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_with_group_and_member(tmp_path: Path, name: str) -> None:
    content, row, expected = BAD[name]
    (tmp_path / "a.tar").write_bytes(content)
    _, problems = read_rows(tmp_path / "a.tar", MediaStore(folders=(tmp_path / "media",)))
    assert [problem.row for problem in problems] == [row] and expected in problems[0].problem and problems[0].fix


def test_nothing_is_written_by_a_name_of_the_archive(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(pack(("../../out.png", PNG), ("../../out.json", TALK)))
    (row,), problems = read_rows(folder / "a.tar", MediaStore(folders=(folder / "media",)))
    assert problems == () and Path(row[1]["image"]).is_relative_to(folder / "media")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.parent.glob("out.*"))
