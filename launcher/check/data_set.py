"""Rules about data.train and data.evaluation: lists of sets, and rows that are held out of the others. Whether files exist is checked elsewhere."""

from collections.abc import Iterator, Mapping

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from trainer.contract import DataEntry
from trainer.contract.row_sets.selection import read_split

MOST_REPEATS = 10**6


def entries_can_be_read(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for side in ("train", "evaluation"):
        entries = getattr(config.data, side)
        if entries == ():
            yield Problem(key=f"data.{side}", what="is an empty list; name a file, or leave it empty", changes=(f"data.{side}=''",))
        if isinstance(entries, tuple):
            for place, entry in enumerate(entries):
                for name, what in find_faults(entry, mixed=config.data.mixing == "interleave", trained=side == "train"):
                    yield Problem(key=f"data.{side}.{place}.{name}", what=what)


def find_faults(entry: DataEntry, *, mixed: bool, trained: bool) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    repeat, weight = entry.repeat, entry.weight
    if not entry.file:
        yield "file", "is empty: name a file, a folder, a glob or a data set"
    if entry.samples < 0:
        yield "samples", f"is {entry.samples}; it must be a number of rows, 0 for all"
    if not 0 < repeat <= MOST_REPEATS or (repeat > 1 and repeat != int(repeat)):
        yield "repeat", f"is {repeat:g}; write a whole number from 1, or a fraction between 0 and 1"
    if weight is not None and not 0 < weight < float("inf"):
        yield "weight", f"is {weight:g}; it must be above 0"
    if weight is not None and trained and not mixed:
        yield "weight", "counts with data.mixing=interleave only: set that, or leave the weight out (repeat uses rows more often)"
    if not trained and (weight is not None or repeat > 1):
        yield "repeat" if repeat > 1 else "weight", "is for training rows; each held-out row is evaluated once"


def split_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    data = config.data
    split, key = read_split(data.evaluation), "data.evaluation"
    if isinstance(data.evaluation, str) and data.evaluation and data.evaluation.strip("0.%") == "" and not split:
        yield Problem(key=key, what=f"{data.evaluation} holds out no row; leave it empty for that", changes=("data.evaluation=''",))
    if not split:
        return
    if data.builtin:
        what = f"{data.evaluation} would be held out of data.train, and data={data.name} has held-out rows of its own"
        yield Problem(key=key, what=what, changes=("data.evaluation=''",))
    elif not data.train:
        yield Problem(key=key, what=f"{data.evaluation} is held out of data.train, which is empty; name its file", changes=())
    if split >= 1 and (split != int(split) or str(data.evaluation).endswith("%")):
        what = f"{data.evaluation} is neither a share below 1 nor a number of rows"
        yield Problem(key=key, what=what, changes=("data.evaluation=0.05", f"data.evaluation={max(1, int(split))}"))


DATA_RULES: tuple[Rule, ...] = (entries_can_be_read, split_is_possible)
