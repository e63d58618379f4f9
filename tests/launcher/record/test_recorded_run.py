"""A record is read completely or refused, in every schema up to now."""

import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import RecordRefused
from launcher.plan.plan import Plan
from launcher.record.record import AttemptOutcome, close_run, open_run
from launcher.record.recorded_run import load_recorded_run
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import StepRow

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "record"
NOW = datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)
SOURCE = SourceState(commit="c0ffee", dirty=True, diff_bytes=4, record_schema=RECORD_SCHEMA)
ROWS = tuple(
    StepRow(step=step, steps=2, loss=1.5 / step, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)
    for step in (1, 2)
)


@pytest.fixture
def sealed(plan_for: Callable[..., Plan], tmp_path: Path) -> Path:
    """A record as it is written today, without a trainer."""
    lock = tmp_path / "lock"
    lock.write_text("torch==2.13.0\n")
    folder = open_run(plan_for(f"cluster.root={tmp_path}", "run.steps=200"), SOURCE, diff=b"diff", lock=lock)
    (folder / contract.METRICS_FILE).write_text("".join(f"{json.dumps(row.__dict__)}\n" for row in ROWS))
    (folder / "attempts/1").mkdir(parents=True)
    (folder / "attempts/1/environment.json").write_text("{}\n")
    plan = plan_for(f"cluster.root={tmp_path}", "run.steps=200")
    close_run(plan, SOURCE, AttemptOutcome(status="stopped", code=130), started=NOW, ended=NOW)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("folder", sorted(path for path in GOLDEN.iterdir() if path.is_dir()), ids=lambda path: f"schema-{path.name}")
def test_every_earlier_schema_is_readable(folder: Path) -> None:
    recorded = load_recorded_run(folder)
    assert recorded.schema == int(folder.name)
    assert [row.step for row in recorded.rows] == [1, 2, 3] and recorded.record.steps == 3
    assert recorded.record.final_loss == recorded.rows[-1].loss == recorded.result.final_loss  # type: ignore[union-attr]
    assert recorded.data is not None and recorded.data.sha256 == recorded.record.data_sha256
    assert recorded.environment is not None and recorded.environment.packages["torch"]
    assert recorded.plan.spec.seed == 1 and recorded.plan.image.dockerfile == recorded.dockerfile
    assert len(recorded.evaluations) == 1 and recorded.failures == ()


def test_there_is_a_golden_record_of_every_schema() -> None:
    assert {int(path.name) for path in GOLDEN.iterdir() if path.is_dir()} == set(range(1, RECORD_SCHEMA + 1))


def test_a_record_holds_diff_and_lock(sealed: Path) -> None:
    recorded = load_recorded_run(sealed)
    assert recorded.schema == RECORD_SCHEMA and recorded.source == SOURCE
    assert (recorded.diff, recorded.lock, recorded.rows) == (b"diff", "torch==2.13.0\n", ROWS)
    assert load_recorded_run(sealed, rows=False).rows == ()


def test_a_complete_copy_in_another_folder_is_valid(sealed: Path, tmp_path: Path) -> None:
    shutil.copytree(sealed, tmp_path / "copy")
    (tmp_path / "copy/logs/more.log").write_text("logs are no part of it")
    assert load_recorded_run(tmp_path / "copy").record.run_id == "R"


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a result edited by hand": (lambda run: edit(run / "result.json", '"steps": 2', '"steps": 9'), r"result\.json was edited"),
    "a loss edited by hand": (lambda run: edit(run / "metrics.jsonl", "1.5", "1.4"), r"metrics\.jsonl was edited"),
    "rows cut short": (lambda run: (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-9]), r"cut short: \d+ of \d+"),
    "a plan edited by hand": (lambda run: edit(run / "plan.json", '"seed": 1', '"seed": 2'), r"plan\.json was edited"),
    "rows that are missing": (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl is missing"),
    "an attempt that is missing": (lambda run: shutil.rmtree(run / "attempts"), r"attempts/1/environment\.json is missing"),
    "a failure that was added": (lambda run: (run / "failure-rank0.json").write_text("{}"), r"failure-rank0\.json was added"),
    "a seal edited by hand": (lambda run: edit(run / "seal.json", '"bytes": 4', '"bytes": 5'), r"seal\.json itself was edited"),
    "a seal that is missing": (lambda run: (run / "seal.json").unlink(), r"seal\.json is missing"),
    "half a seal": (lambda run: (run / "seal.json").write_bytes((run / "seal.json").read_bytes()[:99]), r"seal\.json was cut short"),
    "a result that is missing": (lambda run: (run / "result.json").unlink(), r"no result\.json: it is still running"),
    "a plan that is missing": (lambda run: (run / "plan.json").unlink(), r"is not the folder of a run: it has no plan\.json"),
    "a source that is missing": (lambda run: (run / "source.json").unlink(), r"source\.json is missing"),
    "a newer seal": (lambda run: edit(run / "seal.json", '"schema": 2', '"schema": 3'), r"schema 3, this version reads 1 to 2.*c0ffee"),
    "a newer source that says more": (
        lambda run: edit(run / "source.json", '"record_schema": 2', '"record_schema": 9, "signed": true'),
        r"schema 9.*git checkout c0ffee",
    ),
    "a newer source": (lambda run: edit(run / "source.json", '"record_schema": 2', '"record_schema": 9'), r"schema 9.*git checkout c0ffee"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_record_that_was_changed_is_refused(sealed: Path, name: str) -> None:
    damage, said = BREAKS[name]
    damage(sealed)
    with pytest.raises(RecordRefused, match=f"(?s){said}"):
        load_recorded_run(sealed)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("result.json", '"schema": 1', '"schema": 2', "schema 2, this version reads"),
        ("result.json", '"steps": 3,', "", "missing keys"),
        ("environment.json", "{", "", "cut short or edited"),
        ("plan.json", '"run_id"', '"runid"', "unknown keys"),
        ("metrics.jsonl", '{"step": 3, "steps"', '{"step": 3, "st', "ends with step 2.*cut short"),
    ],
)
def test_a_record_without_a_seal_is_checked_as_far_as_possible(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    shutil.copytree(GOLDEN / "1", tmp_path / "run")
    edit(tmp_path / "run" / name, old, new)
    with pytest.raises(RecordRefused, match=f"(?s){name}.*{said}"):
        load_recorded_run(tmp_path / "run")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecordRefused, match="is not the folder of a run"):
            load_recorded_run(folder)


def test_a_disk_that_is_full_loses_nothing(plan_for: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal is not written, and so neither is the result: the run has not ended, and can be closed again when there is room."""
    plan = plan_for(f"cluster.root={tmp_path}")
    folder = open_run(plan, SOURCE)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    write = contract.write_text

    def full(text: str, path: Path) -> None:
        if path.name == "seal.json":
            raise OSError(28, "No space left on device")
        write(text, path)

    monkeypatch.setattr(contract.codec, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        close_run(plan, SOURCE, AttemptOutcome(status="finished", code=0), started=NOW, ended=NOW)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    with pytest.raises(RecordRefused, match=r"no result\.json"):
        load_recorded_run(folder)
    monkeypatch.undo()
    close_run(plan, SOURCE, AttemptOutcome(status="stopped", code=130), started=NOW, ended=NOW)
    assert load_recorded_run(folder).record.status == "stopped"


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path: Path) -> None:
    from launcher.record.metrics import read_rows

    line = json.dumps(ROWS[0].__dict__)
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n" * 100_000 + line[:40])
    began = time.process_time()
    assert len(read_rows(path)) == 100_000
    assert time.process_time() - began < 10, "it takes about one"
