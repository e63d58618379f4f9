"""The annotation files of a data set: the file itself, or those that an InternVL meta file lists.

    {"name": {"root": "images", "annotation": "rows.jsonl", "repeat_time": 2, "data_augment": false, "length": 1000}, ...}

OpenGVLab/InternVL: internvl_chat/internvl/train/internvl_chat_finetune.py. `annotation` is relative to
the folder of the meta file; `root` too, or relative to data.images if that is set.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.contract.annotation_file import read_meta
from trainer.data.media.image import hash_file
from trainer.data.rows.parsed_row import Row, keys_of, kind, quote
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.sources.column_map import Columns, find_columns

# Keys that would change the training: the values that are allowed, why, and the fix.
UNREAD = {
    "data_augment": ((None, False), "data augmentation is not supported", "set it to false"),
    "max_dynamic_patch": ((None,), "a value for a single data set is not supported", "remove it, and set data.max_tiles"),
}


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """One annotation file. `images`: the folder that its image paths start at. `repeat`: how often its rows are used; below 1 the first part of
    them. `columns`: other names of its keys. `rules`: how its rows are read."""

    file: Path
    images: Path
    repeat: float = 1.0
    columns: Columns | None = None
    rules: RowRules = DEFAULT


def find_sources(file: Path, images: Path, rules: RowRules = DEFAULT) -> tuple[tuple[AnnotationSource, ...], tuple[DataProblem, ...]]:
    """The sources, and the problems of the meta file or dataset_info.json. An unreadable file is a source; reading it reports the problem."""
    meta = read_meta(file)
    if meta is None:
        columns, problems = find_columns(file)
        return (AnnotationSource(file=file, images=images, columns=columns, rules=rules),), problems
    sources: list[AnnotationSource] = []
    found: list[DataProblem] = []
    for name, entry in meta.items():
        wrong = [
            DataProblem(file=str(file), row=0, field=f"{name}{key}", problem=problem, fix=fix)
            for key, problem, fix in find_entry_faults(entry)
        ]
        found += wrong
        if not wrong:
            annotation = file.parent / entry["annotation"]
            columns, problems = find_columns(annotation)
            found += problems
            root = images / entry.get("root", "")
            repeat = entry.get("repeat_time", 1)
            sources.append(AnnotationSource(file=annotation, images=root, repeat=repeat, columns=columns, rules=rules))
    return tuple(sources), tuple(found)


def find_entry_faults(entry: Any) -> list[tuple[str, str, str]]:
    """(key with a leading dot, problem, fix) for an entry of a meta file."""
    if not isinstance(entry, dict):
        return [("", f"is {kind(entry)}, not an object", 'give it "root", "annotation" and "repeat_time"')]
    if not isinstance(entry.get("annotation"), str) or not entry["annotation"]:
        return [("", f"has no annotation file; its keys are {keys_of(entry)}", 'add "annotation": the path of the file with its rows')]
    return [*find_number_faults(entry), *find_unread(entry)]


def find_number_faults(entry: Row) -> list[tuple[str, str, str]]:
    repeat, faults = entry.get("repeat_time", 1), []
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < 1e6 or (repeat > 1 and repeat != int(repeat)):
        faults.append((".repeat_time", f"is {quote(repeat)}", "write a whole number from 1, or a fraction between 0 and 1"))
    if not isinstance(entry.get("root", ""), str):
        faults.append((".root", f"is {kind(entry['root'])}, not a path", "write the folder that its image paths start at"))
    return faults


def find_unread(entry: Row) -> list[tuple[str, str, str]]:
    return [(f".{key}", f"{quote(entry[key])}: {why}", fix) for key, (valid, why, fix) in UNREAD.items() if entry.get(key) not in valid]


def hash_sources(file: Path, images: Path, hash_of: Callable[[Path], str] = hash_file) -> str:
    """SHA-256 of an annotation file. For a meta file, over it and all files that it lists; with other names of keys, also over these. `hash_of`: of
    one file. Raises OSError."""
    sources, _ = find_sources(file, images)
    columns = [str(source.columns) for source in sources if source.columns is not None]
    if [source.file for source in sources] == [file] and not columns:
        return hash_of(file)
    parts = (file, *(source.file for source in sources))
    return hashlib.sha256("".join([*(hash_of(part) for part in parts), *columns]).encode()).hexdigest()
