"""The record of a run that has ended, read strictly: whole, as it was when the run ended, and as typed objects.

    recorded = load_recorded_run(Path("runs/20261121-..."))       # raises RecordRefused, which says what is wrong with the record
    recorded.record.weights_sha256, recorded.plan.config, recorded.environment.packages, recorded.rows[0].loss

Records of every earlier schema stay readable: there is one of each in tests/golden/record.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launcher.errors import RecordRefused
from launcher.plan.plan import Plan
from launcher.record.checksums import SEAL_FILE, Seal, find_breaks
from launcher.record.metrics import read_rows
from launcher.record.reader import decode_as, read_as, read_bytes, read_lines, read_object
from launcher.record.record import DIFF_FILE, LOCK_FILE, PLAN_FILE, RECORD_FILE, SOURCE_FILE, Record
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import DataReport, EnvReport, EvaluationRow, FailureReport, Inputs, StepRow, TrainResult


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """Everything that a run left except logs, answers and checkpoints. `schema`: of the folder (RECORD_SCHEMA). `plan`: of the first attempt.
    `rows`: one per step, () unless they were asked for. What the run did not reach is None or empty."""

    folder: Path
    schema: int
    record: Record
    plan: Plan
    source: SourceState
    diff: bytes = b""
    dockerfile: str = ""
    lock: str = ""
    data: DataReport | None = None
    inputs: Inputs | None = None
    environment: EnvReport | None = None
    result: TrainResult | None = None
    rows: tuple[StepRow, ...] = ()
    evaluations: tuple[EvaluationRow, ...] = ()
    failures: tuple[FailureReport, ...] = ()


def load_recorded_run(folder: Path, *, rows: bool = True) -> RecordedRun:
    """Raises RecordRefused for a folder without a record, for a run that has not ended, and for a record that was cut short or edited, that
    lacks a file, or that a newer version wrote."""
    source = load_source(folder)
    schema = check_seal(folder, source)
    reports = {
        field: read_as(cls, folder / name)
        for field, cls, name in (
            ("data", DataReport, contract.DATA_FILE),
            ("inputs", Inputs, contract.INPUTS_FILE),
            ("environment", EnvReport, contract.ENVIRONMENT_FILE),
            ("result", TrainResult, contract.RESULT_FILE),
        )
        if (folder / name).is_file()
    }
    evaluations = folder / contract.EVALUATIONS_FILE
    recorded = RecordedRun(
        folder=folder,
        schema=schema,
        record=read_as(Record, folder / RECORD_FILE),
        plan=read_as(Plan, folder / PLAN_FILE),
        source=source,
        diff=read_bytes(folder / DIFF_FILE),
        dockerfile=read_bytes(folder / "Dockerfile").decode(errors="replace"),
        lock=read_bytes(folder / LOCK_FILE).decode(errors="replace"),
        rows=read_rows(folder / contract.METRICS_FILE) if rows else (),
        evaluations=tuple(decode_as(EvaluationRow, row, evaluations) for row in read_lines(evaluations)),
        failures=tuple(read_as(FailureReport, path) for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*")))),
        **reports,
    )
    if rows:
        refuse_lost_rows(recorded)
    return recorded


def load_source(folder: Path) -> SourceState:
    if not (folder / PLAN_FILE).is_file():
        raise RecordRefused(f"{folder} is not the folder of a run: it has no {PLAN_FILE}. See: omnilaunch runs")
    found = read_object(folder / SOURCE_FILE)
    schema = found.get("record_schema")
    if isinstance(schema, int) and schema > RECORD_SCHEMA:  # checked before the keys, since a newer version may have added some
        refuse_newer(folder / SOURCE_FILE, schema, str(found.get("commit") or ""))
    source: SourceState = decode_as(SourceState, found, folder / SOURCE_FILE)
    return source


def check_seal(folder: Path, source: SourceState) -> int:
    """The record's schema. Raises RecordRefused if the record is not as it was when its run ended."""
    path = folder / SEAL_FILE
    if path.is_file():
        schema = read_object(path, schema=2**62).get("schema")
        if isinstance(schema, int) and schema > RECORD_SCHEMA:
            refuse_newer(path, schema, source.commit)
    if not (folder / RECORD_FILE).is_file():
        raise RecordRefused(
            f"{folder}: the run has no {RECORD_FILE}: it is still running, its launcher was killed, or the file was removed. "
            f"If it is still running: omnilaunch attach {folder.name}"
        )
    if not path.is_file():
        if source.record_schema > 1:
            raise RecordRefused(f"{folder}: {SEAL_FILE} is missing, so the record cannot be verified: copy the folder again")
        return 1
    seal: Seal = read_as(Seal, path, schema=RECORD_SCHEMA)
    if broken := find_breaks(seal, folder):
        lines = "\n".join(f"  {line}" for line in broken)
        raise RecordRefused(
            f"{folder}: the record is not as it was when its run ended:\n{lines}\nCopy these files again from the machine where the run was "
            "made; a record that was changed proves nothing"
        )
    return seal.schema


def refuse_newer(path: Path, schema: int, commit: str) -> NoReturn:
    raise RecordRefused(
        f"{path} was written with record schema {schema}, this version reads 1 to {RECORD_SCHEMA}. Use the version that wrote it"
        + (f": git checkout {commit}" if commit else "")
    )


def refuse_lost_rows(recorded: RecordedRun) -> None:
    """Records of schema 1 have no checksums: this is the part of them that can be checked."""
    last = recorded.rows[-1].step if recorded.rows else 0
    if recorded.plan.spec.stage.kind == "train" and recorded.record.status == "finished" and last != recorded.record.steps:
        raise RecordRefused(
            f"{recorded.folder / contract.METRICS_FILE} ends with step {last}, but {RECORD_FILE} says {recorded.record.steps} steps: "
            "the record was cut short. Copy the folder again from the machine where the run was made"
        )
