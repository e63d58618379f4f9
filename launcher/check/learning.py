"""Rules about how a run learns: schedule, early stopping, moving average and augmentation."""

import math
from collections.abc import Iterator, Mapping

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from trainer.contract import Optimizer

# Key of the optimizer -> the schedules that use it. Any other schedule would ignore it.
USED_BY = {
    "cycles": ("cosine_restarts",),
    "power": ("polynomial",),
    "decay": ("wsd",),
    "final_ratio": ("linear", "cosine", "cosine_restarts", "polynomial", "wsd"),
}
DEFAULTS = Optimizer(lr=0.0)


def schedule_uses_its_options(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    optimizer = config.stage.optimizer
    if config.stage.kind != "train":
        return
    for name, schedules in USED_BY.items():
        if getattr(optimizer, name) != getattr(DEFAULTS, name) and optimizer.schedule not in schedules:
            key, default = f"stage.optimizer.{name}", getattr(DEFAULTS, name)
            what = f"{getattr(optimizer, name):g} has no effect with stage.optimizer.schedule={optimizer.schedule}"
            yield Problem(key=key, what=what, changes=(f"stage.optimizer.schedule={schedules[0]}", f"{key}={default:g}"))


def decay_follows_warmup(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    optimizer, steps = config.stage.optimizer, config.run.steps
    if config.stage.kind != "train" or optimizer.schedule != "wsd" or steps < 1:
        return
    warmup, decay = (value / steps if value >= 1 else value for value in (optimizer.warmup, optimizer.decay))
    if warmup < 1 < warmup + decay < math.inf:
        what = f"a decay over {decay:.3g} of the steps begins before the warm-up of {warmup:.3g} of them ends"
        yield Problem(key="stage.optimizer.decay", what=what, changes=(f"stage.optimizer.decay={round((1 - warmup) / 2, 3):g}",))


def list_lacking(config: Config, metric: str) -> list[str]:
    """The overrides that evaluations during training lack to measure the metric."""
    run, data = config.run, config.data
    lacks = [] if run.evaluation.enabled else ["run.evaluation.enabled=true"]
    lacks += [] if run.evaluation.every else [f"run.evaluation.every={max(1, run.steps // 10)}"]
    lacks += ["run.evaluation.loss=true"] if metric == "loss" and not run.evaluation.loss else []
    return lacks + ([] if data.builtin or data.evaluation else ["data.evaluation=FILE.json"])


def early_stop_is_measured(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    run, stop = config.run, config.run.early_stop
    if not stop.patience or config.stage.kind != "train":
        return
    if lacks := list_lacking(config, stop.metric):
        what = f"{stop.metric} is not measured by any evaluation during training, so the run would never stop early"
        yield Problem(key="run.early_stop.patience", what=what, changes=(" ".join(lacks), "run.early_stop.patience=0"))
    elif stop.patience * run.evaluation.every >= run.steps:
        what = f"{stop.patience} evaluations, one every {run.evaluation.every} steps, take longer than the {run.steps} steps of the run"
        fewer = max(1, run.steps // (run.evaluation.every * 3))
        changes = (f"run.early_stop.patience={fewer}",) * (fewer * run.evaluation.every < run.steps)
        yield Problem(key="run.early_stop.patience", what=what, changes=(*changes, "run.early_stop.patience=0"))


def average_is_kept(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    optimizer = config.stage.optimizer
    if config.stage.kind == "train" and optimizer.ema_weights != DEFAULTS.ema_weights and not optimizer.ema_decay:
        what = f"{optimizer.ema_weights} has no effect: stage.optimizer.ema_decay=0 keeps no average of the weights"
        changes = ("stage.optimizer.ema_decay=0.999", f"stage.optimizer.ema_weights={DEFAULTS.ema_weights}")
        yield Problem(key="stage.optimizer.ema_weights", what=what, changes=changes)


def flip_keeps_the_answers(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Of the user's own rows the check of the data refuses those with boxes."""
    if config.stage.kind == "train" and config.data.augmentation.flip and config.data.builtin:
        what = f"a mirrored digit is another sign, but its answer in {config.data.builtin} stays the same"
        yield Problem(key="data.augmentation.flip", what=what, changes=("data.augmentation.flip=0",))


LEARNING_RULES: tuple[Rule, ...] = (
    schedule_uses_its_options,
    decay_follows_warmup,
    early_stop_is_measured,
    average_is_kept,
    flip_keeps_the_answers,
)
