"""The rows to train on, counted on this machine, and the steps that run.epochs stands for.

A row is counted as trainer.data.rows reads it (launcher.plan.data.row_count), each conversation of a list in it, and the files of an InternVL meta file
as often as it says.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.check.problem import Problem
from launcher.config.defaults import EPOCHS, count_steps, keys_of, with_short_warmup
from launcher.config.schema import Config, Data
from launcher.errors import ConfigRefused, suggest
from launcher.plan.data.row_count import UNREADABLE, count_of
from trainer.contract import DataEntry, DataProblem, Entries
from trainer.contract.annotation_file import read_meta
from trainer.contract.row_file import BY_SUFFIX, COMPRESSED, suffix_of
from trainer.contract.row_sets.data_set_info import entries_of_file
from trainer.contract.row_sets.hub_copy import REPOSITORY, find_repository, read_name
from trainer.contract.row_sets.row_files import is_glob, split_glob
from trainer.contract.row_sets.row_set import (
    Places,
    RowSet,
    as_entries,
    describe_entries,
    find_sets,
    is_name,
    make_places,
    read_samples_mark,
    split_samples,
)
from trainer.contract.row_sets.selection import CannotSelect, Choice, SetSize, count_selected, read_split

BUILTIN_ROWS = 1500  # that train, of each of the built-in sets (trainer.data.digits.TRAIN_ROWS)
QUICK_BYTES = 64 * 2**20  # counted in a second, also where no epochs are asked for
MOST_EPOCHS = 10**6
Absolute = Callable[[str], str]


def settle_rows(config: Config, typed: Set[str], here: Path) -> Config:
    """The config with the rows that were counted and, with run.epochs, the steps. `here`: the folder that relative paths start in. Raises
    ConfigRefused for epochs of rows that cannot be counted, and for another number than data.rows."""
    if config.stage.kind != "train":
        return config
    if not config.data.builtin and config.data.train:
        config = replace(config, data=replace(config.data, rows=find_rows(config, here)))
    return with_short_warmup(with_steps(config, here), typed)


def with_data_files(config: Config, here: Path, environ: Mapping[str, str]) -> Config:
    """The config with what this machine has of the names in data.train and data.evaluation, for a run on it: the dataset_info.json that has them, and
    the folder with the copies of a hub's data sets. A name that is a path here is written as one."""
    data = config.data
    if data.builtin or not config.cluster.is_local:
        return config
    train, evaluation = (as_paths(entries, here) for entries in (data.train, data.evaluation))
    data = replace(data, train=train, evaluation=evaluation)
    entries = [entry for side in (train, evaluation) for entry in as_entries(side)]
    data = replace(data, info=data.info or find_info(data, entries, here, environ))
    return replace(config, data=replace(data, mirror=data.mirror or find_mirror(entries, environ)))


def as_paths(entries: Entries, here: Path) -> Entries:
    if isinstance(entries, str):
        return f"./{entries}" if entries and is_name(entries) and (here / split_samples(entries, here)[0]).exists() else entries
    return tuple(replace(entry, file=str(as_paths(entry.file, here))) for entry in entries)


def find_info(data: Data, entries: Sequence[DataEntry], here: Path, environ: Mapping[str, str]) -> str:
    """The dataset_info.json for the names; else the one above a file of rows that lists it. '' for none."""
    if any(is_name(entry.file) for entry in entries):
        return next(map(str, local_places(data, here, environ).infos), "")
    files = [here / entry.file for entry in entries if (here / entry.file).is_file()]
    found = ((file, entries_of_file(file)[1]) for file in files)
    return next((str(info) for file, info in found if info and info.parent != file.parent), "")


def find_mirror(entries: Sequence[DataEntry], environ: Mapping[str, str]) -> str:
    """The folder of a hub's data set, or of the cache with all of them; '' for none."""
    named = [name for entry in entries if (name := read_name(read_samples_mark(entry.file)[0].rpartition("::")[2].partition(":")[0]))]
    found = [folder for name in dict.fromkeys(named) if (folder := find_repository(name, environ))]
    return str(found[0] if len(found) == 1 else found[0].parent) if found else ""


def local_places(data: Data, here: Path, environ: Mapping[str, str], *, held_out: bool = False) -> Places:
    return make_places(str(here), data.images, data.info, data.mirror, environ, held_out=held_out)


def local_sets(config: Config, here: Path, side: str) -> tuple[tuple[RowSet, ...], tuple[DataProblem, ...]]:
    """The sets of data.train or data.evaluation on this machine, where `with_data_files` looked for them; none for a split. `side`: 'train' or 'evaluation'."""
    if side == "evaluation" and read_split(config.data.evaluation):
        return (), ()
    return find_sets(getattr(config.data, side), local_places(config.data, here, {}, held_out=side == "evaluation"))


def find_missing(config: Config, here: Path) -> tuple[Problem, ...]:
    """The files of the data that a run on this machine would not find. A plan may be made before they are there."""
    data, kind = config.data, config.stage.kind
    if data.builtin or not config.cluster.is_local or kind not in ("train", "evaluate", "quantize"):
        return ()
    missing: list[Problem] = []
    for side in ("train", "evaluation") if kind != "evaluate" or read_split(data.evaluation) else ("evaluation",):
        sets, problems = local_sets(config, here, side)
        absent = [f"there is no file {each.name}; {suggest_file(file)}" for each in sets for file in each.files if not file.is_file()]
        listed = [f"{problem.file} {problem.problem}; {problem.fix}" for problem in problems]
        missing += (
            Problem(key=f"data.{side}", what=f"{what}{ask_for_place(config, f'data.{side}')}", launch_only=True)
            for what in (*absent, *listed)
        )
    return tuple(missing)


