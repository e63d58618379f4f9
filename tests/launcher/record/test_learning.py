"""What is said about data and recipe, in the words that a user reads."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose, options
from launcher.record.learning import describe_learning, find_standouts, load_recipes
from launcher.record.metrics import Curve
from launcher.record.report.page import render_html, render_markdown
from launcher.record.run_files import read_run_files
from tests.launcher.planted import copy_run, set_value
from trainer.contract import CommonAnswer, DataReport, DataSummary, LearningFacts

CONF = Path(__file__).parents[3] / "conf"
COMMON = (CommonAnswer(text="yes", count=92), CommonAnswer(text="no", count=8))
FACTS = LearningFacts(answers=100, distinct=2, common=COMMON, characters_p50=3, characters_p95=3, characters_max=3)
QUIET = LearningFacts(answers=100, distinct=90, common=(CommonAnswer(text="a cup", count=3),), characters_p50=40, characters_p95=90)


def report(facts: LearningFacts = QUIET, **summary: Any) -> dict[str, Any]:
    """As data.json has it."""
    made = DataReport(schema=1, sha256="", train_rows=100, evaluation_rows=10, images=1, summary=DataSummary(**summary), learning=facts)
    return json.loads(json.dumps(asdict(made)))  # type: ignore[no-any-return]


def config(*overrides: str) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(compose(overrides, CONF))))  # type: ignore[no-any-return]


LLAVA = ("model=llava_1_5_7b", "stage=full", "hardware=h200")
TINY = ("model=tiny_llava", "hardware=cpu", "data=files", "data.train=rows.json")
STANDOUTS: tuple[tuple[tuple[str, ...], dict[str, Any], str], ...] = (
    (LLAVA, report(FACTS), "92 % of the answers are 'yes': a model that always says so is right that often"),
    (
        LLAVA,
        report(tokens=100_000, trained_tokens=400, image_tokens=97_000),
        "0.4 % of the tokens are trained: the answers are short, and 97 % are image tokens",
    ),
    (
        (*LLAVA, "stage.optimizer.lr=1e-3"),
        report(),
        "the learning rate is 0.001, 50 × the published recipe (2e-05, LLaVA-1.5 fine-tuning)",
    ),
    (
        ("model=minicpm_v_2_6", "stage=lora", "stage.optimizer.lr=1e-4", "hardware=h200"),
        report(),
        "the learning rate is 0.0001, 10 × the published recipe (1e-05, MiniCPM-o LoRA of LLaMA-Factory)",
    ),
    (
        ("model=qwen2_5_vl_7b", "stage=full", "stage.optimizer.lr=1e-8", "hardware=h200"),
        report(),
        "the learning rate is 1e-08, 1/20 of the published recipe (2e-07, Qwen2.5-VL-7B fine-tuning)",
    ),
    (
        ("model=omnilmm_12b", "stage=projector", "stage.optimizer.lr=1e-5", "hardware=h200"),
        report(),
        "the learning rate is 1e-05, 1/100 of the published recipe (0.001, LLaVA-1.5 pretraining)",
    ),
    (
        (*TINY, "stage=full", "stage.optimizer.lr=2e-5"),
        report(),
        "the learning rate is 2e-05: the weights are random, and 0.001 to 0.01 is usual for these (stage.optimizer.lr)",
    ),
    (
        (*TINY, "stage=full", "stage.optimizer.lr=0.5"),
        report(),
        "the learning rate is 0.5: the weights are random, and 0.001 to 0.01 is usual for these (stage.optimizer.lr)",
    ),
    (LLAVA, report(LearningFacts(repeated_rows=12)), "12 % of the training rows are exact copies of another one"),
    (
        LLAVA,
        report(LearningFacts(shared_rows=3, shared_images=3)),
        "3 held-out rows are training rows too: their score says what the model remembers",
    ),
    (LLAVA, report(LearningFacts(shared_images=7)), "7 images are both in training rows and in held-out rows"),
    (
        (*LLAVA, "data.augmentation.flip=0.5"),
        report(LearningFacts(sided_rows=60)),
        "60 training rows speak of left or right, which data.augmentation.flip turns round",
    ),
    (
        LLAVA,
        report(LearningFacts(answers=100, characters_p50=200)),
        "half of the answers have 200 characters or more, but an evaluation generates run.evaluation.max_new_tokens=16 tokens: exact_match stays low",
    ),
)


@pytest.mark.parametrize(("overrides", "data", "sentence"), STANDOUTS, ids=[row[2][:40] for row in STANDOUTS])
def test_what_stands_out(overrides: tuple[str, ...], data: dict[str, Any], sentence: str) -> None:
    assert find_standouts(config(*overrides), data) == (sentence,)


@pytest.mark.parametrize("model", ["llava_1_5_7b", "qwen2_5_vl_7b", "internvl3_8b", "omnilmm_12b", "tiny_llava"])
def test_nothing_stands_out_about_quiet_data(model: str) -> None:
    """With the learning rates of conf/stage. That of the projector is LLaVA's, who trained one from the start: Qwen's are a hundredth."""
    for stage in ("full", "lora", *(("projector",) if not model.startswith("qwen") else ())):
        assert find_standouts(config(f"model={model}", f"stage={stage}", "hardware=h200"), report()) == (), stage


@pytest.mark.parametrize(
    "typed", [("stage.optimizer.lr=1e-3",), ("stage.optimizer.lr=1e-2",), ("stage.checkpoint=RUN",), ("stage=evaluate",)]
)
def test_a_usual_rate_and_one_that_nothing_is_known_of_do_not_stand_out(typed: tuple[str, ...]) -> None:
    assert find_standouts(config(*TINY, *typed), report()) == ()


FORMS = {"before the question, followed by nothing": 90, "within the question": 8, "after the question, preceded by a space": 2}


def test_where_images_stand_in_the_questions() -> None:
    """One form says itself; of several, the most frequent one is what will be asked."""

    def said(forms: dict[str, int]) -> str:
        return dict(describe_learning(config(*TINY), report(replace(QUIET, image_forms=forms)))).get("questions", "")

    assert said({"before the question, followed by nothing": 90}) == "images before the question, followed by nothing"
    assert said(FORMS) == (
        "90 images before the question, followed by nothing; 8 images within the question; 2 images after the question, preceded by a space; "
        "infer and serve put them before the question, followed by nothing"
    )
    assert said({"within the question": 8}) == "images within the question" and said({}) == ""


def test_a_loss_that_does_not_fall() -> None:
    flat, falling = (Curve(step=tuple(range(40)), loss=tuple(6 - fall * step for step in range(40))) for fall in (0.0, 0.1))
    assert find_standouts({}, {}, flat) == ("the loss did not fall: 6 in the first tenth of the steps, 6 in the last",)
    assert find_standouts({}, {}, falling) == ()
    assert find_standouts({}, {}, Curve(step=(1, 2), loss=(6.0, 6.0))) == (), "two steps say nothing"


def test_the_rows_that_describe_it() -> None:
    rows = dict(describe_learning(config(*LLAVA), report(FACTS, tokens=1000, trained_tokens=250)))
    assert rows == {
        "answers": "100, 2 different; 92 % 'yes'; 8.0 % 'no'",
        "characters": "of an answer: p50 3, p95 3, longest 3",
        "trained": "25 % of 1,000 tokens are in the loss",
        "duplicates": "none",
        "lr": "2e-05; published: 2e-05 (LLaVA-1.5 fine-tuning)",
    }


@pytest.mark.parametrize("value", [None, [], {}, "x", True, -1, 1e400, float("nan"), 10**400, [{"text": {}, "count": []}]])
def test_a_damaged_record_breaks_nothing(value: Any) -> None:
    """Whatever a stranger's record holds in place of a section or of a number."""
    names = (
        "answers",
        "distinct",
        "common",
        "characters_p50",
        "repeated_rows",
        "shared_rows",
        "shared_images",
        "sided_rows",
        "image_forms",
    )
    damaged = {"train_rows": value, "summary": {"tokens": value, "trained_tokens": value}, "learning": dict.fromkeys(names, value)}
    stage = {"kind": "train", "lora": value, "trainable": value, "optimizer": {"lr": value}}
    recipe = {"stage": stage, "model": {"family": value, "parameters": {"total": 10**10}}, "run": {"evaluation": value}}
    for data in (damaged, {"learning": value, "summary": value}, {**damaged, "learning": {"answers": 30, "common": value}}):
        for each in (recipe, {"stage": value, "model": value}):
            describe_learning(each, data)
            find_standouts(each, data)


