"""The table of `omnilaunch runs`: what a row says of each kind of run, and that it fits on a screen."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands.run_table import TableStyle, describe_age, describe_entries, lay_out, plain_entry
from launcher.plan.plan import Plan
from launcher.plan.text import measure
from launcher.record.index import RunEntry, list_entries, read_entry, tag_run
from launcher.record.lock import lock_run
from launcher.record.record import Record, SourceState, open_run
from launcher.record.run_name import find_run, shorten_ids
from tests.launcher.planted import copy_run, set_value
from trainer import contract
from trainer.contract import SCHEMA

NOW = datetime(2026, 11, 30, tzinfo=UTC)
COLUMNS = ("id", "when", "model", "stage", "hardware", "state", "steps", "loss", "score")


def listed(*entries: RunEntry, width: int = 80, disk: bool = False) -> list[list[str]]:
    names = shorten_ids(entry.run_id for entry in entries)
    return [line.split() for line in describe_entries(entries, TableStyle(width=width, names=names, disk=disk), NOW).splitlines()]


def started(hours: float) -> str:
    return (NOW - timedelta(hours=hours)).isoformat()


def test_a_run_is_one_row_below_a_header(tmp_path: Path) -> None:
    folder = copy_run(tmp_path, "monday", set_value("result.json", "started_at", started(3)))
    for key, value in {"steps": 1200, "final_loss": 0.0123456, "evaluation": {"exact_match": 0.5, "count": 297.0}}.items():
        set_value("result.json", key, value)(folder)
    head, row = listed(read_entry(folder))
    assert tuple(head) == COLUMNS
    assert row == ["monday", "3h", "tiny_llava", "full", "cpu", "finished", "1,200", "0.01235", "0.5000"]


def test_a_run_without_steps_loss_and_score_leaves_the_cells_empty(tmp_path: Path) -> None:
    folder = copy_run(tmp_path, "merged", set_value("result.json", "started_at", started(30)))
    for key, value in {"steps": 0, "final_loss": None, "evaluation": {"logit_error": 4.02e-7, "tensors": 89.0}}.items():
        set_value("result.json", key, value)(folder)
    head, row = listed(read_entry(folder))
    assert head == [*COLUMNS[:6]] and row == ["merged", "30h", "tiny_llava", "full", "cpu", "finished"]


def test_a_score_of_another_metric_is_named(tmp_path: Path) -> None:
    folder = copy_run(tmp_path, "a", set_value("config.json", "run.evaluation.metrics", ["rouge_l", "exact_match"]))
    set_value("result.json", "evaluation", {"exact_match": 0.1, "rouge_l": 0.412345, "count": 9.0})(folder)
    *_, row, note = listed(read_entry(folder))
    assert row[-1] == "0.4123" and " ".join(note) == "score: exact match, or where another metric was asked for, that one (rouge_l)"


def row_of(step: int, loss: float) -> str:
    row = {"step": step, "steps": 300, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "samples": 8, "tokens": 80, "seconds": 0.1}
    return json.dumps(row | {"peak_bytes": 1}) + "\n"


def test_a_run_that_is_running_has_its_current_step(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    folder = open_run(plan_for(f"cluster.root={tmp_path}"), SourceState(commit="", dirty=False))
    (folder / "metrics.jsonl").write_text("".join(row_of(step, 2.0 / step) for step in range(1, 900)) + row_of(900, 0.001)[:40])
    with lock_run(folder):
        _, row = listed(read_entry(folder))
        assert row[5:] == ["running", "899", "0.002225"] and plain_entry(read_entry(folder), disk=False)["steps"] == 899
    _, row, note = listed(read_entry(folder))
    assert row[5:] == ["open", "899", "0.002225"] and note[0] == "open:" and note[-3:] == ["omnilaunch", "status", "ID"]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": 99}', f'{{"schema": {SCHEMA}}}', '{"seconds": ' + "9" * 5000 + "}"])
def test_a_broken_record_is_a_row_and_its_reason(plan_for: Callable[..., Plan], tmp_path: Path, text: str) -> None:
    folder = open_run(plan_for(f"cluster.root={tmp_path}"), SourceState(commit="", dirty=False))
    assert listed(*list_entries(folder.parent))[1][5] == "open"
    (folder / "result.json").write_text(text, encoding="utf-8")
    _, row, reason = listed(*list_entries(folder.parent))
    assert row[0] == "R" and row[5] == "unreadable" and reason[:2] == ["R:", "result.json"]
    with pytest.raises(contract.SpecError, match="result"):
        contract.read(Record, folder / "result.json")


@pytest.mark.parametrize(
    "config", ["", "[]", '{"model": 3}', '{"model": {"name": "a\\u001b[2J"}, "stage": [], "hardware": {"name": null}}']
)
def test_a_broken_config_is_no_crash_and_prints_no_escape_sequence(tmp_path: Path, config: str) -> None:
    folder = copy_run(tmp_path, "a")
    (folder / "config.json").write_text(config)
    (folder / "tags.json").write_text('{"tags": ["\\u001b[31m"]}')
    text = describe_entries([read_entry(folder)], TableStyle(names={"a": "a"}), NOW)
    assert "finished" in text and "\x1b" not in text


ROW = {"when": "59min", "model": "tiny_minicpm_v_2_6", "stage": "projector", "hardware": "ascend910b", "state": "unreadable"}
WIDEST = ROW | {"steps": "100,000", "loss": "4.02e-07", "score": "4.02e-07", "tags": "#paper-2 #cpu_tiny_llava_full"}


@pytest.mark.parametrize("run_id", ["20261121-024500", "cpu_tiny_llava_full-20261121-232436-7f2a-1"])
def test_the_widest_table_has_80_columns(run_id: str) -> None:
    sized = {name: cell for name, cell in WIDEST.items() if name not in ("steps", "loss", "score")} | {"size": "1,234.5 GiB"}
    assert max(map(measure, lay_out([{"id": run_id, **sized}], 80))) <= 80
    lines = lay_out([{"id": run_id, **WIDEST}], 80)
    assert max(map(measure, lines)) <= 80 and any(run_id in line for line in lines), "a name is never cut: it can be typed"
    wide = lay_out([{"id": run_id, **WIDEST}], 200)
    assert all(cell in " ".join(wide) for cell in WIDEST.values()), "with more columns, nothing is cut"
    shown = " ".join(lay_out([{"id": "20261121-0245", **ROW, "steps": "300", "loss": "0.1234", "score": "0.9630"}], 80))
    assert shown.endswith("tiny_…_2_6 projector asce…10b unreadable   300 0.1234 0.9630"), "both ends of a name are kept"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1min"), (3599, "59min"), (3600, "1h"), (172799, "47h"), (172800, "2d"), (3e7, "347d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert describe_age(seconds) == text


IDS = (
    "20261121-024500-tiny_llava-full-cpu-3f0a",
    "20261121-024501-tiny_llava-full-cpu-91c2",
    "20261120-120000-qwen2_5_vl_7b-lora-h200-0a0a",
)
IDS += ("monday", "monday-2", *(f"cpu_tiny_llava_full-20261121-232436-7f2a-{number}" for number in (1, 2, 10)), "a" * 30, "a" * 31)


def test_a_shortened_id_names_the_run(tmp_path: Path) -> None:
    for run_id in IDS:
        (tmp_path / run_id).mkdir()
        (tmp_path / run_id / "plan.json").write_text("{}")
    short = shorten_ids(IDS)
    assert {run_id: find_run(name, tmp_path).name for run_id, name in short.items()} == {run_id: run_id for run_id in IDS}
    assert [short[run_id] for run_id in IDS[:5]] == ["20261121-024500", "20261121-024501", "20261120-1200", "monday", "monday-2"]
    assert shorten_ids(()) == {} and shorten_ids(IDS[:1]) == {IDS[0]: "20261121-0245"}


def test_the_newest_20_are_listed_first_and_other_folders_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(23):
        copy_run(tmp_path / "runs", f"run-{number:02}", set_value("result.json", "started_at", f"2026-11-{number + 1:02}T00:00:00+00:00"))
    (tmp_path / "runs/notes").mkdir()
    assert main(["runs"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [f"run-{number:02}" for number in range(22, 2, -1)]
    assert last == "the newest 20 of 23 runs; for all of them: --all" and tuple(head.split()) == COLUMNS
    assert main(["runs", "--all"]) == 0 and len(capsys.readouterr().out.splitlines()) == 24
    assert main(["runs", "--limit", "2", "stage=full"]) == 0 and len(capsys.readouterr().out.splitlines()) == 4
    assert main(["runs", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert len(runs) == 23 and runs[0]["run_id"] == "run-22"
    assert {name: runs[0][name] for name in ("model", "stage", "hardware", "status")} == {
        **{"model": "tiny_llava", "stage": "full", "hardware": "cpu", "status": "finished"}
    }


def test_tags_are_shown(tmp_path: Path) -> None:
    folder = copy_run(tmp_path, "a")
    tag_run(read_entry(folder), ["paper"], remove=False)
    head, row = listed(read_entry(folder), width=120)
    assert head[-1] == "tags" and row[-1] == "#paper" and replace(TableStyle(names={}), width=3).width == 3
