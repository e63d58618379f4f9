"""The two commands as a launcher meets them: exit codes, files, and what they say."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.__main__ import fail, main
from trainer.contract import (
    DATA_FILE,
    DATA_PROBLEMS_FILE,
    SCHEMA,
    SPEC_FILE,
    DataReport,
    Exit,
    FailureReport,
    InputRefused,
    RunFailed,
    TrainSpec,
    read,
    write,
)
from trainer.contract.checkpoint_files import STATE_FILE, CheckpointState

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def written(tiny_spec: Callable[..., TrainSpec]) -> Path:
    spec = tiny_spec()
    write(spec, Path(spec.output) / SPEC_FILE)
    return Path(spec.output)


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk", "spec.json"], ["data", "a", "b"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == Exit.USAGE
    assert "usage: python -m trainer" in capsys.readouterr().err


def test_a_spec_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.json")]) == Exit.USAGE
    assert "none.json: cannot be read" in capsys.readouterr().err


def test_a_spec_of_another_shape_names_its_key(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.loads((written / SPEC_FILE).read_text())
    text["stage"]["kind"] = "rest"
    (written / SPEC_FILE).write_text(json.dumps(text))
    assert main(["data", str(written / SPEC_FILE)]) == Exit.USAGE
    assert "stage.kind: 'rest' is not one of 'train', 'evaluate'" in capsys.readouterr().err


def test_the_data_command_reports_and_imports_no_torch(written: Path) -> None:
    program = (
        "import sys; from trainer.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        (sys.executable, "-c", program, "data", str(written / SPEC_FILE)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-3:] == ["0", "False", "False"]
    report = read(DataReport, written / DATA_FILE)
    assert (report.train_rows, report.evaluation_rows, report.images, report.problems) == (1500, 297, 1797, ())


def test_a_run_does_not_go_on_where_an_image_has_changed(
    tiny_spec: Callable[..., TrainSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ranks hash the rows alone: images would be read whole by each of them."""
    spec, row = tiny_spec(), {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps([row] * spec.batch.global_batch))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    spec = replace(spec, data=replace(spec.data, builtin="", train=str(tmp_path / "train.json"), images=str(tmp_path)))
    run = Path(spec.output)
    write(spec, run / SPEC_FILE)
    assert main(["data", str(run / SPEC_FILE)]) == Exit.OK
    before = (run / DATA_FILE).read_bytes()
    state = CheckpointState(schema=SCHEMA, step=1, weights_sha256="", data_sha256="", world_size=1, spec={}, files={})
    (run / state.path).mkdir(parents=True)
    write(state, run / state.path / STATE_FILE)
    assert main(["data", str(run / SPEC_FILE)]) == Exit.OK
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    for _ in range(2):
        assert main(["data", str(run / SPEC_FILE)]) == Exit.USAGE
        said = capsys.readouterr().err
        assert "the rows or the images have changed since" in said and "data a.png: another file" in said and "--accept data" in said
        assert (run / DATA_FILE).read_bytes() == before
    write(replace(spec, accepted_changes=("data",)), run / SPEC_FILE)
    assert main(["data", str(run / SPEC_FILE)]) == Exit.OK and (run / DATA_FILE).read_bytes() != before
    (run / state.path / STATE_FILE).unlink()
    assert main(["data", str(run / SPEC_FILE)]) == Exit.OK  # nothing is gone on with


def test_every_problem_of_the_data_is_said(tiny_spec: Callable[..., TrainSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tiny_spec()
    rows = [
        {"image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
        {"messages": []},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    spec = replace(spec, data=replace(spec.data, builtin="", train=str(tmp_path / "train.json"), images=str(tmp_path)))
    write(spec, Path(spec.output) / SPEC_FILE)
    assert main(["data", str(Path(spec.output) / SPEC_FILE)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "train.json row 1" in said and "gone.png" in said and "train.json row 2" in said
    assert len(read(DataReport, Path(spec.output) / DATA_FILE).problems) == 2


def test_all_problems_are_in_a_file_of_their_own(tiny_spec: Callable[..., TrainSpec], tmp_path: Path) -> None:
    spec = tiny_spec()
    (tmp_path / "train.json").write_text(json.dumps([{"messages": []}] * 70 + [{"image": "\ud83d", "messages": []}]))
    spec = replace(spec, data=replace(spec.data, builtin="", train=str(tmp_path / "train.json"), images=str(tmp_path)))
    write(spec, Path(spec.output) / SPEC_FILE)
    assert main(["data", str(Path(spec.output) / SPEC_FILE)]) == Exit.USAGE
    lines = (Path(spec.output) / DATA_PROBLEMS_FILE).read_text().splitlines()
    report = read(DataReport, Path(spec.output) / DATA_FILE)
    assert (len(lines), report.problem_count, len(report.problems)) == (72, 72, 51)
    assert [json.loads(line)["row"] for line in lines] == [*range(1, 72), 71]
    assert main(["data", str(Path(replace_data(spec, builtin="digits").output) / SPEC_FILE)]) == Exit.OK
    assert not (Path(spec.output) / DATA_PROBLEMS_FILE).exists(), "those of an earlier check"


def replace_data(spec: TrainSpec, **changes: Any) -> TrainSpec:
    spec = replace(spec, data=replace(spec.data, train="", images="", **changes))
    write(spec, Path(spec.output) / SPEC_FILE)
    return spec


@pytest.mark.parametrize(
    ("error", "code", "with_traceback"),
    [(InputRefused("bad row"), Exit.USAGE, False), (RunFailed("disk full"), Exit.RUN, False), (ValueError("oops"), Exit.BUG, True)],
)
def test_a_rank_that_fails_says_so_in_the_folder_and_on_the_terminal(
    error: Exception, code: int, with_traceback: bool, written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert fail(read(TrainSpec, written / SPEC_FILE), error) == code
    report = read(FailureReport, written / "failure-rank3.json")
    assert (report.rank, report.code, report.kind, report.message) == (3, code, type(error).__name__, str(error))
    said = capsys.readouterr().err
    assert str(error) in said
    assert (type(error).__name__ in said) == with_traceback


def test_a_failure_that_cannot_be_written_is_still_said(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(read(TrainSpec, written / SPEC_FILE), output=str(written / "gone"))
    assert fail(spec, RunFailed("disk full")) == Exit.RUN
    assert "disk full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but the plan (spec.device.world_size) is for 1 ranks"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "'WORLD_SIZE' is not set by torchrun"),
    ],
)
def test_another_world_than_planned_is_refused(
    environ: dict[str, str], said: str, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(written / SPEC_FILE)]) == Exit.USAGE
    assert said in capsys.readouterr().err
