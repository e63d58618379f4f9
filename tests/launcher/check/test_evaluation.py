"""The evaluation of a training run: its batch is lowered to what fits beside the training, and one that was typed is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.check.evaluation import KEY, find_batch
from launcher.check.override import apply_override
from launcher.config.compose import compose
from launcher.errors import ConfigRefused
from launcher.memory.estimate import answering_memory
from launcher.plan.plan import Plan
from launcher.plan.short import describe_short

ROOT = Path(__file__).resolve().parents[3]
FILES = ("data=files", "data.train=a.json", "data.evaluation=b.json", "data.images=photos")
LORA = (
    *("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example", "data.max_length=4096"),
    "cluster.delivery.accept_licence=true",
    *FILES,
)


def test_a_batch_that_was_left_open_is_the_largest_that_fits(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(*LORA)
    batch = plan.config.run.evaluation.batch
    assert 1 <= batch < 64 and plan.spec.evaluation.batch == batch
    assert answering_memory(plan.config).fits
    larger = apply_override(plan.config, f"{KEY}={batch + 1}", None)
    assert larger is not None and not answering_memory(larger).fits and find_batch(larger) == batch
    assert f"{KEY}={batch}: the most questions at a time" in " ".join(describe_short(plan).split()).partition("assumptions:")[2]


def test_a_batch_that_was_typed_is_refused_with_the_value_that_passes(plan_for: Callable[..., Plan]) -> None:
    batch = plan_for(*LORA).config.run.evaluation.batch
    with pytest.raises(
        ConfigRefused, match=rf"run.evaluation.batch: the evaluation.*\n    would pass: {KEY}={batch}  or  run.evaluation.enabled=false"
    ):
        plan_for(*LORA, f"{KEY}=64")
    assert plan_for(*LORA, f"{KEY}={batch}").verdict.ok and not plan_for(*LORA, f"{KEY}={batch}").settled
    assert plan_for(*LORA, f"{KEY}=64", "run.evaluation.enabled=false").verdict.ok


def test_where_not_even_one_question_fits_the_evaluation_must_be_off(plan_for: Callable[..., Plan]) -> None:
    words = (*LORA, "run.evaluation.max_new_tokens=400000")
    with pytest.raises(ConfigRefused, match=r"one at a time takes .*\n    would pass: run.evaluation.enabled=false"):
        plan_for(*words)
    assert plan_for(*words, "run.evaluation.enabled=false").verdict.ok


@pytest.mark.parametrize("words", [(), ("hardware=h200", "cluster=example"), ("model=qwen2_5_vl_7b", "stage=lora")])
def test_a_run_whose_evaluation_fits_or_is_on_a_cpu_keeps_its_batch(words: tuple[str, ...], plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(*words)
    assert plan.config.run.evaluation == compose(words, ROOT / "conf").run.evaluation and not plan.settled


def test_without_rows_to_evaluate_nothing_is_judged(plan_for: Callable[..., Plan]) -> None:
    words = tuple(word for word in LORA if not word.startswith("data.evaluation"))
    assert plan_for(*words, f"{KEY}=64").config.run.evaluation.batch == 64
