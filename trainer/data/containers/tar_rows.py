"""The rows of a webdataset: a tar file whose members are grouped by key, as in a/0001.jpg and a/0001.json.

The json of a group is the row, its images take the place of the names that the row gives them, and a txt is the key `text`. Nothing is unpacked by the
names of the archive: images are kept as files named by their content (trainer.data.media.store).
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.contract.row_file import open_binary, split_member
from trainer.data.containers.found import ONE_ROW_EACH, Found, Position, file_problem, row_problem
from trainer.data.containers.json_text import RowDecoder, describe
from trainer.data.media.store import MOST_BYTES, MediaStore

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jp2", "heic", "heif")
TEXTS = ("txt", "text", "caption")
NAMING_KEYS = ("image", "images", "path", "url", "image_url", "file_name")  # what names a member in the json
READ = "a group has a .json or a .txt, and the images of the row"


class MemberFault(ValueError):
    """Why a member of a group cannot be read. The message begins with its name."""


def stream_tar(file: Path, position: Position, store: MediaStore) -> Iterator[Found]:
    number, seen = 0, set[str]()
    with open_binary(file) as (plain, binary):
        position.start(binary)
        try:
            with tarfile.open(fileobj=plain, mode="r|") as archive:
                members = (member for member in archive if not member.isdir())
                for key, group in groupby(members, lambda member: split_member(member.name)[0]):
                    number += 1
                    found = read_group(file, number, archive, group, store)
                    twice = key in seen and not isinstance(found, DataProblem)
                    problem = f"the members of {key!r} are not next to each other"
                    yield row_problem(file, number, problem, "write the archive again, sorted by name") if twice else found
                    seen.add(key)
        except tarfile.TarError as error:
            after = f" after row {number:,}" if number else ""
            yield file_problem(file, f"cannot be read{after}: {error}", "write the archive again, or copy it again from its source")
            return
    if not number:
        yield file_problem(file, "has no members", ONE_ROW_EACH)


def read_group(file: Path, number: int, archive: tarfile.TarFile, group: Iterator[tarfile.TarInfo], store: MediaStore) -> Found:
    """The row of a group, or the first problem of it."""
    row: dict[str, Any] | None = None
    images, texts, problems = dict[str, str](), list[str](), list[DataProblem]()
    for member in group:
        ending = split_member(member.name)[1]
        try:
            content = read_member(archive, member)
            if ending.rpartition(".")[2] in IMAGES:
                images[member.name] = str(store.keep(content))
            elif ending == "json":
                row = read_json(content)
            elif ending in TEXTS:
                texts.append(content.decode("utf-8-sig").strip())
            else:
                raise MemberFault(f"is not read: {READ}")
        except (ValueError, RecursionError) as error:
            reason = describe(error) if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
            problems.append(row_problem(file, number, f"{member.name} {reason}", "write this member again, or remove the group"))
    if not problems and row is None and not texts:
        problem = f"{next(iter(images), 'a group')} has neither a .json nor a .txt of the same name"
        problems.append(row_problem(file, number, problem, f"{READ}: add one of them, or remove the group"))
    return problems[0] if problems else (number, join_group(row or {}, images, texts))


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Raises MemberFault for a link or device, and for a member that is too large."""
    opened = archive.extractfile(member) if member.isfile() else None
    if opened is None:
        raise MemberFault("is not a file, but a link or a device")
    if member.size > MOST_BYTES:
        raise MemberFault(f"has {member.size:,} bytes, more than the limit of {MOST_BYTES:,}")
    return opened.read()


def read_json(content: bytes) -> dict[str, Any]:
    decoder = RowDecoder()
    row = decoder.decode(content.decode("utf-8-sig"))
    if decoder.repeated:
        raise MemberFault(f"has the key {decoder.repeated!r} twice, with different values")
    if not isinstance(row, dict):
        raise MemberFault("is not an object")
    return row


def join_group(row: dict[str, Any], images: dict[str, str], texts: list[str]) -> dict[str, Any]:
    """The row with the paths of its images, in the order of their names, and its text."""
    names = {last: path for name, path in images.items() for last in (name, name.rpartition("/")[2], split_member(name)[1])}
    joined = {key: replace_names(key, value, names) for key, value in row.items()}
    if images and joined == row and not any(row.get(key) for key in ("image", "images")):
        paths = [images[name] for name in sorted(images)]
        joined |= {"image": paths[0]} if len(paths) == 1 else {"images": paths}
    if texts and not any(joined.get(key) in texts for key in ("text", "caption")):
        joined["text"] = texts[0]
    return joined


def replace_names(key: str, value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value) if key in NAMING_KEYS else value
    if isinstance(value, list):
        return [replace_names(key, item, names) for item in value]
    return {inner: replace_names(inner, item, names) for inner, item in value.items()} if isinstance(value, dict) else value
