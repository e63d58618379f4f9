"""The rows to train on against the batch and the steps, where the rows are counted; a launch's data check counts them on the nodes too."""

import math
from collections.abc import Iterator
from dataclasses import replace

from launcher.check.problem import Problem
from launcher.config.defaults import SHORT_STEPS, load_random_rate
from launcher.config.schema import Config
from launcher.memory.states import world_size

STEPS_AN_EPOCH = 8  # of a small data set, about: enough updates to learn from it
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
