"""The annotation files of a data set: the file itself, or those that an InternVL meta file lists.

    {"name": {"root": "images", "annotation": "rows.jsonl", "repeat_time": 2, "data_augment": false, "length": 1000}, ...}

OpenGVLab/InternVL: internvl_chat/internvl/train/internvl_chat_finetune.py. `annotation` is relative to
the folder of the meta file; `root` too, or relative to data.images if that is set.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem, DataSpec
from trainer.contract.annotation_file import read_meta
from trainer.contract.row_sets.data_set_info import InfoEntry
from trainer.data.media.image import hash_file
from trainer.data.media.store import MediaStore
from trainer.data.rows.parsed_row import Row, keys_of, kind, quote
from trainer.data.rows.row_rules import DEFAULT, RowRules
from trainer.data.sources.column_map import Columns, find_columns

AUGMENTED = "its images change at random where InternVL trains, by the quality of a JPEG"
TILES = "the most tiles of an image are an option of the run, the same for all sets"


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """One annotation file. `images`: the folder that its image paths start at. `repeat`: how often its rows are used; below 1 the first part of
    them. `columns`: other names of its keys. `rules`: how its rows are read. `store`: for images that are not files."""

    file: Path
    images: Path
    repeat: float = 1.0
    columns: Columns | None = None
    rules: RowRules = DEFAULT
    name: str = ""  # in the meta file
    store: MediaStore = field(default_factory=MediaStore)


def find_sources(
    file: Path, images: Path, rules: RowRules = DEFAULT, info: InfoEntry | None = None, data: DataSpec | None = None
) -> tuple[tuple[AnnotationSource, ...], tuple[DataProblem, ...]]:
    """The sources, and the problems of the meta file or dataset_info.json. An unreadable file is a source; reading it reports the problem. `info`: the
    data set whose names of keys count, where the file was found by its name. `data`: options that a meta file may ask for."""
    meta = read_meta(file)
    if meta is None:
        columns, problems = find_columns(file, info)
        return (AnnotationSource(file=file, images=images, columns=columns, rules=rules),), problems
    sources: list[AnnotationSource] = []
    found: list[DataProblem] = []
    for name, entry in meta.items():
        wrong = [
            DataProblem(file=str(file), row=0, field=f"{name}{key}", problem=problem, fix=fix)
            for key, problem, fix in find_entry_faults(entry, data)
        ]
        found += wrong
        if not wrong:
            annotation = file.parent / entry["annotation"]
            columns, problems = find_columns(annotation)
            found += problems
            root = images / entry.get("root", "")
            repeat = entry.get("repeat_time", 1)
            sources.append(AnnotationSource(file=annotation, images=root, repeat=repeat, columns=columns, rules=rules, name=name))
    return tuple(sources), tuple(found)


def find_entry_faults(entry: Any, data: DataSpec | None = None) -> list[tuple[str, str, str]]:
    """(key with a leading dot, problem, fix) for an entry of a meta file."""
    if not isinstance(entry, dict):
        return [("", f"is {kind(entry)}, not an object", 'give it "root", "annotation" and "repeat_time"')]
    if not isinstance(entry.get("annotation"), str) or not entry["annotation"]:
        return [("", f"has no annotation file; its keys are {keys_of(entry)}", 'add "annotation": the path of the file with its rows')]
    return [*find_number_faults(entry), *find_unread(entry, data)]


def find_number_faults(entry: Row) -> list[tuple[str, str, str]]:
    repeat, faults = entry.get("repeat_time", 1), []
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < 1e6 or (repeat > 1 and repeat != int(repeat)):
        faults.append((".repeat_time", f"is {quote(repeat)}", "write a whole number from 1, or a fraction between 0 and 1"))
    if not isinstance(entry.get("root", ""), str):
        faults.append((".root", f"is {kind(entry['root'])}, not a path", "write the folder that its image paths start at"))
    return faults


def find_unread(entry: Row, data: DataSpec | None) -> Iterator[tuple[str, str, str]]:
    """What would change the training, and the options of the run do not do: `data_augment`, and the tiles of one set. InternVL reads no other key;
    its conv_style is an option of its script."""
    augment, tiles = entry.get("data_augment"), entry.get("max_dynamic_patch")
    if augment not in (None, False) and not (data and data.augmentation.jpeg):
        yield (
            ".data_augment",
            f"{quote(augment)}: {AUGMENTED}",
            "set data.augmentation.jpeg=75, which is for the images of all sets, or set it to false",
        )
    if tiles is not None and not (data and data.max_tiles == tiles):
        valid = isinstance(tiles, int) and tiles > 0
        yield ".max_dynamic_patch", f"{quote(tiles)}: {TILES}", f"set data.max_tiles={tiles}, or remove it" if valid else "remove it"


def hash_sources(file: Path, images: Path, hash_of: Callable[[Path], str] = hash_file) -> str:
    """SHA-256 of an annotation file. For a meta file, over it and all files that it lists; with other names of keys, also over these. `hash_of`: of
    one file. Raises OSError."""
    return hash_files((file,), find_sources(file, images)[0], hash_of)


def hash_files(
    listing: Sequence[Path], sources: Sequence[AnnotationSource], hash_of: Callable[[Path], str] = hash_file, chosen: str = ""
) -> str:
    """The same of several sources. `listing`: the file of rows itself, or those that list the files. `chosen`: the options that choose rows. Raises
    OSError."""
    columns = [str(source.columns) for source in sources if source.columns is not None]
    files = [source.file for source in sources]
    if len(files) == 1 and list(listing) == files and not columns and not chosen:
        return hash_of(files[0])
    return hashlib.sha256("".join([*(hash_of(part) for part in (*listing, *files)), *columns, chosen]).encode()).hexdigest()
