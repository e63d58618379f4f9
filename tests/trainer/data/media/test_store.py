"""Images that are kept as files: once, whole, and in a folder that can be written."""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from trainer.contract import InputRefused
from trainer.data.media import store
from trainer.data.media.store import MediaStore, find_suffix

SUFFIXES = {
    b"\x89PNG\r\n\x1a\n....": ".png",
    b"\xff\xd8\xff\xe0....": ".jpg",
    b"RIFF....WEBP": ".webp",
    b"RIFF....WAVE": ".bin",
    b"GIF89a": ".gif",
    b"\x00\x00\x00 ftypavif": ".avif",
    b"\x00\x00\x00 ftypisom": ".bin",
    b"<html>": ".bin",
    b"": ".bin",
}


@pytest.mark.parametrize("content", SUFFIXES)
def test_suffixes(content: bytes) -> None:
    assert find_suffix(content) == SUFFIXES[content]


def test_a_file_is_named_by_its_content_and_written_once(tmp_path: Path) -> None:
    kept = MediaStore(folders=(tmp_path / "media",))
    path, digest = kept.keep(b"GIF8 a"), hashlib.sha256(b"GIF8 a").hexdigest()
    assert path == tmp_path / "media" / digest[:2] / f"{digest}.gif" and path.read_bytes() == b"GIF8 a"
    assert not path.stat().st_mode & 0o111, "it cannot be executed"
    before = path.stat()
    assert kept.keep(b"GIF8 a") == path and path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_an_incomplete_file_is_replaced(tmp_path: Path) -> None:
    kept = MediaStore(folders=(tmp_path,))
    path = kept.keep(b"GIF8 a")
    path.write_bytes(b"GIF")
    assert kept.keep(b"GIF8 a").read_bytes() == b"GIF8 a"


def test_several_processes_at_once(tmp_path: Path) -> None:
    contents = [f"GIF8 {number % 5}".encode() * 10_000 for number in range(40)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        paths = list(pool.map(MediaStore(folders=(tmp_path,)).keep, contents))
    assert [path.read_bytes() for path in paths] == contents
    assert len([found for found in tmp_path.rglob("*") if found.is_file()]) == 5, "no temporary file is left"


def test_the_first_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert MediaStore(folders=(tmp_path / "file" / "media", tmp_path / "run" / "media")).open() == tmp_path / "run" / "media"


def test_a_folder_for_temporary_files_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.kept_folder.tempfile.gettempdir", lambda: str(tmp_path))
    assert MediaStore().keep(b"GIF8").is_relative_to(tmp_path)


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes, more than the limit of 10"):
        MediaStore(folders=(tmp_path,)).keep(b"x" * 11)
    with pytest.raises(ValueError, match="has no bytes"):
        MediaStore(folders=(tmp_path,)).keep(b"")


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_new", fail)
    with pytest.raises(InputRefused, match=r"No space left on device\n    free disk space there, or set cluster\.root"):
        MediaStore(folders=(tmp_path,)).keep(b"x")
