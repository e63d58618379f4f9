"""The files of rows in a folder or of a glob. Which rows they hold is not looked at.

A folder is one of: the files of rows in it; what `datasets` saved with save_to_disk (state.json, dataset_dict.json); an imagefolder (metadata.jsonl
or metadata.csv beside the images); a copy of a hub's repository, in which the name of a file or of its folder has the name of its split
(huggingface/datasets: src/datasets/arrow_dataset.py, packaged_modules/folder_based_builder, data_files.py).
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.contract.listing import list_some

# Suffix -> kind. The files of a set are of one kind.
KINDS = {
    **{".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON"},
    **{".csv": "CSV", ".tsv": "CSV", ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"},
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
STATE, SPLITS = "state.json", "dataset_dict.json"
# JSON files that describe data or a model, and have no rows.
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "config.json", STATE, SPLITS, "fetched_images.json"})
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HELD_OUT = ("validation", "test")  # what data.evaluation takes of a folder, the first that there is
BETWEEN = "-._ 0-9"
SPLIT_NAMES = {split: re.compile(rf"(?:^|[{BETWEEN}])(?:{'|'.join(words)})(?:[{BETWEEN}]|$)") for split, words in WORDS.items()}
MOST_NAMES = 8
WILD = re.compile(r"[*?\[]")


class NotFound(Exception):
    """`problem` begins with a verb: the subject is what was looked at."""

    def __init__(self, *, problem: str, fix: str) -> None:
        super().__init__(f"{problem}\n    {fix}")
        self.problem, self.fix = problem, fix


def kind_of(path: Path) -> str:
    """By the ending of the name, without that of the compression: `rows.jsonl.gz`; '' for no file of rows."""
    name = Path(path.name.lower())
    return KINDS.get(Path(name.stem).suffix if name.suffix in COMPRESSED else ".tar" if name.suffix == ".tgz" else name.suffix, "")


def is_row_file(path: Path) -> bool:
    return bool(kind_of(path)) and path.name not in DESCRIPTIONS and not path.name.startswith(".")


def find_in_glob(pattern: str) -> tuple[Path, ...]:
    """The files that match, sorted. Raises NotFound."""
    root, rest = split_glob(pattern)
    found = sorted(path for path in root.glob(rest) if path.is_file() and not path.name.startswith("."))
    files = [path for path in found if is_row_file(path)]
    if files:
        return of_one_kind(files)
    if found:
        raise NotFound(problem=f"matches no file of rows, but {name_all(found, root)}", fix=name_kinds())
    near = f"{root} has {name_all(root.iterdir(), root) or 'no file'}" if root.is_dir() else f"there is no folder {root}"
    raise NotFound(problem=f"matches nothing; {near}", fix="correct the pattern, and quote it so that the shell leaves it alone")


def split_glob(pattern: str) -> tuple[Path, str]:
    """The folder before the first part with a wildcard, and the pattern below it."""
    parts = Path(pattern).parts
    first = next((place for place, part in enumerate(parts) if WILD.search(part)), len(parts))
    return Path(*parts[:first]), "/".join(parts[first:])


def is_glob(text: str) -> bool:
    return bool(WILD.search(text))


def find_in_folder(folder: Path, splits: Sequence[str], subset: str = "") -> tuple[Path, ...]:
    """The files of rows of the first split in `splits` that the folder has, sorted; of a folder that names no splits, all. `subset`: of a
    repository. Raises NotFound."""
    if subset:
        folder = find_subset(folder, subset)
    if (folder / SPLITS).is_file():
        return find_in_folder(folder / choose_split(folder, read_splits(folder), splits), splits)
    if (folder / STATE).is_file() and (files := read_state(folder)):
        return files
    if metadata := next((path for name in METADATA if (path := folder / name).is_file()), None):
        return (metadata,)
    files = list_row_files(folder)
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(split_of(path.relative_to(folder)), []).append(path)
    unnamed = by_split.pop("", [])
    if not by_split:
        return of_one_kind(unnamed)
    if unnamed:
        named = [path for paths in by_split.values() for path in paths]
        problem = f"has files of a split ({name_all(named, folder)}) and others ({name_all(unnamed, folder)})"
        raise NotFound(problem=problem, fix="name the files, as a list or a glob")
    return of_one_kind(by_split[choose_split(folder, tuple(by_split), splits)])


def list_row_files(folder: Path) -> tuple[Path, ...]:
    """The files of rows in the folder, or else in the folders below it. Raises NotFound if there is none."""
    direct = sorted(path for path in folder.iterdir() if path.is_file() and is_row_file(path))
    files = direct or sorted(path for path in folder.rglob("*") if is_row_file(path) and path.is_file() and not is_hidden(path, folder))
    inner = {path.parent: path for path in files if path.name in METADATA}
    files = [path for path in files if path.parent not in inner or path == inner[path.parent]]
    if not files:
        there = name_all(folder.iterdir(), folder)
        raise NotFound(problem=f"is a folder without a file of rows; it has {there or 'nothing'}", fix=name_kinds())
    return tuple(files)


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def of_one_kind(files: Sequence[Path]) -> tuple[Path, ...]:
    kinds: dict[str, Path] = {}
    for path in files:
        kinds.setdefault(kind_of(path), path)
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} ({path.name})" for kind, path in kinds.items())
        raise NotFound(
            problem=f"has files of several kinds: {shown}", fix="name those of one kind with a glob, as in data.train='FOLDER/*.json'"
        )
    return tuple(files)


def split_of(path: Path) -> str:
    """'train', 'validation' or 'test' by the name of the file, else by those of its folders; '' for none."""
    for name in (path.stem, *reversed(path.parent.parts)):
        found = next((split for split, pattern in SPLIT_NAMES.items() if pattern.search(name.lower())), "")
        if found:
            return found
    return ""


def choose_split(folder: Path, present: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise NotFound(
        problem=f"has no split {' or '.join(wanted)}; it has {', '.join(present)}", fix="name the files of the split that is meant"
    )


def find_subset(folder: Path, subset: str) -> Path:
    for below in (folder / subset, folder / "data" / subset):
        if below.is_dir():
            return below
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    raise NotFound(
        problem=f"has no subset {subset!r}; its folders are {', '.join(there) or 'none'}", fix="name one of them after the colon"
    )


def list_subsets(folder: Path) -> tuple[str, ...]:
    """The folders of a repository that are subsets: each has files of rows, and its name is no split; () if files lie above them."""
    if any(is_row_file(path) for path in folder.iterdir() if path.is_file()) or any((folder / name).is_file() for name in (STATE, SPLITS)):
        return ()
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".") and path.name != "data"]
    return tuple(path.name for path in below if not split_of(Path(path.name)) and any(map(is_row_file, path.rglob("*"))))


def read_splits(folder: Path) -> tuple[str, ...]:
    names = read_json(folder / SPLITS).get("splits")
    return tuple(str(name) for name in names if (folder / str(name)).is_dir()) if isinstance(names, list) else ()


def read_state(folder: Path) -> tuple[Path, ...]:
    """The shards in the order of state.json; () if it is not of `datasets`. Raises NotFound for one that is missing."""
    listed = read_json(folder / STATE).get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(item, dict) and isinstance(item.get("filename"), str) for item in listed):
        return ()
    files = tuple(folder / Path(item["filename"]).name for item in listed)
    if missing := [path.name for path in files if not path.is_file()]:
        raise NotFound(problem=f"lacks {list_some(missing, MOST_NAMES)}, which its {STATE} lists", fix="copy the whole folder again")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """{} for what is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def name_all(paths: Iterable[Path], folder: Path) -> str:
    names = sorted(path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in paths if not path.name.startswith("."))
    return list_some(names, MOST_NAMES)


def name_kinds() -> str:
    return f"files of rows end in {', '.join(KINDS)}"