def test_every_recipe_has_a_source_and_a_family_that_exists() -> None:
    known = {compose((f"model={path.stem}",), CONF).model.family for path in sorted((CONF / "model").glob("*.yaml"))}
    for recipe in load_recipes():
        assert set(recipe.families) <= known, recipe.name
        assert recipe.source and 1e-8 < recipe.lr < 1e-2
        assert recipe.trains in ("lora", "projector", "model")
    general = {recipe.trains for recipe in load_recipes() if not recipe.families}
    assert general == {"lora", "projector", "model"}


def test_a_report_shows_it_as_text(tmp_path: Path) -> None:
    evil = LearningFacts(answers=100, distinct=2, common=(CommonAnswer(text="<script>`|", count=92),))
    folder = copy_run(tmp_path, "r", set_value("data.json", "learning", asdict(evil)))
    page = render_html([read_run_files(folder)], None, "")
    assert "<h3>Learning</h3>" in page and "92 % of the answers are" in page and "&lt;script&gt;" in page and "<script" not in page
    markdown = render_markdown([read_run_files(folder)], None, "")
    assert "stands out: 92 % of the answers are '<script>`|'" in markdown and "answers: 100, 2 different" in markdown
    older = render_html([read_run_files(copy_run(tmp_path, "older"))], None, "")
    assert "<h3>Learning</h3>" not in older, "a record of a version that did not count them"


@pytest.mark.parametrize("stage", ["projector", "lm", "full", "lora"])
def test_a_default_rate_is_one_that_the_report_does_not_wonder_at(stage: str) -> None:
    """stage=projector of Qwen2.5-VL had 1e-3, and its report said `100 × the published recipe`."""
    for model in options(CONF)["model"]:
        made = config(f"model={model}", f"stage={stage}", "hardware=h200")
        assert not [text for text in find_standouts(made, {}) if "learning rate" in text], model
    rates = {model: config(f"model={model}", "stage=projector")["stage"]["optimizer"]["lr"] for model in ("qwen2_5_vl_7b", "llava_1_5_7b")}
    assert rates == {"qwen2_5_vl_7b": 1e-5, "llava_1_5_7b": 1e-3}
    assert config("model=minicpm_v_2_6", "stage=lora")["stage"]["optimizer"]["lr"] == 1e-5
