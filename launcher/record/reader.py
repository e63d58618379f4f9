"""A run's folder read back as one typed object, whole or not at all. Who reruns, compares or reports reads runs through here alone.

    archive = load_archive(Path("runs/20261121-..."))       # raises RecordRefused, which says what is wrong with the record
    archive.record.weights_sha256, archive.plan.config, archive.environment.packages, archive.rows[0].loss

Records of every earlier schema are read for ever: golden ones are in tests/golden/record.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launcher.errors import RecordRefused
from launcher.plan.plan import Plan
from launcher.record.checksums import SEAL_FILE, Seal, find_breaks
from launcher.record.record import LOCK_FILE, PLAN_FILE, RECORD_FILE, SOURCE_FILE, Record
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import SCHEMA, DataReport, EnvReport, EvaluationRow, FailureReport, Inputs, SpecError, StepRow, TrainResult

ROW_KEYS = frozenset(StepRow.__dataclass_fields__)
NUMBERS = ("loss", "lr", "grad_norm", "seconds", "loss_scale")
COUNTS = ("step", "steps", "samples", "tokens", "peak_bytes")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Everything that a run left but its logs, samples and checkpoints. `schema`: of the folder (launcher.record.source.RECORD_SCHEMA); `plan`: the
    first attempt's; None: the run did not get that far. `rows`: of every step that stands, () where they were not asked for."""

    folder: Path
    schema: int
    record: Record
    plan: Plan
    source: SourceState
    diff: bytes
    dockerfile: str
    lock: str
    data: DataReport | None
    inputs: Inputs | None
    environment: EnvReport | None
    result: TrainResult | None
    rows: tuple[StepRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    failures: tuple[FailureReport, ...]


def load_archive(folder: Path, *, rows: bool = True) -> Archive:
    """Read the record in `folder`. Raises RecordRefused for a folder without one, for a run that has not ended, for a record that was cut
    short or edited since, that lacks a file, or that a newer version wrote."""
    source = load_source(folder)
    schema = check_seal(folder, source)
    record: Record = load(Record, folder / RECORD_FILE)
    archive = Archive(
        folder=folder,
        schema=schema,
        record=record,
        plan=load(Plan, folder / PLAN_FILE),
        source=source,
        diff=read_bytes(folder / "source.diff"),
        dockerfile=read_bytes(folder / "Dockerfile").decode(errors="replace"),
        lock=read_bytes(folder / LOCK_FILE).decode(errors="replace"),
        data=load_if_there(DataReport, folder / contract.DATA_FILE),
        inputs=load_if_there(Inputs, folder / contract.INPUTS_FILE),
        environment=load_if_there(EnvReport, folder / contract.ENVIRONMENT_FILE),
        result=load_if_there(TrainResult, folder / contract.RESULT_FILE),
        rows=load_rows(folder / contract.METRICS_FILE) if rows else (),
        evaluations=load_lines(EvaluationRow, folder / contract.EVALUATIONS_FILE),
        failures=tuple(load(FailureReport, path) for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*")))),
    )
    if rows:
        refuse_lost_rows(archive)
    return archive


def load_source(folder: Path) -> SourceState:
    if not (folder / PLAN_FILE).is_file():
        raise RecordRefused(f"{folder} is not the folder of a run: it has no {PLAN_FILE}. See: omnilaunch runs")
    found = read_json(folder / SOURCE_FILE)
    schema = found.get("record_schema") if isinstance(found, dict) else None
    if isinstance(schema, int) and schema > RECORD_SCHEMA:  # before its keys are looked at, some of which may be new
        refuse_newer(folder / SOURCE_FILE, schema, str(found.get("commit") or ""))
    source: SourceState = decode(SourceState, found, folder / SOURCE_FILE)
    return source


def check_seal(folder: Path, source: SourceState) -> int:
    """The record's schema. Raises RecordRefused."""
    if (folder / SEAL_FILE).is_file():
        found = read_json(folder / SEAL_FILE)
        if isinstance(found, dict) and isinstance(found.get("schema"), int) and found["schema"] > RECORD_SCHEMA:
            refuse_newer(folder / SEAL_FILE, found["schema"], source.commit)
    if not (folder / RECORD_FILE).is_file():
        raise RecordRefused(
            f"{folder}: the run has no {RECORD_FILE}: it is under way, its launcher was killed, or the file was removed. "
            f"Next, where it is under way: omnilaunch attach {folder.name}"
        )
    if not (folder / SEAL_FILE).is_file():
        if source.record_schema > 1:
            raise RecordRefused(
                f"{folder}: {SEAL_FILE} is missing, so that nobody can tell whether the record is whole: copy the folder again"
            )
        return 1
    seal: Seal = decode(Seal, read_json(folder / SEAL_FILE), folder / SEAL_FILE)
    if broken := find_breaks(seal, folder):
        lines = "\n".join(f"  {line}" for line in broken)
        raise RecordRefused(
            f"{folder}: the record is not as it was when its run ended:\n{lines}\nBring those files back from where the run was made; a "
            "record that was changed proves nothing"
        )
    return seal.schema


def refuse_newer(path: Path, schema: int, commit: str) -> NoReturn:
    raise RecordRefused(
        f"{path}: written with record schema {schema}, this version reads 1 to {RECORD_SCHEMA}. Use the version that wrote it"
        + (f": git checkout {commit}" if commit else "")
    )


def refuse_lost_rows(archive: Archive) -> None:
    """What a seal would tell, of records that have none."""
    last = archive.rows[-1].step if archive.rows else 0
    if archive.plan.spec.stage.kind == "train" and archive.record.status == "finished" and last != archive.record.steps:
        raise RecordRefused(
            f"{archive.folder / contract.METRICS_FILE} ends with step {last}, {RECORD_FILE} says that {archive.record.steps} were done: "
            "the record was cut short. Copy the folder again from where the run was made"
        )


# ---------------------------------------------------------------------------------------------------------------- files


def load(cls: Any, path: Path) -> Any:
    return decode(cls, read_json(path), path)


def load_if_there(cls: Any, path: Path) -> Any:
    return load(cls, path) if path.is_file() else None


def load_lines(cls: Any, path: Path) -> tuple[Any, ...]:
    return tuple(decode(cls, parse(line, path), path) for line in read_bytes(path).splitlines())


def decode(cls: Any, data: Any, path: Path) -> Any:
    if isinstance(data, dict) and cls is not Seal and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
        refuse_newer(path, data["schema"], "")
    try:
        return contract.decode(cls, data)
    except (SpecError, OverflowError) as error:
        raise RecordRefused(f"{path} is not what this version reads: {error}") from error


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise RecordRefused(f"{path} is missing: copy the run's folder again, whole")
    return parse(read_bytes(path), path)


def parse(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordRefused(f"{path} was cut short or edited: {error}. Copy the run's folder again, whole") from error


def read_bytes(path: Path) -> bytes:
    """b'' where there is none."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise RecordRefused(f"{path} cannot be read: {error.strerror}") from error


def load_rows(path: Path) -> tuple[StepRow, ...]:
    """Of 100,000 steps in about a second. A torn row is passed over, as the trainer does when it goes on: a disk that was full leaves one."""
    return tuple(row for line in read_bytes(path).splitlines() if (row := read_row(line)) is not None)


def read_row(line: bytes) -> StepRow | None:
    """contract.decode, which asks each class for its types anew, would take ten times as long."""
    try:
        data = json.loads(line)
        if not (isinstance(data, dict) and data.keys() <= ROW_KEYS):
            return None
        floats = all(type(data[key]) in (float, int) for key in NUMBERS if key in data)
        counts = all(type(data[key]) is int for key in COUNTS)
        return StepRow(**data) if floats and counts else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
