"""The rows to train on: lists of sets, and rows that are held out of the others; and their number against the batch and the steps, where they are
counted. A launch's data check counts them on the nodes too."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from launcher.check.problem import Problem, Rule
from launcher.config.defaults import SHORT_STEPS, load_random_rate
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.states import world_size
from trainer.contract import DataEntry
from trainer.contract.row_sets.selection import read_split

STEPS_AN_EPOCH = 8  # of a small data set, about: enough updates to learn from it
MOST_REPEATS = 10**6
MANY_EPOCHS = 10  # published recipes of fine-tuning have 1 to 3


def refuse_few_rows(config: Config, ranks: int) -> Iterator[Problem]:
    """For launcher.check.recipe.batch_divides, by which the changes are judged too: a batch has no row twice."""
    rows, batch = config.data.rows, config.stage.global_batch
    if not has_own_rows(config) or not 0 < rows < batch:
        return
    what = f"{batch} samples, but data.train has {rows} rows: a step would train on the same row twice"
    if rows < ranks:
        what += f", and each of the {ranks} ranks needs one"
    yield Problem(key="stage.global_batch", what=what, changes=tuple(smaller_batches(config, ranks)))


def smaller_batches(config: Config, ranks: int) -> Iterator[str]:
    """A batch for several steps an epoch first, then the largest, both for all ranks; where the typed micro-batch is too large for each, with
    one that is not."""
    rows, unit = config.data.rows, (config.strategy.micro_batch or 1) * ranks
    small = 2 ** round(math.log2(max(1, rows / STEPS_AN_EPOCH)))
    if rows < ranks:
        yield from (f"cluster.devices_per_node=1 stage.global_batch={size}" for size in dict.fromkeys((small, rows)))
        return
    more = "" if unit <= rows else " strategy.micro_batch=1"
    unit = unit if unit <= rows else ranks
    sizes = dict.fromkeys(unit * max(1, size // unit) for size in (small, rows))
    yield from (f"stage.global_batch={size}{more}" for size in sizes)


def with_whole_batch(config: Config) -> Config:
    """The config with a batch that its ranks can share, for a check of its nodes: whether the rows are enough for it is another matter."""
    unit = (config.strategy.micro_batch or 1) * max(1, world_size(config))
    batch = max(unit, config.stage.global_batch - config.stage.global_batch % unit)
    return replace(config, stage=replace(config.stage, global_batch=batch), data=replace(config.data, rows=0))


def has_own_rows(config: Config) -> bool:
    return config.stage.kind == "train" and not config.data.builtin


def write_row_notes(config: Config) -> Iterator[str]:
    """More epochs than fine-tuning usually has, since the default of run.steps is for large data sets; and the warm-up of a short run."""
    warmup = config.stage.optimizer.warmup
    if config.stage.kind == "train" and config.run.steps < SHORT_STEPS and warmup >= 1:
        yield f"the learning rate rises for {warmup:g} of {config.run.steps} steps (stage.optimizer.warmup)"
    usual, rate = load_random_rate(), config.stage.optimizer.lr
    if has_own_rows(config) and config.model.source.kind == "random" and not config.stage.checkpoint and 0 < rate < usual.low:
        yield (
            f"stage.optimizer.lr={rate:g} is a rate of fine-tuning, and {config.model.name} has random weights: it will learn almost nothing. "
            f"A rate of {usual.low:g} to {usual.high:g} is usual here: stage.optimizer.lr={usual.default:g}"
        )
    rows, samples = config.data.rows, config.run.steps * config.stage.global_batch
    if has_own_rows(config) and rows and config.run.epochs is None and samples > MANY_EPOCHS * rows:
        yield (
            f"run.steps={config.run.steps} uses each of the {rows:,} rows {samples / rows:,.0f} times; published recipes 1 to 3 times: "
            "run.epochs=3 in place of run.steps"
        )


# ------------------------------------------------------------------------------------------------------------------ sets


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
