"""`omnilaunch data check`: what it reads, what it prints, and its exit code."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands import data as data_action
from launcher.commands.data import describe_causes, describe_data, describe_few_rows, describe_problems, name_stage
from launcher.errors import ConfigRefused, LaunchError
from launcher.plan.data.usable_rows import refusal
from launcher.plan.plan import Plan
from trainer.contract import SCHEMA, CommonAnswer, DataProblem, DataReport, DataSummary, Exit, LearningFacts, decode

ROWS = 60  # of a file in which every row is bad: no tokenizer is needed then, nor seconds to import it


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The arguments for a file of bad rows in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"image": f"{row}.png", "question": "What?"} for row in range(ROWS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return ("data", "check", "data=files", "data.train=rows.json", "data.images=.", "run.evaluation.enabled=false")


def test_every_problem_is_printed_and_written(chosen: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*chosen, "--out", "problems.jsonl")) == Exit.USAGE
    said = capsys.readouterr().out
    assert "rows       0 to train on, 0 held out; 0 with images" in said
    assert f"problems   {ROWS}" in said
    assert f"rows.json, {ROWS} rows (1, 2, 3, ...): unknown row format: keys 'image', 'question'" in said
    assert "  all of them: problems.jsonl" in said
    lines = (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [decode(DataProblem, json.loads(line)) for line in lines]
    assert [problem.row for problem in problems] == list(range(1, ROWS + 1))
    assert {problem.file for problem in problems} == {str(tmp_path / "rows.json")}


def test_json_has_all_problems(chosen: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*chosen, "--json")) == Exit.USAGE
    report = json.loads(capsys.readouterr().out)
    assert len(report["problems"]) == report["problem_count"] == ROWS
    assert report["summary"]["unmeasured"] == "every row has a problem"
    assert not (tmp_path / "runs").exists(), "no run was started"


def test_a_refused_config_is_refused_before_anything_is_read(chosen: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*chosen[:4], "data.train=", *chosen[5:])) == Exit.USAGE
    assert "data.train" in capsys.readouterr().err


def test_data_without_problems_end_well(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_action, "examine", lambda spec, say: (REPORT, [], []))
    assert main(chosen) == Exit.OK
    assert "problems   none\n" in capsys.readouterr().out


def test_other_nodes_are_named(plan_for, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan: Plan = plan_for("hardware=h200", "model=qwen2_5_vl_7b", "cluster=example")
    monkeypatch.setattr(data_action, "examine", lambda spec, say: (REPORT, [], []))
    monkeypatch.setattr("launcher.commands.data.plan_of", lambda overrides, run_id, **_: plan)
    assert main(("data", "check")) == Exit.OK
    hosts = ", ".join(node.host for node in plan.config.cluster.working)
    assert f"a launch reads the files on {hosts}" in capsys.readouterr().out


REPORT = DataReport(
    schema=SCHEMA,
    sha256="ab" * 32,
    train_rows=1200,
    evaluation_rows=30,
    images=800,
    summary=DataSummary(
        rows=1230,
        rows_with_images=900,
        smallest=(8, 9),
        largest=(4000, 3000),
        conversions={"CMYK": 3, "turned by EXIF": 1204},
        length_p50=310,
        length_p95=1900,
        length_max=2040,
        tokens=500_000,
        image_tokens=320_000,
    ),
)


def test_the_summary() -> None:
    assert describe_data(REPORT, 2048).splitlines() == [
        "rows       1,200 to train on, 30 held out; 900 with images",
        "images     800, from 8x9 to 4000x3000 pixels",
        "converted  3 CMYK, 1,204 turned by EXIF",
        "length     p50 310, p95 1,900, longest 2,040 of 2,048 tokens; 64 % of all 500,000 are images",
        f"sha256     {'ab' * 32}",
    ]


def test_problems_without_a_file_to_write_them_to() -> None:
    problem = {"file": "rows.json", "row": 3, "field": "image", "problem": "is 7", "fix": "give a path"}
    assert describe_problems([problem], "", good_rows=0) == "problems   1\n  rows.json row 3, key 'image': is 7\n    give a path"
    assert describe_problems([problem | {"row": row} for row in range(1, 53)], "", good_rows=51).splitlines()[1:] == [
        "  rows.json, 52 rows (1, 2, 3, ...), key 'image': is 7",
        "    give a path",
        "  all of them: with --out FILE, one JSON object a line",
    ]


def test_bad_rows_among_good_ones_can_be_left_out() -> None:
    problem = {"file": "rows.json", "row": 3, "field": "image", "problem": "is 7", "fix": "give a path"}
    way = "  or add data.bad_rows=skip: this row is left out and listed, and the others are trained on"
    assert describe_problems([problem], "", good_rows=9).splitlines()[-1] == way
    assert "skip" not in describe_problems([problem | {"row": 0}], "", good_rows=9), "a whole file"


def test_what_was_adjusted_is_counted_and_too_few_rows_are_noted(plan_for) -> None:
    adjusted = replace(REPORT, summary=replace(REPORT.summary, adjustments={"put first": 1500, "end mark": 2}))
    assert "adjusted   put first (1,500 rows); end mark (2 rows)" in describe_data(adjusted, 2048)
    ignored = replace(REPORT, summary=replace(REPORT.summary, ignored_keys={"label": 1, "messages[].name": 1500}))
    assert "ignored    keys that are not read: label (1 row); messages[].name (1,500 rows)" in describe_data(ignored, 2048)
    warned = replace(REPORT, summary=replace(REPORT.summary, warnings={"long base64 in a text": 2}))
    assert "warnings   long base64 in a text (2 rows)" in describe_data(warned, 2048)
    spec = plan_for("data=files", "data.train=a.json", "stage.global_batch=2000").spec
    assert describe_few_rows(REPORT, spec).startswith("note: a launch needs stage.global_batch=1200 or less: it is 2000")
    assert describe_few_rows(REPORT, plan_for("data=files", "data.train=a.json").spec) == ""


# (exit code, output of the check) -> (class, part of its text)
REFUSALS = {
    (Exit.USAGE, "data.root=/x: the set digits cannot be written"): (ConfigRefused, "cannot be written"),
    (Exit.BUG, "Traceback\nModuleNotFoundError: No module named 'PIL'"): (ConfigRefused, "lacks what reads the data: ModuleNotFoundError"),
    (Exit.BUG, "Traceback\nKeyError: 'x'"): (LaunchError, "ended with exit code 1:\nTraceback\nKeyError"),
}


@pytest.mark.parametrize("given", REFUSALS)
def test_a_check_that_failed(given: tuple[int, str]) -> None:
    kind, text = REFUSALS[given]
    error = refusal(*given)
    assert type(error) is kind
    assert text in str(error)


def test_doctor_data_is_the_check_and_says_what_stands_out(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = LearningFacts(answers=100, distinct=2, common=(CommonAnswer(text="yes", count=92),), characters_p50=3)
    monkeypatch.setattr(data_action, "examine", lambda spec, say: (replace(REPORT, learning=facts), [], []))
    assert main(("doctor", *chosen[:1], *chosen[2:])) == Exit.OK
    said = capsys.readouterr().out
    assert "answers    100, 2 different; 92 % 'yes'" in said
    assert "what stands out:\n  92 % of the answers are 'yes': a model that always says so is right that often\n" in said
    assert main(chosen) == Exit.OK and capsys.readouterr().out == said
    assert main(("doctor", "data", "--json", *chosen[2:])) == Exit.OK
    assert json.loads(capsys.readouterr().out)["learning"]["common"] == [{"text": "yes", "count": 92}]


def test_doctor_data_refuses_what_the_check_refuses(chosen: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("doctor", "data", *chosen[2:])) == Exit.USAGE
    assert f"problems   {ROWS}" in capsys.readouterr().out


def test_the_stage_that_was_judged_is_named() -> None:
    assert name_stage("full", ["data=files"]) == "batch and learning rate are those of stage=full; for another one add it, as in stage=lora"
    assert name_stage("lora", ["stage=lora"]) == "batch and learning rate are those of stage=lora"


@pytest.mark.parametrize("file", ["train.json", "a/train.jsonl"])
def test_a_file_without_its_key_is_answered_with_the_key(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("data", "check", file)) == Exit.USAGE
    assert f"{file}: a file of rows is named by its key: data=files data.train={file}" in capsys.readouterr().err


def test_nothing_is_said_of_no_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there had lines of zeros, a hash, and nothing that stands out, before the one real line."""
    problem = asdict(DataProblem(file="no.json", row=0, field="", problem="is not there", fix="copy it"))
    empty = DataReport(schema=SCHEMA, sha256="ab", train_rows=0, evaluation_rows=0, images=0, problem_count=1, summary=DataSummary())
    monkeypatch.setattr(data_action, "examine", lambda *_: (empty, [problem], []))
    assert main(("data", "check", "stage=full")) == Exit.USAGE
    said = capsys.readouterr().out
    assert said.startswith("rows       0 to train on, 0 held out; 0 with images\nproblems   1\n  no.json: is not there")
    assert "stands out" not in said and "sha256" not in said


def test_rows_that_are_left_out_are_said_with_their_causes() -> None:
    rows = [
        {"use": "train", "file": "a.json", "row": row, "key": "image", "reason": f"no image file at {row}.png", "done": "left out"}
        for row in (2, 7)
    ]
    rows.append({"use": "evaluation", "file": "b.json", "row": 1, "key": "", "reason": "empty answer", "done": "left out"})
    text = describe_causes(replace(REPORT, left_out={"evaluation left out": 1, "train left out": 2}), rows)
    assert text.splitlines() == [
        "left out   1 held-out row left out, 2 training rows left out",
        "  a.json, 2 rows (2, 7), key 'image': no image file at 2.png",
        "    also: no image file at 7.png",
        "    left out",
        "  b.json row 1: empty answer",
        "    held-out: left out",
    ]
