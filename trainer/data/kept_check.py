"""Results of data checks without problems, kept for later runs on the same files.

A result is valid while its key is the same: the code of the trainer, the versions of the packages that read images and texts, the options of
the data and of the model, and the content of the annotation files; and while the size, times and inode of every image and of every file of the
model's folder are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trainer
from trainer.contract import DataReport, DataSpec, LeftOutRow, SpecError, TrainSpec, decode, write_text
from trainer.data.kept_folder import kept_folder
from trainer.data.left_out import decode_rows
from trainer.data.length import source_of
from trainer.data.media.image import hash_file
from trainer.data.rows.row_check import missing_file
from trainer.data.sources.source import find_sources

FOLDER = "checks"
KEPT_ROWS = 100_000  # that are left out
KEPT = 20  # results; the oldest ones are removed
PACKAGES = ("pillow", "transformers", "tokenizers", "numpy")
OTHER_KEYS = ("root", "rows", "workers", "packing", "padding_free", "length_aware")  # of the data, which change no result


@dataclass(frozen=True, kw_only=True)
class KeptCheck:
    report: DataReport
    hashes: dict[Path, str]
    left_out: tuple[LeftOutRow, ...] = ()


def key_of_check(spec: TrainSpec, files: Mapping[Path, Path]) -> str:
    """`files`: annotation file -> the folder that its image paths start at. '' for what cannot be identified: a file that is missing, a model
    that only its hub knows."""
    model = source_of(spec)
    if model and not Path(model).is_dir():
        return ""
    options = {key: value for key, value in asdict(spec.data).items() if key not in OTHER_KEYS}
    sources = [(str(file), str(images), [str(source) for source in find_sources(file, images)[0]]) for file, images in files.items()]
    parts = dict.fromkeys((*files, *(source.file for file, images in files.items() for source in find_sources(file, images)[0])))
    try:
        contents = {str(part): hash_file(part) for part in parts}
        around = {str(path): mark_of(path) for path in sorted(Path(model).iterdir()) if path.is_file()} if model else {}
    except OSError:
        return ""
    named = (rules(), options, asdict(spec.model), asdict(spec.stage), sources, contents, around)
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def rules() -> str:
    """The hash of all code of the trainer, and the versions of packages."""
    digest, folder = hashlib.sha256(), Path(trainer.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}\0".encode())
    return digest.hexdigest()


def mark_of(path: Path) -> list[int]:
    """Changes with the file: one that replaced it has another inode or ctime, even with the same mtime. Raises OSError."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def find_check(data: DataSpec, key: str) -> KeptCheck | None:
    """The result of the check with this key, if all of its images are unchanged; None for a damaged one."""
    if not key:
        return None
    try:
        found = json.loads((kept_folder(data, FOLDER) / f"{key}.json").read_text(encoding="utf-8"))
        files: dict[str, list[Any]] = found["files"]
        if any(mark_of(Path(path)) != mark for path, (_, mark) in files.items()):
            return None
        if any(Path(path).exists() for path in found["missing"]):  # the image of a row that was left out is there now
            return None
        hashes = {Path(path): digest for path, (digest, _) in files.items()}
        return KeptCheck(report=decode(DataReport, found["report"]), hashes=hashes, left_out=decode_rows(found["left_out"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SpecError):
        return None


def keep_check(
    data: DataSpec, key: str, report: DataReport, hashes: Mapping[Path, str], left_out: Sequence[LeftOutRow] = (), *, began_ns: int
) -> None:
    """Not if a file has changed since the check began, nor if very many rows are left out. A failure is ignored: the data is checked again next
    time."""
    if not key or len(left_out) > KEPT_ROWS:
        return
    missing = sorted({path for row in left_out if (path := missing_file(row.reason))})
    rows = [asdict(row) for row in left_out]
    with suppress(OSError):
        files = {str(path): (digest, mark_of(path)) for path, digest in hashes.items()}
        if any(max(mark[1], mark[2]) >= began_ns for _, mark in files.values()):
            return
        folder = kept_folder(data, FOLDER)
        write_text(
            json.dumps({"report": asdict(report), "files": files, "left_out": rows, "missing": missing}, ensure_ascii=False) + "\n",
            folder / f"{key}.json",
        )
        for old in sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)[KEPT:]:
            old.unlink(missing_ok=True)
