"""Contradictions about how a run learns are refused, with changes that pass."""

from functools import cache
from pathlib import Path

import pytest

from launcher.check.rules import Verdict, check
from launcher.config.compose import compose
from launcher.config.defaults import keys_of, without_keys
from launcher.image.stack import Stack, load_stacks

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"
EVERY = "run.evaluation.every=10"


@cache
def stacks() -> dict[str, Stack]:
    return dict(load_stacks(ROOT / "images"))


def judge(*overrides: str) -> Verdict:
    return check(compose(overrides, CONF), stacks())


# Overrides -> the key that is refused, a part of the reason, and the first change that is offered.
REFUSED: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    (("stage.optimizer.cycles=3",), "stage.optimizer.cycles", "no effect with", "stage.optimizer.schedule=cosine_restarts"),
    (
        ("stage.optimizer.schedule=cosine_restarts", "stage.optimizer.cycles=0"),
        "stage.optimizer.cycles",
        "at least 1",
        "stage.optimizer.cycles=1",
    ),
    (("stage.optimizer.power=2",), "stage.optimizer.power", "no effect with", "stage.optimizer.schedule=polynomial"),
    (("stage.optimizer.decay=0.2",), "stage.optimizer.decay", "no effect with", "stage.optimizer.schedule=wsd"),
    (
        ("stage.optimizer.schedule=constant", "stage.optimizer.final_ratio=0.1"),
        "stage.optimizer.final_ratio",
        "no effect with",
        "stage.optimizer.schedule=linear",
    ),
    (("stage.optimizer.final_ratio=2",), "stage.optimizer.final_ratio", "at most 1", "stage.optimizer.final_ratio=1"),
    (
        ("stage.optimizer.schedule=wsd", "stage.optimizer.warmup=0.5", "stage.optimizer.decay=0.8"),
        "stage.optimizer.decay",
        "before the warm-up",
        "stage.optimizer.decay=0.25",
    ),
    (
        ("stage.optimizer.schedule=wsd", "stage.optimizer.warmup=0", "stage.optimizer.decay=400"),
        "stage.optimizer.decay",
        "a decay over 1.33 of the steps",
        "stage.optimizer.decay=0.5",
    ),
    (("run.early_stop.patience=3",), "run.early_stop.patience", "not measured", "run.evaluation.every=30"),
    (
        ("run.early_stop.patience=3", "run.early_stop.metric=loss", EVERY),
        "run.early_stop.patience",
        "loss is not measured",
        "run.evaluation.loss=true",
    ),
    (("run.early_stop.patience=30", EVERY), "run.early_stop.patience", "longer than the 300 steps", "run.early_stop.patience=10"),
    (("stage.optimizer.ema_weights=trained",), "stage.optimizer.ema_weights", "no average", "stage.optimizer.ema_decay=0.999"),
    (("stage.optimizer.ema_decay=1",), "stage.optimizer.ema_decay", "at most", "stage.optimizer.ema_decay=0.999999"),
    (("stage.label_smoothing=1",), "stage.label_smoothing", "at most", "stage.label_smoothing=0.9"),
    (("stage.neftune_alpha=-1",), "stage.neftune_alpha", "at least 0", "stage.neftune_alpha=0"),
    (("data.augmentation.flip=0.5",), "data.augmentation.flip", "mirrored digit", "data.augmentation.flip=0"),
    (("data.augmentation.crop=1.5",), "data.augmentation.crop", "at most 1", "data.augmentation.crop=1"),
    (("data.augmentation.jpeg=101",), "data.augmentation.jpeg", "at most 100", "data.augmentation.jpeg=100"),
)


@pytest.mark.parametrize(("overrides", "key", "reason", "change"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_refused_with_a_change_that_passes(overrides: tuple[str, ...], key: str, reason: str, change: str) -> None:
    problems = judge(*overrides).problems
    assert [problem.key for problem in problems] == [key]
    assert reason in problems[0].what and problems[0].changes[0] == change
    for offered in problems[0].changes:
        kept = without_keys(overrides, keys_of(offered.split()))
        assert not judge(*kept, *offered.split()).problems, offered


ACCEPTED: tuple[tuple[str, ...], ...] = (
    ("stage.optimizer.schedule=cosine_restarts", "stage.optimizer.cycles=3", "stage.optimizer.final_ratio=0.1"),
    ("stage.optimizer.schedule=polynomial", "stage.optimizer.power=2"),
    ("stage.optimizer.schedule=wsd", "stage.optimizer.decay=0.3"),
    ("stage.optimizer.schedule=wsd", "stage.optimizer.decay=30"),
    ("run.early_stop.patience=3", EVERY),
    ("run.early_stop.patience=3", "run.early_stop.metric=loss", "run.evaluation.loss=true", EVERY),
    ("stage.optimizer.ema_decay=0.999", "stage.optimizer.ema_weights=trained"),
    ("stage.label_smoothing=0.1", "stage.neftune_alpha=5", "data.augmentation.crop=0.8", "data.augmentation.jpeg=75"),
    ("stage=evaluate", "stage.checkpoint=run", "run.early_stop.patience=3"),
)


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_accepted(overrides: tuple[str, ...]) -> None:
    assert not judge(*overrides).problems
