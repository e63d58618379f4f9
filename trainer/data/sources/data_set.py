"""The rows that a run trains on, or holds out: the sets that the config names, with their files, and which of their rows are meant.

    data_set(spec.data, "train"), data_set(spec.data, "evaluation")

With `data.evaluation=0.05` both have the same files, and `part` says which rows of them are meant.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.contract import DataProblem, DataSpec
from trainer.contract.row_sets.row_set import RowSet, describe_entries, find_sets, make_places
from trainer.data.media.image import hash_file
from trainer.data.media.store import MediaStore
from trainer.data.rows.row_rules import DEFAULT, RowRules, rules_of
from trainer.data.sources.source import AnnotationSource, find_sources, hash_files

Side = Literal["train", "evaluation"]
Part = Literal["all", "trained", "held out"]
EMPTY = MediaStore()  # a folder for temporary files


@dataclass(frozen=True, kw_only=True)
class SourceSet:
    """One set: its files in their order, and how its entry of the config says that they are used. `repeat` of its sources is that of a meta file."""

    name: str
    sources: tuple[AnnotationSource, ...]
    samples: int = 0
    repeat: float = 1.0
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """`name`: for messages. `listing`: files that list the files of rows (meta files), or the one file of rows; the hash begins with them. `data`: the
    options by which rows are chosen, None where all are used. `problems`: those of finding the files."""

    name: str
    sets: tuple[SourceSet, ...]
    data: DataSpec | None = None
    listing: tuple[Path, ...] = ()
    problems: tuple[DataProblem, ...] = ()
    part: Part = "all"

    @property
    def sources(self) -> tuple[AnnotationSource, ...]:
        return tuple(source for each in self.sets for source in each.sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose content the rows depend on, each once."""
        return tuple(dict.fromkeys((*self.listing, *(source.file for source in self.sources))))

    @property
    def chosen(self) -> str:
        """The options that choose rows, '' where all rows are used as often as their files say. A part of the hash of the data."""
        data = self.data
        if data is None:
            return ""
        mixed = (data.mixing, data.mixing_stop, *(each.weight for each in self.sets)) if data.mixing != "concat" else ()
        named = (
            tuple((each.samples, each.repeat) for each in self.sets) if any(each.samples or each.repeat != 1 for each in self.sets) else ()
        )
        split = (data.split, self.part) if self.part != "all" else ()
        seed = (data.split_seed,) if split or any(each.samples for each in self.sets) else ()
        most = (data.max_samples,) if data.max_samples else ()
        options = (mixed, named, split, seed, most)
        return repr(options) if any(options) else ""


def find_data(data: DataSpec, side: Side, store: MediaStore = EMPTY) -> DataSet | None:
    """`store`: for images that are not files. None if the config names no such rows. Only folders that the config names are looked at: the launcher
    has put what it found in the caches of hubs in their place."""
    split = side == "evaluation" and bool(data.split)
    entries = data.train if split or side == "train" else data.evaluation
    if not entries:
        return None
    places = make_places(data.root, data.images, data.info, data.mirror, {}, held_out=side == "evaluation" and not split)
    sets, problems = find_sets(entries, places)
    options = data if side == "train" or split else replace(data, split=0.0, max_samples=0, mixing="concat")  # held-out rows are all used
    part: Part = ("held out" if split else "trained") if options.split else "all"
    return gather_sets(describe_entries(entries), sets, options, rules=rules_of(data), store=store, problems=problems, part=part)


def gather_sets(
    name: str,
    found: tuple[RowSet, ...],
    data: DataSpec | None = None,
    *,
    rules: RowRules = DEFAULT,
    store: MediaStore = EMPTY,
    problems: tuple[DataProblem, ...] = (),
    part: Part = "all",
) -> DataSet:
    """A meta file is as many sets as it lists."""
    sets: list[SourceSet] = []
    listing: list[Path] = []
    wrong = list(problems)
    for each in found:
        plain, one_file = not (each.samples or each.repeat != 1 or each.weight is not None), len(each.files) == 1
        sources: list[AnnotationSource] = []
        for file in each.files:
            read, more = find_sources(file, each.images or file.parent, rules, each.info, data)
            read = tuple(replace(source, store=store) for source in read)
            wrong += more
            if [source.file for source in read] == [file]:
                sources += read
                listing += [file] * one_file
            elif one_file and plain:
                listing.append(file)
                sets += (SourceSet(name=source.name or each.name, sources=(source,)) for source in read)
            else:
                wrong.append(refuse_meta(file, one_file=one_file))
        if sources:
            sets.append(SourceSet(name=each.name, sources=tuple(sources), samples=each.samples, repeat=each.repeat, weight=each.weight))
    return DataSet(name=name, sets=tuple(sets), data=data, listing=tuple(listing), problems=tuple(wrong), part=part)


def refuse_meta(file: Path, *, one_file: bool) -> DataProblem:
    what = "samples, repeat and weight are not for it" if one_file else "it is one of several files of a set"
    fix = "write them for each file that it lists, as entries of data.train" if one_file else "name it by itself: data.train=FILE"
    return DataProblem(file=str(file), row=0, field="", problem=f"is a meta file, which lists sets of its own: {what}", fix=fix)


def set_of_file(file: Path, images: Path, rules: RowRules = DEFAULT, store: MediaStore = EMPTY) -> DataSet:
    """One annotation file or meta file, all rows of it."""
    return gather_sets(str(file), (RowSet(name=str(file), files=(file,), images=images),), rules=rules, store=store)


def hash_data_set(found: DataSet, hash_of: Callable[[Path], str] = hash_file) -> str:
    """Raises OSError."""
    return hash_files(found.listing, found.sources, hash_of, found.chosen)
