"""A run that `launch --resume` continues, as its folder has it: the plan of the newest attempt, how it ended, and what it found.

The record may be missing: the launcher was killed, or the machine was switched off.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.plan.text import command_line
from launcher.record.metrics import read_rows
from launcher.record.reader import read_as, read_bytes, read_if_there
from launcher.record.record import (
    DIFF_FILE,
    LOCK_FILE,
    PLAN_FILE,
    RECORD_FILE,
    SOURCE_FILE,
    Attempt,
    Record,
    SourceState,
    attempt_files,
    load_attempts,
)
from launcher.record.recorded_run import RecordedRun
from launcher.record.source import RECORD_SCHEMA
from trainer import contract
from trainer.contract import ENVIRONMENT_FILE, METRICS_FILE, SCHEMA, EnvReport


@dataclass(frozen=True, kw_only=True)
class PausedRun:
    """`recorded.plan`: of the newest attempt. `record`: how the run ended, None without a record; `recorded.record` is then an empty one."""

    recorded: RecordedRun
    record: Record | None
    attempts: tuple[Attempt, ...]
    started: datetime

    @property
    def folder(self) -> Path:
        return self.recorded.folder

    @property
    def plan(self) -> Plan:
        return self.recorded.plan

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    @property
    def is_finished(self) -> bool:
        return self.record is not None and self.record.status == "finished"


def read_paused_run(folder: Path) -> PausedRun:
    """Raises RecordRefused for a plan or a record that this version cannot read, and ConfigRefused for a run that cannot be resumed."""
    first, *later = (read_as(Plan, path) for path in (folder / PLAN_FILE, *attempt_files(folder, PLAN_FILE)))
    plan: Plan = later[-1] if later else first
    record: Record | None = read_as(Record, folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
    refuse_stage(plan)
    refuse_moved(plan, folder)
    if record is not None and record.status == "refused":
        refuse_unstarted(plan, folder)
    started = datetime.fromisoformat(record.started_at) if record else datetime.fromtimestamp((folder / PLAN_FILE).stat().st_mtime, UTC)
    source = read_if_there(SourceState, folder / SOURCE_FILE) or SourceState(commit="", dirty=False)
    recorded = RecordedRun(
        folder=folder,
        schema=RECORD_SCHEMA,
        record=record or empty_record(plan, source, started),
        plan=plan,
        source=source,
        diff=read_bytes(folder / DIFF_FILE),
        lock=read_bytes(folder / LOCK_FILE).decode(errors="replace"),
        environment=newest_environment(folder),
    )
    return PausedRun(recorded=recorded, record=record, attempts=load_attempts(folder), started=started)


def refuse_stage(plan: Plan) -> None:
    if plan.spec.stage.kind != "train":
        raise ConfigRefused(
            f"run {plan.run_id} is of stage {plan.spec.stage.name}, which does not train: it has no checkpoint to resume from. Start it again: "
            f"{command_line('launch', *plan.overrides)}"
        )


def refuse_moved(plan: Plan, folder: Path) -> None:
    """A run on this machine names its own folder in its spec, its checkpoints and its containers."""
    if plan.is_local and Path(plan.spec.output).resolve() != folder.resolve():
        raise ConfigRefused(
            f"run {plan.run_id} was made in {plan.spec.output}, and this folder is {folder}. Move it back there; or start a new run from its "
            f"weights: stage.checkpoint={folder}"
        )


def refuse_unstarted(plan: Plan, folder: Path) -> None:
    """A resumption may have been refused too: then there are rows, or an earlier attempt."""
    if not (load_attempts(folder) or read_rows(folder / METRICS_FILE)):
        raise ConfigRefused(
            f"run {plan.run_id} was refused before its first step, so there is nothing to resume. Fix what it was refused for (omnilaunch report "
            f"{plan.run_id} shows it), and start a new run: {command_line('launch', *plan.overrides)}"
        )


def newest_environment(folder: Path) -> EnvReport | None:
    """Of the newest attempt that has one."""
    found = [folder / ENVIRONMENT_FILE, *reversed(attempt_files(folder, ENVIRONMENT_FILE))]
    reports = (read_if_there(EnvReport, path) for path in found)
    report: EnvReport | None = next((report for report in reports if report is not None), None)
    return report


def empty_record(plan: Plan, source: SourceState, started: datetime) -> Record:
    """Of a run that has none: what planning takes from a record is its id."""
    data = {
        "run_id": plan.run_id,
        "schema": SCHEMA,
        "status": "stopped",
        "exit_code": 0,
        "seconds": 0.0,
        "steps": 0,
        "forced": "",
        "image": "",
    }
    times = {"started_at": started.isoformat(), "ended_at": started.isoformat()}
    none = dict.fromkeys(("train_seconds", "samples_per_s", "final_loss", "failure"))
    texts = dict.fromkeys(("checkpoint", "weights_sha256", "data_sha256"), "")
    record: Record = contract.decode(Record, {**data, **times, **none, **texts, "evaluation": {}, "nodes": []} | {"source": vars(source)})
    return record
