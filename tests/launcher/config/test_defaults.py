"""Defaults that depend on other values: the context of the model, epochs, and a short run's warm-up."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.compose import compose, compose_over
from launcher.config.defaults import count_steps, keys_of, with_short_warmup, without_keys
from launcher.errors import ConfigRefused

CONF = Path(__file__).parents[3] / "conf"
FILES = ("data=files", "data.train=a.json")


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (FILES, 1024),  # the recipe of conf/tune is for digits
        ((*FILES, "model=tiny_internvl"), 1024),
        ((*FILES, "data.max_length=2048"), 2048),  # as typed; the check refuses it, with what passes
        ((*FILES, "data.max_length=300"), 300),
        ((*FILES, "model=qwen2_5_vl_7b"), 2048),
        ((*FILES, "model=tiny_internvl", "model.context=512"), 512),
        ((), 128),
        (("tune=null",), 1024),
        (("experiment=cpu_tiny_llava_full",), 128),
        (("data.builtin=''", "data.train=a.json"), 1024),
    ],
)
def test_the_length_of_a_row_follows_the_context(overrides: tuple[str, ...], length: int) -> None:
    assert compose(overrides, CONF).data.max_length == length


def test_a_value_of_a_wrong_type_is_reported_and_not_compared() -> None:
    with pytest.raises(ConfigRefused, match=r"model\.context"):
        compose(("model.context=much",), CONF)


def test_epochs_replace_steps_and_both_are_refused() -> None:
    assert compose((), CONF).run.epochs is None
    assert compose(("run.epochs=0.5",), CONF).run.epochs == 0.5
    assert compose(("run.epochs=null", "run.steps=5"), CONF).run.steps == 5
    with pytest.raises(ConfigRefused, match=r"run\.steps and run\.epochs are both given.*keep one"):
        compose(("run.steps=5", "run.epochs=3"), CONF)
    with pytest.raises(ConfigRefused, match=r"run\.epochs.*must be a number"):
        compose(("run.epochs=three",), CONF)


def test_steps_of_a_rerun_replace_recorded_epochs() -> None:
    recorded = compose(("run.epochs=3",), CONF)
    recorded = replace(recorded, run=replace(recorded.run, steps=71))
    assert compose_over(recorded, ("run.seed=2",), CONF).run == replace(recorded.run, seed=2)
    assert compose_over(recorded, ("run.steps=9",), CONF).run == replace(recorded.run, steps=9, epochs=None)
    assert compose_over(recorded, ("run.epochs=1",), CONF).run.epochs == 1.0
    assert compose_over(recorded, ("data=files", "data.train=a.json"), CONF).data.max_length == 1024


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [(1, 60, 20, 3), (1, 61, 20, 4), (3, 10, 4, 8), (0.5, 60, 20, 2), (0.001, 10, 10, 1), (0.1, 30, 1, 3), (1e6, 7, 7, 10**6)],
)
def test_an_epoch_is_every_row_once_rounded_up(epochs: float, rows: int, batch: int, steps: int) -> None:
    assert count_steps(epochs, rows, batch) == steps


@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [
        (("run.steps=300",), 20),
        (("run.steps=100",), 20),  # unchanged from here on
        (("run.steps=99",), 19),
        (("run.steps=50",), 10),
        (("run.steps=10",), 2),
        (("run.steps=3",), 1),
        (("run.steps=1",), 1),
        (("run.steps=10", "stage.optimizer.warmup=9"), 9),  # as typed
        (("run.steps=10", "tune=null"), 0.03),
        (("run.steps=10", "stage=projector"), 2),
    ],
)
def test_the_warmup_of_a_recipe_fits_a_short_run(overrides: tuple[str, ...], warmup: float) -> None:
    typed = keys_of(overrides)
    assert with_short_warmup(compose(overrides, CONF), typed).stage.optimizer.warmup == warmup


def test_overrides_of_other_keys_are_kept_in_their_order() -> None:
    overrides = ("model=tiny_llava", "run.steps=3", "model.context=64", "run.steps=5", "experiment=null")
    assert without_keys(overrides, ("run.steps", "experiment")) == ("model=tiny_llava", "model.context=64")
    assert without_keys(overrides, keys_of(("model=x",))) == overrides[1:]


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ((*FILES, "model=tiny_qwen2_5_vl"), 5e-3),
        ((*FILES, "model=tiny_qwen2_5_vl", "stage=lm"), 5e-3),
        (("data.builtin=''", "data.train=a.json", "model=tiny_internvl"), 5e-3),
        ((*FILES, "model=tiny_qwen2_5_vl", "stage=projector"), 1e-3),  # which learns
        ((*FILES, "model=tiny_qwen2_5_vl", "stage.optimizer.lr=2e-5"), 2e-5),  # as typed
        ((*FILES, "model=tiny_qwen2_5_vl", "stage.checkpoint=RUN"), 2e-5),  # trained weights
        ((*FILES, "model=tiny_llava"), 2e-3),  # of conf/tune
        ((*FILES, "model=tiny_llava", "tune=null"), 5e-3),
        ((*FILES, "model=qwen2_5_vl_7b", "model.source=random"), 2e-5),  # it would diverge
        ((*FILES, "model=qwen2_5_vl_7b"), 2e-5),
        (("model=tiny_qwen2_5_vl",), 2e-5),  # the digits are what they were
        (("model=tiny_qwen2_5_vl", "data=digits_even"), 2e-5),
    ],
)
def test_a_tiny_model_learns_from_own_rows_with_its_default_rate(overrides: tuple[str, ...], rate: float) -> None:
    assert compose(overrides, CONF).stage.optimizer.lr == rate


def test_a_rerun_on_own_rows_keeps_its_rate() -> None:
    assert compose_over(compose(("model=tiny_qwen2_5_vl",), CONF), FILES, CONF).stage.optimizer.lr == 2e-5