def ask_for_place(config: Config, key: str) -> str:
    """What to type, for a file that the record of a checkpoint names."""
    recorded = config.stage.recorded
    if recorded is None or key not in keys_of(recorded.taken):
        return ""
    return f". It is from the record of run {recorded.run_id}: type data={config.data.name} {key}=FILE with its place now, or other data"


def with_steps(config: Config, here: Path) -> Config:
    """run.steps from run.epochs. A number out of range is left to the rules, which report it."""
    epochs, rows, batch = config.run.epochs, rows_of(config), config.stage.global_batch
    if epochs is None or not 0 < epochs <= MOST_EPOCHS or batch < 1:
        return config
    if not rows:
        raise ConfigRefused("\n".join(map(str, find_missing(config, here))) or ask_for_rows(config))
    return replace(config, run=replace(config.run, steps=count_steps(epochs, rows, batch)))


def leaves_rows_out(config: Config) -> bool:
    """Whether a run may use fewer rows than its file has, as DataSpec.leaves_rows_out."""
    return config.data.bad_rows == "skip" or config.data.too_long != "refuse"


def asks_for_usable_rows(config: Config, typed: Set[str], here: Path) -> bool:
    """Whether run.epochs counts rows of which only the data check knows how many are used, and it can be asked on this machine: rows may be left
    out, and rows that share an image are not divided by a split."""
    data = config.data
    known = data.builtin or "data.rows" in typed or config.stage.kind != "train" or config.run.epochs is None
    if known or not (leaves_rows_out(config) or read_split(data.evaluation)) or not config.cluster.is_local or not data.train:
        return False
    sets, problems = local_sets(config, here, "train")
    return not problems and all(file.is_file() for each in sets for file in each.files)


def rows_of(config: Config) -> int:
    """Rows of an epoch; 0 where they are not known."""
    return BUILTIN_ROWS if config.data.builtin else config.data.rows


def ask_for_rows(config: Config) -> str:
    where, name = ", ".join(node.host for node in config.cluster.working), describe_entries(config.data.train)
    where = where if not config.cluster.is_local else "this machine"
    return (
        f"{EPOCHS}={config.run.epochs:g} needs the number of rows of data.train={name}, and the file cannot be counted here; the "
        f"nodes of the run: {where}\n  Next: add data.rows=NUMBER ({count_with(name)} on the node; a launch refuses another number), or "
        "give run.steps instead"
    )


def count_with(file: str) -> str:
    """The command that counts the rows of a file, by its name."""
    quoted = shlex.quote(file)
    if suffix_of(Path(file)) in BY_SUFFIX or Path(file).suffix in COMPRESSED:
        return f"omnilaunch data check data=files data.train={quoted}"
    lines, items = f"wc -l {quoted}", f"jq length {quoted}"
    return lines if file.endswith(".jsonl") else f"{items}, or for JSON Lines {lines}"


def find_rows(config: Config, here: Path) -> int:
    """The number of rows to train on; that of data.rows, or 0, where the files are not on this machine or take long to read. Raises ConfigRefused
    for options that do not fit the rows."""
    data = config.data
    sets, problems = local_sets(config, here, "train")
    files = [file for each in sets for file in each.files]
    if problems or not files or not all(file.is_file() for file in files):
        return data.rows
    if config.run.epochs is None and sum(file.stat().st_size for file in files) > QUICK_BYTES:
        return data.rows
    counted = count_sets(sets, data)
    fits = data.rows == counted or (leaves_rows_out(config) and data.rows < counted)
    if (
        data.rows and counted and not fits and config.cluster.is_local and not read_split(data.evaluation)
    ):  # rows that share images are not divided
        name = describe_entries(data.train)
        raise ConfigRefused(f"data.rows={data.rows}: {name} has {counted:,} rows. Leave data.rows out: they are counted")
    return data.rows or counted


def is_named_as_rows(path: Path) -> bool:
    return suffix_of(path) in (*BY_SUFFIX, ".json", ".jsonl")


def count_sets(sets: Sequence[RowSet], data: Data) -> int:
    """The samples of an epoch; 0 for files that cannot be counted."""
    try:
        sizes = [size for each in sets for size in sizes_of(each)]
        known = all(size.rows for size in sizes)
        return sum(count.trained for count in count_selected(sizes, choice_of(data))) if known else 0
    except UNREADABLE:
        return 0
    except CannotSelect as error:
        raise ConfigRefused(str(error)) from error


def sizes_of(each: RowSet) -> list[SetSize]:
    """A meta file is as many sets as it lists. Raises what `count_of` raises."""
    meta = read_meta(each.files[0]) if len(each.files) == 1 else None
    if meta is None:
        rows = [count_of(file) for file in each.files]
        whole = sum(rows) if all(rows) else 0
        return [SetSize(name=each.name, rows=whole, samples=each.samples, repeat=each.repeat, weight=each.weight)]
    folder = each.files[0].parent
    return [
        SetSize(name=name, rows=count_of(folder / entry["annotation"]), repeat=entry.get("repeat_time", 1)) for name, entry in meta.items()
    ]


def suggest_file(file: Path) -> str:
    if file.is_dir():
        return "that is a folder: name the JSON file in it"
    names = sorted(path.name for path in file.parent.iterdir() if is_named_as_rows(path)) if file.parent.is_dir() else []
    if not names:
        return f"no file of rows is in {file.parent}" if file.parent.is_dir() else f"there is no folder {file.parent} either"
    return suggest(file.name, names)


# ------------------------------------------------------------------------------------------------------------- the spec


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
