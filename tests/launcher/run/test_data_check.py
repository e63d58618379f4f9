"""The report of a data check: which problems the refusal shows, and where the others are."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.commands import NodeCommand
from launcher.run.data_check import changed_files, fetch_problems, refuse_data
from launcher.run.session import Session
from launcher.ssh.transport import Local
from trainer import contract
from trainer.contract import DATA_FILE, DATA_PROBLEMS_FILE, METRICS_FILE, SCHEMA, DataProblem, DataReport, RowUse


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """A data check that has ended on a node, whose folder of the run lies elsewhere, with 60 problems of which the report has 50."""
    (tmp_path / "node").mkdir()
    (tmp_path / "here").mkdir()
    problems = tuple(
        DataProblem(file="/d/rows.json", row=row, field="image", problem="no such file", fix="put it there") for row in range(1, 61)
    )
    report = DataReport(
        schema=SCHEMA, sha256="", train_rows=90, evaluation_rows=0, images=0, problems=problems[:50], problem_count=len(problems)
    )  # fmt: skip
    contract.write(report, tmp_path / "node" / DATA_FILE)
    (tmp_path / "node" / DATA_PROBLEMS_FILE).write_text("".join(f"{json.dumps(asdict(problem))}\n" for problem in problems))
    command = NodeCommand(
        host="192.0.2.11", node_rank=0, runtime="docker", name="c", folder=str(tmp_path / "node"), environment={}, prepare=(), start=()
    )
    return SimpleNamespace(command=command)


def session() -> Session:
    here = Local({"PATH": os.environ["PATH"]})
    return Session(
        project=Path("/nowhere"),
        transports=(here,),
        here=here,
        secrets={},
        say=print,
        terminal=False,
        move=lambda plan, lost: (plan, session()),
    )


def test_all_problems_are_copied_and_the_refusal_names_the_file(tmp_path: Path, check: Any) -> None:
    here = tmp_path / "here"
    fetch_problems(here, session(), check)
    rows = [json.loads(line)["row"] for line in (here / DATA_PROBLEMS_FILE).read_text().splitlines()]
    assert rows == list(range(1, 61))
    with pytest.raises(ConfigRefused) as caught:
        refuse_data(here, check)
    said = str(caught.value)
    assert "the data on 192.0.2.11 has 60 problems" in said
    assert "\n  /d/rows.json, 60 rows (1, 2, 3, ...), key 'image': no such file\n    put it there\n" in said
    assert said.endswith(f"all problems, one JSON object per line: {here / DATA_PROBLEMS_FILE}")


ROWS = "".join(
    json.dumps(
        {"step": step, "steps": 9, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "samples": 2, "tokens": 9, "seconds": 1.0, "peak_bytes": 1}
    )
    + "\n"
    for step in (1, 2, 3)
)
# (uses of rows, steps were taken) -> what the refusal says of them
USES: dict[str, tuple[list[tuple[int, int]], str, str]] = {
    "before": (
        [(7, 1), (5, 3), (9, 4)],
        ROWS,
        "the ranks had taken 3 steps before that, and trained on 2 of these rows: /d/rows.json rows 7, 5",
    ),
    "none of them": ([(9, 4)], ROWS, ""),
    "no step": ([(7, 1)], "", ""),
    "many": ([(row, 1) for row in range(1, 31)], ROWS, "18, 19, 20 and 10 more"),
}


@pytest.mark.parametrize("name", USES)
def test_rows_that_were_trained_on_before_are_named(tmp_path: Path, check: Any, name: str) -> None:
    uses, rows, said = USES[name]
    here = tmp_path / "here"
    fetch_problems(here, session(), check)
    report: DataReport = contract.read(DataReport, here / DATA_FILE)
    report = replace(report, uses=tuple(RowUse(file="/d/rows.json", row=row, step=step) for row, step in uses))
    contract.write(report, here / DATA_FILE)
    (here / METRICS_FILE).write_text(rows)
    with pytest.raises(ConfigRefused) as caught:
        refuse_data(here, check)
    text = str(caught.value)
    assert (said in text) if said else ("the ranks had taken" not in text)


def test_a_list_that_cannot_be_copied_is_named_with_its_place_on_the_node(
    tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.run.run_folder.FOLDER_BYTES", (tmp_path / "node" / DATA_FILE).stat().st_size)
    (tmp_path / "node" / DATA_PROBLEMS_FILE).write_text("x" * 2**20)
    fetch_problems(tmp_path / "here", session(), check)
    assert [path.name for path in (tmp_path / "here").iterdir()] == [DATA_FILE]
    with pytest.raises(ConfigRefused) as caught:
        refuse_data(tmp_path / "here", check)
    assert str(caught.value).endswith(f"192.0.2.11:{tmp_path / 'node' / DATA_PROBLEMS_FILE}")


def test_a_rerun_names_the_files_that_changed(tmp_path: Path) -> None:
    for name, data in (("recorded_inputs.json", {"a": "1", "b": "2", "c": "3"}), ("inputs.json", {"a": "1", "b": "4", "d": "3"})):
        contract.write(contract.Inputs(schema=SCHEMA, data=data), tmp_path / name)
    assert changed_files(tmp_path) == ("b: another file", "c: missing", "d: new")
    (tmp_path / "inputs.json").unlink()
    assert changed_files(tmp_path) == ()
