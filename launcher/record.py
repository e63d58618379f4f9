"""`runs/<run_id>/`: the plan before the first effect, the result after the last. Never overwritten, never written by halves."""

import json
import subprocess
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConfigRefused
from launcher.gang import NodeResult
from launcher.plan import Plan, to_plain
from launcher.schema import Config
from trainer import contract
from trainer.contract import SCHEMA, DataReport, FailureReport, SpecError, StepRow, TrainResult

PLAN_FILE = "plan.json"
CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"
RECORD_FILE = "result.json"
Status = Literal["finished", "stopped", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """The code that ran. `dirty`: the tree had changes that the commit does not hold; '' commit: not a git tree."""

    commit: str
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed first. `rank` -1: no rank said why, so `tail` holds the last lines of the node's log."""

    host: str
    rank: int
    code: int
    message: str
    log: str
    tail: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a run in one object; the raw rows lie beside it. Times are UTC, ISO 8601."""

    schema: int
    run_id: str
    status: Status
    exit_code: int
    started_at: str
    ended_at: str
    seconds: float
    steps: int
    train_seconds: float | None
    samples_per_s: float | None
    final_loss: float | None
    evaluation: dict[str, float]
    checkpoint: str
    weights_sha256: str
    data_sha256: str
    source: SourceState
    image: str
    forced: str
    nodes: tuple[NodeResult, ...]
    failure: Failure | None


def name_run(config: Config, now: datetime) -> str:
    """`20261121-010203-tiny_llava-full-cpu`: sorts by time and says what it is."""
    return f"{now:%Y%m%d-%H%M%S}-{config.model.name}-{config.stage.name}-{config.hardware.name}"


def open_run(plan: Plan, source: SourceState) -> Path:
    """Make the run's folder and write what is known before anything happens. Raises ConfigRefused if the folder is there."""
    folder = Path(plan.folder)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigRefused(f"{folder} is there already: a run is never overwritten. Leave the run id out, or give another.") from error
    (folder / "logs").mkdir()
    plain = to_plain(plan)
    contract.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", folder / PLAN_FILE)
    contract.write_text(json.dumps(plain["config"], indent=2, ensure_ascii=False) + "\n", folder / CONFIG_FILE)
    contract.write_text(plan.image.dockerfile, folder / "Dockerfile")
    contract.write(source, folder / SOURCE_FILE)
    contract.write(plan.spec, folder / contract.SPEC_FILE)
    return folder


def close_run(
    plan: Plan,
    source: SourceState,
    status: Status,
    code: int,
    *,
    started: datetime,
    ended: datetime,
    nodes: tuple[NodeResult, ...],
    failure: Failure | None,
) -> Record:
    """Gather what the trainer left, write result.json, and give it back. Missing parts of a failed run are no error."""
    folder = Path(plan.folder)
    result: TrainResult | None = read_if_there(TrainResult, folder / contract.RESULT_FILE)
    data: DataReport | None = read_if_there(DataReport, folder / contract.DATA_FILE)
    rows = read_rows(folder / contract.METRICS_FILE)
    record = Record(
        schema=SCHEMA,
        run_id=plan.run_id,
        status=status,
        exit_code=code,
        started_at=started.isoformat(timespec="milliseconds"),
        ended_at=ended.isoformat(timespec="milliseconds"),
        seconds=round((ended - started).total_seconds(), 3),
        steps=result.steps if result else (rows[-1].step if rows else 0),
        train_seconds=result.seconds if result else None,
        samples_per_s=result.samples_per_s if result else None,
        final_loss=result.final_loss if result else (rows[-1].loss if rows else None),
        evaluation=result.evaluation if result else {},
        checkpoint=result.checkpoint if result else last_checkpoint(folder),
        weights_sha256=result.weights_sha256 if result else "",
        data_sha256=data.sha256 if data else "",
        source=source,
        image=plan.image.tag if plan.config.cluster.runtime == "docker" else "",
        forced=plan.config.run.force,
        nodes=nodes,
        failure=failure,
    )
    contract.write(record, folder / RECORD_FILE)
    return record


def read_if_there(cls: Any, path: Path) -> Any:
    """The dataclass in `path`, or None when the trainer did not get that far."""
    try:
        return contract.read(cls, path) if path.exists() else None
    except SpecError:
        return None  # cut short by what ended the run; the raw file stays where it is


def recorded_images(runs: Path) -> set[str]:
    """Tags of the images that records name: a rerun asks for them."""
    records = (read_if_there(Record, path) for path in runs.glob(f"*/{RECORD_FILE}"))
    return {record.image for record in records if record is not None and record.image}


def read_rows(path: Path) -> tuple[StepRow, ...]:
    """Whole rows of metrics.jsonl; a last line without its newline is still being written."""
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return tuple(contract.decode(StepRow, json.loads(line)) for line in lines)


def last_checkpoint(folder: Path) -> str:
    """The newest whole checkpoint of a run, relative to its folder; '' when there is none. Half-written ones have hidden names."""
    whole = sorted(path.name for path in (folder / contract.CHECKPOINTS).glob("step-*"))
    return f"{contract.CHECKPOINTS}/{whole[-1]}" if whole else ""


def find_failure(plan: Plan, nodes: tuple[NodeResult, ...]) -> Failure | None:
    """The rank that failed first, by its own report; else the node that ended first with an error, by its last lines."""
    folder = Path(plan.folder)
    reports: list[FailureReport] = [
        report
        for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*")))
        if (report := read_if_there(FailureReport, path)) is not None
    ]
    if reports:
        first = min(reports, key=lambda report: report.unix_s)
        rank = first.rank // plan.spec.device.devices_per_node
        log = folder / "logs" / f"node{rank}.log"
        tail = tuple(first.traceback.splitlines()[-10:])
        return Failure(host=plan.commands[rank].host, rank=first.rank, code=first.code, message=first.message, log=str(log), tail=tail)
    failed = sorted((node for node in nodes if node.code), key=lambda node: node.seconds)
    if not failed:
        return None
    log = folder / "logs" / f"node{failed[0].node_rank}.log"
    tail = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]) if log.exists() else ()
    message = f"the ranks ended with exit code {failed[0].code} and left no report"
    return Failure(host=failed[0].host, rank=-1, code=failed[0].code, message=message, log=str(log), tail=tail)


def read_source(project: Path) -> SourceState:
    """Commit and dirty flag of the project's tree, asked of git."""
    try:
        commit = subprocess.run(("git", "rev-parse", "HEAD"), cwd=project, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(("git", "status", "--porcelain"), cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return SourceState(commit="", dirty=False)
    return SourceState(commit=commit, dirty=bool(changed))


def resolve_checkpoint(config: Config, runs: Path) -> Config:
    """A run id in `stage.checkpoint` stands for that run's newest whole checkpoint; anything else is a path. Raises ConfigRefused
    for a run that saved none."""
    text = config.stage.checkpoint
    folder = runs / text
    if not text or "/" in text or not (folder / PLAN_FILE).is_file():
        return config
    newest = last_checkpoint(folder)
    if not newest:
        raise ConfigRefused(f"stage.checkpoint={text}: that run saved no checkpoint. See {folder / RECORD_FILE}")
    return replace(config, stage=replace(config.stage, checkpoint=str(folder / newest)))


def utc_now() -> datetime:
    return datetime.now(UTC)
