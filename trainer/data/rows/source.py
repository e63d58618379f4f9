"""Which annotation files a path stands for: itself, or those that an InternVL meta file lists.

    {"name": {"root": "images", "annotation": "rows.jsonl", "repeat_time": 2, "data_augment": false, "length": 1000}, ...}

OpenGVLab/InternVL: internvl_chat/internvl/train/internvl_chat_finetune.py. Both paths are looked up below the meta file's folder, `root`
below data.images where that is set.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.data.media.image import hash_file
from trainer.data.rows.column import Columns, find_columns
from trainer.data.rows.parsed_row import Row, keys_of, kind

META_BYTES = 8 * 2**20  # a meta file lists some hundred sets; a larger file is rows
# Keys that change what is trained on, and what they may say here.
UNREAD = {
    "data_augment": ((None, False), "images are trained on as they are", "set it to false"),
    "max_dynamic_patch": ((None,), "it is one number for all sets here", "take it out, and set data.max_tiles"),
}


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """One annotation file, the folder that its image paths start from, how often its rows count (< 1: the first ones alone), and what its
    keys are called where they have names of their own."""

    file: Path
    images: Path
    repeat: float = 1.0
    columns: Columns | None = None


def find_sources(file: Path, images: Path) -> tuple[tuple[AnnotationSource, ...], tuple[DataProblem, ...]]:
    """The sources and all problems of the files that name them. A file that cannot be read is a source: its reading says why."""
    meta = read_meta(file)
    if meta is None:
        columns, problems = find_columns(file)
        return (AnnotationSource(file=file, images=images, columns=columns),), problems
    sources: list[AnnotationSource] = []
    found: list[DataProblem] = []
    for name, entry in meta.items():
        wrong = [DataProblem(file=str(file), row=0, field=f"{name}{key}", problem=said, fix=fix) for key, said, fix in find_faults(entry)]
        found += wrong
        if not wrong:
            annotation = file.parent / entry["annotation"]
            columns, problems = find_columns(annotation)
            found += problems
            root = images / entry.get("root", "")
            sources.append(AnnotationSource(file=annotation, images=root, repeat=entry.get("repeat_time", 1), columns=columns))
    return tuple(sources), tuple(found)


def read_meta(file: Path) -> dict[str, Any] | None:
    """None for anything else: rows, no JSON, a file that is not there."""
    try:
        if file.stat().st_size > META_BYTES:
            return None
        with file.open("rb") as opened:
            if opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
                return None
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    is_meta = isinstance(content, dict) and any(isinstance(entry, dict) and "annotation" in entry for entry in content.values())
    return content if is_meta else None


def find_faults(entry: Any) -> list[tuple[str, str, str]]:
    """(key with a dot in front, problem, fix) of a meta file's entry."""
    if not isinstance(entry, dict):
        return [("", f"is {kind(entry)}, not an object", 'give it "root", "annotation" and "repeat_time"')]
    if not isinstance(entry.get("annotation"), str) or not entry["annotation"]:
        return [("", f"names no annotation file; its keys are {keys_of(entry)}", 'give it "annotation": the path of its rows')]
    return [*find_number_faults(entry), *find_unread(entry)]


def find_number_faults(entry: Row) -> list[tuple[str, str, str]]:
    repeat, faults = entry.get("repeat_time", 1), []
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < 1e6 or (repeat > 1 and repeat != int(repeat)):
        faults.append((".repeat_time", f"{repeat!r} is no share and no count", "write how often its rows count, or a share below 1"))
    if not isinstance(entry.get("root", ""), str):
        faults.append((".root", f"is {kind(entry['root'])}, not a path", "give the folder that its image paths start from"))
    return faults


def find_unread(entry: Row) -> list[tuple[str, str, str]]:
    return [(f".{key}", f"{entry[key]!r}: {why}", fix) for key, (valid, why, fix) in UNREAD.items() if entry.get(key) not in valid]


def hash_sources(file: Path, images: Path) -> str:
    """SHA-256 of an annotation file; of a meta file, over it and all that it lists; and over the other names of keys, where there are any.
    Raises OSError."""
    sources, _ = find_sources(file, images)
    columns = [str(source.columns) for source in sources if source.columns is not None]
    if [source.file for source in sources] == [file] and not columns:
        return hash_file(file)
    parts = (file, *(source.file for source in sources))
    return hashlib.sha256("".join([*(hash_file(part) for part in parts), *columns]).encode()).hexdigest()
