"""The sets of rows that data.train or data.evaluation names, as files on this machine. The launcher counts the rows of these files, the trainer
reads them; nothing is downloaded.

An entry is a file, a glob, a folder (trainer.contract.row_sets.row_files), a name in a dataset_info.json (trainer.contract.row_sets.data_set_info), or that of a
hub's data set with a copy here (trainer.contract.row_sets.hub_copy). NAME:SUBSET and NAME#500, 500 rows that are drawn from it, are those of ms-swift
(modelscope/ms-swift: swift/llm/dataset/loader.py, DatasetSyntax).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.contract.listing import list_some
from trainer.contract.row_sets.data_set_info import INFO_FILE, InfoEntry, choose_subsets, find_named, list_names
from trainer.contract.row_sets.hub_copy import HubName, find_copy, read_name, tell_commands
from trainer.contract.row_sets.row_files import HELD_OUT, NotFound, find_in_folder, find_in_glob, is_glob, list_subsets
from trainer.contract.rows import DataProblem
from trainer.contract.spec import DataEntry, Entries

MOST_NAMES = 12
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ENDING = re.compile(r"\.[A-Za-z]{2,7}$")  # of the name of a file: no data set is called rows.jsonl or rows.txt


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """`name`: as it is written. `files`: of one kind. `images`: the folder that image paths start at, None = that of each file. `samples`, `repeat`,
    `weight`: as of trainer.contract.DataEntry. `info`: the data set of a dataset_info.json that says how the keys of its rows are named."""

    name: str
    files: tuple[Path, ...]
    images: Path | None = None
    samples: int = 0
    repeat: float = 1.0
    weight: float | None = None
    info: InfoEntry | None = None


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where names are looked up. `root`: relative paths start there. `images`: data.images, None where it is empty. `infos`: files with names.
    `copies`: folders with copies of a hub's data sets, beside the caches that `environ` names. `splits`: of a folder that has several."""

    root: Path
    images: Path | None = None
    infos: tuple[Path, ...] = ()
    copies: tuple[Path, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train",)


def as_entries(entries: Entries) -> tuple[DataEntry, ...]:
    return entries if isinstance(entries, tuple) else (DataEntry(file=entries),) if entries else ()


def describe_entries(entries: Entries) -> str:
    """The entries as a text of one line."""
    return entries if isinstance(entries, str) else list_some([entry.file for entry in entries], 3)


def make_places(data_root: str, images: str, info: str, mirror: str, environ: Mapping[str, str], *, held_out: bool) -> Places:
    """For the options of the data of a run. data.info is a dataset_info.json or its folder."""
    root = Path(data_root)
    given = (root / info / INFO_FILE if (root / info).is_dir() else root / info,) if info else ()
    return Places(
        root=root,
        images=root / images if images else None,
        infos=given or tuple(file for file in (root / INFO_FILE, root / "data" / INFO_FILE) if file.is_file()),
        copies=(*((root / mirror,) if mirror else ()), root),
        environ=environ,
        splits=HELD_OUT if held_out else ("train",),
    )


def find_sets(entries: Entries, places: Places) -> tuple[tuple[RowSet, ...], tuple[DataProblem, ...]]:
    """A file that does not exist is a set; reading it reports the problem."""
    found: list[RowSet] = []
    problems: list[DataProblem] = []
    for entry in as_entries(entries):
        try:
            found += find_entry(entry, places)
        except NotFound as error:
            problems.append(DataProblem(file=entry.file, row=0, field="", problem=error.problem, fix=error.fix))
        except OSError as error:
            fix = "correct the path, or the permissions"
            problems.append(DataProblem(file=entry.file, row=0, field="", problem=f"cannot be read: {error.strerror}", fix=fix))
    return tuple(found), tuple(problems)


def find_entry(entry: DataEntry, places: Places) -> Iterator[RowSet]:
    """Raises NotFound, OSError."""
    text, samples = split_samples(entry.file, places.root)
    images = places.root / entry.images if entry.images else places.images
    given = RowSet(name=entry.file, files=(), images=images, samples=entry.samples or samples, repeat=entry.repeat, weight=entry.weight)
    path = places.root / text
    if path.is_dir():
        yield replace(given, files=find_in_folder(path, places.splits))
    elif path.exists() or not (is_glob(text) or is_name(text)):
        yield replace(given, files=(path,))
    elif is_glob(text):
        yield replace(given, files=find_in_glob(str(path)))
    else:
        yield from find_by_name(text, given, places)


def split_samples(text: str, root: Path) -> tuple[str, int]:
    """`name#500` -> ('name', 500); a file with such a name is what it is."""
    name, samples = read_samples_mark(text)
    return (name, samples) if samples and not (root / text).exists() else (text, 0)


def read_samples_mark(text: str) -> tuple[str, int]:
    name, mark, number = text.rpartition("#")
    return (name, int(number)) if mark and number.isdecimal() and int(number) else (text, 0)


def is_name(text: str) -> bool:
    """Whether a text may name a data set: by its form it is no path of a file or folder, and no glob."""
    text, _ = read_samples_mark(text)
    parts = text.rpartition("::")[2].partition(":")[0]
    return bool(NAME.fullmatch(parts)) and not ENDING.search(parts)


def find_by_name(text: str, given: RowSet, places: Places) -> Iterator[RowSet]:
    prefix, _, rest = text.rpartition("::")
    name, _, subsets = rest.partition(":")
    wanted = tuple(filter(None, subsets.split("/")))
    entry = find_named(text, places.infos) or find_named(name, places.infos)
    if entry is not None:
        given = replace(given, images=given.images or (entry.info.parent if entry.path else None), info=entry)
        given = replace(given, samples=given.samples or entry.samples)
        for subset in choose_subsets(entry, wanted):
            yield replace(given, files=find_of_info(entry, subset, places))
        return
    named = read_name(f"{prefix}::{name}" if prefix else name)
    if named is None:
        known = list_names(places.infos)
        listed = (
            f"{', '.join(map(str, places.infos))} has {list_some(known, MOST_NAMES)}"
            if places.infos
            else f"no {INFO_FILE} is in {places.root}"
        )
        fix = "name a file, a folder, or a data set of data.info=FOLDER, which has a dataset_info.json"
        raise NotFound(problem=f"is neither a file nor a folder of {places.root}, and no data set of that name is known: {listed}", fix=fix)
    for subset in wanted or ("",):
        yield replace(given, files=find_of_hub((named,), subset, places.splits, places))


def find_of_info(entry: InfoEntry, subset: str, places: Places) -> tuple[Path, ...]:
    """Raises NotFound."""
    if entry.hub_names:
        named = tuple(HubName(hub=hub, name=name) for hub, name in entry.hub_names)
        return find_of_hub(named, subset or str(entry.content.get("folder") or ""), entry.splits, places)
    path = entry.path
    if path is None:
        what = "script_url: a script is never run" if "script_url" in entry.content else "no file_name"
        fix = f"write its rows to a file, and name that as file_name in {entry.info}"
        raise NotFound(problem=f"has {what} in {entry.info}", fix=fix)
    if path.is_dir():
        return find_in_folder(path, entry.splits, subset)
    if not path.is_file():
        raise NotFound(problem=f"is {path} in {entry.info}, which is not there", fix="copy the file there, or correct file_name")
    return (path,)


def find_of_hub(named: tuple[HubName, ...], subset: str, splits: tuple[str, ...], places: Places) -> tuple[Path, ...]:
    """Raises NotFound."""
    folder = next((found for each in named if (found := find_copy(each, places.copies, places.environ))), None)
    if folder is None:
        target = places.copies[0] if places.copies else places.root
        commands = ", or ".join(tell_commands(each, str(target)) for each in named)
        problem = f"is no file or folder of {places.root}, and no copy of a hub's data set {named[0].name} is on this machine"
        raise NotFound(
            problem=problem, fix=f"data sets are read from local copies only. Make one: {commands}; with data.mirror={target} it is found"
        )
    if not subset and (subsets := list_subsets(folder)):
        fix = f"write {named[0].name}:{subsets[0]}; for several {named[0].name}:{'/'.join(subsets[:2])}"
        raise NotFound(problem=f"has the subsets {list_some(subsets, MOST_NAMES)} in {folder}", fix=fix)
    return find_in_folder(folder, splits, subset)
