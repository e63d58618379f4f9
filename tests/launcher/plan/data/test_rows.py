"""Rows are counted as the trainer reads them, and run.epochs becomes steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.plan import plan_here, plan_of
from launcher.config.compose import compose
from launcher.config.defaults import keys_of
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.plan.data.row_count import count_rows
from launcher.plan.data.rows import count_with, settle_rows
from launcher.plan.plan import refuse
from launcher.plan.short import describe_short
from tests.launcher.conftest import PROJECT

ROW = {"messages": [{"role": "user", "content": "Hi [ {"}, {"role": "assistant", "content": "Hi!\u2028"}]}
TEXTS: dict[str, tuple[str, str]] = {
    "a list": ("a.json", json.dumps([ROW] * 3, indent=1)),
    "lines": ("a.jsonl", f"{json.dumps(ROW)}\n" * 3),
    "lines in .json, and blank ones": ("a.json", f"\n{json.dumps(ROW, ensure_ascii=False)}\n\n{json.dumps(ROW)}\r\n  \n{json.dumps(ROW)}"),
    "a byte order mark": ("a.json", "\ufeff" + json.dumps([ROW] * 3)),
    "conversations in lists": ("a.json", json.dumps([[ROW, ROW], ROW])),
    "conversations in lines": ("a.jsonl", f"{json.dumps([ROW, ROW])}\n{json.dumps(ROW)}\n"),
    "a meta file": ("a.json", json.dumps({"one": {"annotation": "b.jsonl", "repeat_time": 1}, "two": {"annotation": "c.json"}})),
    "repeated": ("a.json", json.dumps({"one": {"annotation": "c.json", "repeat_time": 3}})),
    "a part": ("a.json", json.dumps({"one": {"annotation": "d.json", "repeat_time": 0.5}})),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("b.jsonl", 2), ("c.json", 1), ("d.json", 7)):
        (tmp_path / name).write_text(json.dumps([ROW] * rows) if name.endswith(".json") else f"{json.dumps(ROW)}\n" * rows)
    (tmp_path / "rows.json").write_text(json.dumps([ROW] * 60))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", TEXTS)
def test_three_rows_as_the_trainer_reads_them(here: Path, name: str) -> None:
    sample = pytest.importorskip("trainer.data.rows.sample", reason="the trainer's packages are not installed in this environment")
    file, text = TEXTS[name]
    (here / file).write_text(text, encoding="utf-8", newline="")
    samples, problems = sample.read_samples(here / file, here)
    assert problems == () and count_rows(here / file) == len(samples) == 3


@pytest.mark.parametrize(
    "text", ["", "[1, 2", "not JSON", '{"a": {"annotation": 7}}', '{"a": {"annotation": "b.jsonl", "repeat_time": "x"}}']
)
def test_what_cannot_be_counted_is_left_to_the_data_check(here: Path, text: str) -> None:
    (here / "bad.json").write_text(text)
    assert count_rows(here / "bad.json") <= 1  # a line is a row, whatever it holds


def settle(here: Path, *overrides: str) -> Config:
    return settle_rows(compose(overrides, PROJECT / "conf"), keys_of(overrides), here)


FILES = ("data=files", "data.train=rows.json", "stage.global_batch=8")


@pytest.mark.parametrize(
    ("overrides", "rows", "steps"),
    [
        (FILES, 60, 300),
        ((*FILES, "run.epochs=3"), 60, 23),
        ((*FILES, "run.epochs=0.5"), 60, 4),
        ((*FILES, "run.epochs=1", "data.packing=true"), 60, 8),
        ((*FILES, "run.epochs=1", "data.rows=60"), 60, 8),
        (("data=files", "stage.global_batch=8", "data.train=[rows.json,b.jsonl]", "run.epochs=1"), 62, 8),
        (("data=files", "stage.global_batch=8", "data.train=[rows.json#12,{file: b.jsonl, repeat: 2}]", "run.epochs=1"), 16, 2),
        (("data=files", "stage.global_batch=8", "data.train=[bcd].json*", "run.epochs=1"), 10, 2),
        ((*FILES, "data.max_samples=20", "run.epochs=1"), 20, 3),
        ((*FILES, "data.evaluation=0.05", "run.epochs=1"), 57, 8),
        ((*FILES, "data.evaluation=12", "run.epochs=1"), 48, 6),
        ((*FILES, "data.evaluation=12", "run.epochs=1", "data.rows=50"), 50, 7),  # of rows that share images, which are not divided
        (("data=files", "stage.global_batch=8", "data.train=[rows.json,d.json]", "data.mixing=interleave", "run.epochs=1"), 14, 2),
        ((*FILES, "run.epochs=1", "data.rows=50", "data.bad_rows=skip"), 50, 7),  # fewer than the file has: some are left out
        (("run.epochs=2",), 0, 47),  # of the 1,500 digits, in batches of 64
        ((*FILES, "run.epochs=1", "run.steps=null"), 60, None),
    ],
)
def test_epochs_become_steps(here: Path, overrides: tuple[str, ...], rows: int, steps: int | None) -> None:
    if steps is None:
        with pytest.raises(ConfigRefused):
            settle(here, *overrides)
        return
    config = settle(here, *overrides)
    assert (config.data.rows, config.run.steps) == (rows, steps)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("data.train=row.json", "run.epochs=1"), r"data\.train: there is no file row\.json; did you mean 'rows\.json'"),
    "no folder": (("data.train=set/rows.json", "run.epochs=1"), "there is no folder .*/set either"),
    "a folder without rows": (
        ("data.train=empty", "run.epochs=1"),
        r"data\.train: empty is a folder without a file of rows; it has a\.png",
    ),
    "a glob": (("data.train=x*.json", "run.epochs=1"), r"data\.train: x\*\.json matches nothing; .* has b\.jsonl, bad\.json, c\.json"),
    "a hub's data set": (("data.train=somebody/llava", "run.epochs=1"), r"huggingface-cli download --repo-type dataset somebody/llava"),
    "a split of nothing": (("data.train=c.json", "data.evaluation=0.5", "run.epochs=1"), r"data\.evaluation=0\.5 holds out no row of 1"),
    "another number": (("data.train=rows.json", "data.rows=7"), r"data\.rows=7: rows\.json has 60 rows"),
    "more than the file has": (("data.train=rows.json", "data.rows=70", "data.bad_rows=skip"), r"data\.rows=70: rows\.json has 60 rows"),
    "on the nodes only": (
        ("data.train=/srv/x.json", "cluster=example", "run.epochs=2"),
        r"run\.epochs=2 needs the number of rows of data\.train=/srv/x\.json.*192\.0\.2\.11(.|\n)*add data\.rows=NUMBER",
    ),
    "not JSON": (("data.train=bad.json", "run.epochs=2"), "cannot be counted here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_write(here: Path, name: str) -> None:
    (here / "bad.json").write_text("[1, 2")
    overrides, text = REFUSED[name]
    with pytest.raises(ConfigRefused, match=text):
        settle(here, "data=files", *overrides)


def test_a_file_that_is_not_there_can_be_planned_with_and_not_launched(here: Path) -> None:
    plan, _ = plan_here((*FILES[:1], "data.train=row.json", "data.evaluation=rows.json"), "R")
    assert plan.verdict.ok and not plan.verdict.launchable
    text = describe_short(plan)
    assert (
        "planned; a launch is refused:\n  data.train: there is no file row.json; did you mean 'rows.json'?" in text and "next:" not in text
    )
    with pytest.raises(ConfigRefused, match=r"there is no file row\.json"):
        refuse(plan.verdict, launching=True)
    for words in (FILES, (*FILES[:1], "data.train=row.json", "cluster=example"), ("data.train=row.json", "data=files", "cluster=example")):
        problems = plan_here(words, "R")[0].verdict.problems
        assert {problem.key for problem in problems} <= {"cluster.nodes"}, "the nodes have files of their own"


def test_epochs_count_the_rows_that_are_used(here: Path) -> None:
    """The data is checked for it: rows 1 and 2 have an empty answer."""
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    (here / "rows.json").write_text(json.dumps([empty] * 2 + [ROW] * 58))
    words = ("data=files", "data.train=rows.json", "model=tiny_llava", "stage.global_batch=8", "run.epochs=4")
    config = plan_here((*words, "data.bad_rows=skip"), "r")[0].config
    assert (config.data.rows, config.run.steps) == (58, 29)
    assert plan_here(words, "r")[0].config.data.rows == 60, "by default all are counted, and the check refuses the bad ones"


def test_rows_on_the_nodes_can_be_given(here: Path) -> None:
    words = ("data=files", "data.train=/srv/x.json", "cluster=example", "stage.global_batch=16")
    config = settle(here, *words, "run.epochs=2", "data.rows=100")
    assert (config.run.steps, config.data.rows) == (13, 100)
    assert settle(here, *words).data.rows == 0, "without epochs nothing is asked"


def test_a_stage_that_does_not_train_counts_nothing(here: Path) -> None:
    assert settle(here, "stage=evaluate", "data=files", "data.train=none.json", "run.epochs=3").run.steps == 1000


def test_the_plan_shows_steps_and_epochs_and_the_trainer_gets_the_rows(here: Path) -> None:
    def text(*overrides: str) -> Any:
        plan = plan_of((*FILES, *overrides), "R")
        return plan, " ".join(describe_short(plan).split())

    plan, shown = text("run.epochs=3")
    assert "cost 23 steps (run.epochs=3, rounded up) = 184 samples = 3.1 epochs of 60 rows, at most" in shown
    assert (plan.spec.steps, plan.spec.data.rows, plan.config.run.epochs) == (23, 60, 3.0)
    plan, shown = text("run.steps=20")
    assert "cost 20 steps = 160 samples = 2.7 epochs of 60 rows" in shown and "published recipes" not in shown
    assert plan.spec.data.rows == 0, "steps that were given are right for any number of rows"
    _, shown = text()
    assert "run.steps=300 uses each of the 60 rows 40 times; published recipes 1 to 3 times: run.epochs=3 in place of run.steps" in shown
    _, shown = text("run.steps=10")
    assert "the learning rate rises for 2 of 10 steps" in shown


def test_a_batch_of_more_rows_than_there_are_is_refused_by_the_plan(here: Path) -> None:
    with pytest.raises(
        ConfigRefused, match=r"64 samples, but data\.train has 60 rows(.|\n)*would pass: stage\.global_batch=8 strategy\.micro_batch=1  or "
    ):
        plan_of(FILES[:2], "R")
    with pytest.raises(ConfigRefused, match=r"128 samples, but data\.train has 60 rows"):
        plan_of((*FILES[:2], "model=tiny_internvl"), "R")
    assert plan_of(FILES[:2], "R", only_data=True).spec.data.rows == 0, "rows can be checked with any batch"


@pytest.mark.parametrize(
    ("file", "command"),
    [("/d/a.jsonl", "wc -l /d/a.jsonl"), ("/d/a b.json", "jq length '/d/a b.json', or for JSON Lines wc -l '/d/a b.json'")],
)
def test_rows_are_counted_by_what_the_file_is(file: str, command: str) -> None:
    """wc -l was offered for a list, which may have one line."""
    assert count_with(file) == command
