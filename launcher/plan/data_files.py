"""data.train and data.evaluation as the trainer is given them, and what a container needs of them. Which files they are is looked up on the nodes;
`launcher.plan.rows` looks for them on this machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from launcher.config.schema import Config, Data
from trainer.contract import Entries
from trainer.contract.row_sets.hub_copy import REPOSITORY
from trainer.contract.row_sets.row_files import is_glob, split_glob
from trainer.contract.row_sets.row_set import as_entries, is_name, read_samples_mark
from trainer.contract.row_sets.selection import Choice, read_split

Absolute = Callable[[str], str]


def choice_of(data: Data) -> Choice:
    return Choice(max_samples=data.max_samples, split=read_split(data.evaluation), mixing=data.mixing, mixing_stop=data.mixing_stop)


def spec_files(config: Config, absolute: Absolute) -> dict[str, Any]:
    """The keys of trainer.contract.DataSpec that say which rows are meant. `absolute`: of a path that the user gives."""
    data, split = config.data, read_split(config.data.evaluation)
    seed = config.run.seed if data.split_seed is None and chooses(data) else data.split_seed or 0
    return {
        "train": spec_entries(data.train, absolute),
        "evaluation": "" if split else spec_entries(data.evaluation, absolute),
        "split": split,
        "split_seed": seed,
        **{name: absolute(path) if (path := getattr(data, name)) else "" for name in ("images", "info", "mirror")},
        **{name: getattr(data, name) for name in ("max_samples", "mixing", "mixing_stop")},
    }


def chooses(data: Data) -> bool:
    """Whether a seed may choose rows: those of a split, or the samples of an entry, which a dataset_info.json may ask for too."""
    drawn = (entry.samples or read_samples_mark(entry.file)[1] or is_name(entry.file) for entry in as_entries(data.train))
    return bool(read_split(data.evaluation)) or any(drawn)


def spec_entries(entries: Entries, absolute: Absolute) -> Entries:
    if isinstance(entries, str):
        return spec_file(entries, absolute)
    given = ((entry, entry.images and absolute(entry.images)) for entry in entries)
    return tuple(replace(entry, file=spec_file(entry.file, absolute), images=images) for entry, images in given)


def spec_file(text: str, absolute: Absolute) -> str:
    """The absolute path; the name of a data set as it is."""
    return text if not text or is_name(text) else absolute(text)


def folders_of(entries: Entries) -> tuple[str, ...]:
    """What a container needs of the paths in data.train or data.evaluation. A file is mounted with its folder, since a dataset_info.json beside it
    counts, and image paths start there without data.images."""
    named = ((read_samples_mark(entry.file)[0], entry.images) for entry in as_entries(entries))
    return tuple(path for text, images in named for path in (folder_of(text) if text.startswith("/") else "", images) if path)


def folder_of(path: str) -> str:
    """A folder; that of a file of rows; of a glob the one before its wildcards; of a copy of a hub's data set the one with the files that its links
    lead to."""
    pure = PurePosixPath(str(split_glob(path)[0]) if is_glob(path) else path)
    repository = next((place for place, part in enumerate(pure.parts) if part.startswith(REPOSITORY)), None)
    if repository is not None:
        return str(PurePosixPath(*pure.parts[: repository + 1]))
    is_file = not is_glob(path) and bool(pure.suffix) and pure.parent != pure.parent.parent
    return str(pure.parent if is_file else pure)
