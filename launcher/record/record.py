"""The record of a run in `runs/<run_id>/`: what it is made of, how it is opened before anything is started and closed when the run has ended.

A record is never overwritten, and each file of it is written completely or not at all. `reader` and `recorded_run` read it back.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from launcher.config.schema import Config, Node
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan, encode_spec, to_plain
from launcher.record.checksums import SEAL_FILE, make_seal
from launcher.record.metrics import read_curve, read_rows
from launcher.record.reader import read_if_there, read_object
from launcher.record.run_name import LAST, PLAN_FILE as PLAN_FILE, RECORD_FILE as RECORD_FILE, RUN_ID
from launcher.record.source import SourceState as SourceState
from launcher.redact import mask_credentials
from trainer import contract
from trainer.contract import SCHEMA, DataReport, EnvReport, TrainResult, WeightsLineage

NAMES = 60  # characters of the names in an id
CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"
DIFF_FILE = "source.diff"
LOCK_FILE = "lock.txt"
IMAGES_FILE = "images.json"
RECORDED_INPUTS_FILE = "recorded_inputs.json"  # in a rerun: the inputs.json of the original run
ATTEMPTS = "attempts"  # attempts/<number>/: what an attempt left that was followed by another one, and the plan of the one that follows
ATTEMPT_FILE = "attempt.json"
RESUMPTION_FILE = "resumption.json"  # in the folder of an attempt that `launch --resume` started
Status = Literal["finished", "stopped", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """The run that a rerun repeats. `older`: the rerun uses the trainer of that run, which refuses keys of the spec that it does not know."""

    folder: Path
    older: bool = False


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """How the processes of a run on one node ended. `killed`: the launcher had to kill them; processes that ended by
    themselves keep their own exit code. `lost`: the node stopped responding.
    `left`: why processes of the run may still be on the node, '' if none are."""

    host: str
    node_rank: int
    code: int
    seconds: float
    killed: bool
    lost: bool = False
    left: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed first. `rank` -1: no rank reported an error, and `tail` has the last lines of the node's log. `meaning` and `fix` (what to
    do) are '' if the failure is not a known one."""

    host: str
    rank: int
    code: int
    message: str
    log: str
    tail: tuple[str, ...]
    meaning: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class AttemptOutcome:
    """`unchecked`: why the data was not checked to its end; '' if it was."""

    status: Status
    code: int
    nodes: tuple[NodeResult, ...] = ()
    failure: Failure | None = None
    unchecked: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run that was followed by another start. `steps`: the last step in metrics.jsonl. `status`: how it ended; killed: its
    launcher ended without a record."""

    number: int
    started_at: str
    seconds: float
    steps: int
    nodes: tuple[NodeResult, ...]
    failure: Failure | None
    status: Literal["finished", "stopped", "failed", "refused", "killed"] = "failed"


@dataclass(frozen=True, kw_only=True)
class ChangedSetting:
    """A setting that is not what it was before a run was resumed. `kind`: the one that --accept named; '' if it changes nothing that the run
    learns."""

    key: str
    old: str
    new: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """How `launch --resume` started attempt number `attempt`. `step`: the last step of the checkpoint, 0 for none. `accepted`: kinds of
    differences that the user accepted."""

    attempt: int
    started_at: str
    step: int
    overrides: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    changes: tuple[ChangedSetting, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a run in one object. Times are UTC, ISO 8601. `seconds`: without the pauses before a resumption."""

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
    attempts: tuple[Attempt, ...] = ()  # all but the last
    origin: WeightsLineage = field(default_factory=WeightsLineage)  # the weights that the run began with, as the trainer found them
    rerun_of: str = ""  # the run that this one repeats
    accepted: tuple[str, ...] = ()  # kinds of differences from that run that were accepted (--accept)
    image_id: str = ""  # reported by the engines of the nodes; '' without containers
    config_sha256: str = ""  # of config.json
    lock_sha256: str = ""
    inputs_sha256: str = ""  # of inputs.json, which has the hash of every file that the run read
    resumptions: tuple[Resumption, ...] = ()
    ended: str = ""  # why a finished run has not done all steps of its plan
    data_unchecked: str = ""  # why the data check did not end


def name_run(config: Config, now: datetime, *, pid: int) -> str:
    """`20261121-010203-tiny_llava-full-cpu-3f0a`: sorts by time and says what the run is. The suffix differs from that of a run that another
    launcher starts in the same second. Of names from a foreign record only what an id may have is taken."""
    suffix = sha256(f"{now.isoformat()} {pid}".encode()).hexdigest()[:4]
    names = f"{config.model.name}-{config.stage.name}-{config.hardware.name}"
    return f"{now:%Y%m%d-%H%M%S}-{re.sub('[^A-Za-z0-9_.-]', '_', names)[:NAMES]}-{suffix}"


def valid_run_id(text: str) -> str:
    """The text itself. Raises ConfigRefused if it cannot be a run id."""
    if not RUN_ID.fullmatch(text):
        raise ConfigRefused(f"--run-id {text!r}: a run id is 1 to 100 letters, digits, '_', '.' and '-', and begins with a letter or digit")
    if text == LAST:
        raise ConfigRefused(f"--run-id {text}: this word means the newest run, wherever a run is named. Choose another id")
    return text


def open_run(plan: Plan, source: SourceState, *, diff: bytes = b"", lock: Path | None = None, original: OriginalRun | None = None) -> Path:
    """Make the run's folder and write what is known before anything is started. `lock`: the lock file of the image's packages. Raises
    ConfigRefused if the folder exists or cannot be made."""
    folder = Path(plan.folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and error.filename == str(folder):
            raise ConfigRefused(
                f"{folder} exists already: a run is never overwritten. To continue it, also with more steps: omnilaunch launch --resume {plan.run_id} "
                "[run.steps=N]. For a new run leave out --run-id, or give another one."
            ) from error
        raise ConfigRefused(f"{folder} cannot be made: {error.strerror}. Choose another folder with cluster.root=FOLDER.") from error
    (folder / "logs").mkdir()
    plain = to_plain(plan)
    contract.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", folder / PLAN_FILE)
    contract.write_text(json.dumps(plain["config"], indent=2, ensure_ascii=False) + "\n", folder / CONFIG_FILE)
    contract.write_text(plan.image.dockerfile, folder / "Dockerfile")
    contract.write(source, folder / SOURCE_FILE)
    if diff:
        (folder / DIFF_FILE).write_bytes(diff)
    if lock is not None and lock.is_file():
        shutil.copyfile(lock, folder / LOCK_FILE)
    older = original.folder / contract.SPEC_FILE if original and original.older else None
    contract.write_text(encode_spec(plan.spec, like=older), folder / contract.SPEC_FILE)
    if plan.is_local and plan.spec.waits_for_check and not older:
        (folder / contract.DATA_PENDING_FILE).touch()
    if original and (original.folder / contract.INPUTS_FILE).is_file():
        shutil.copyfile(original.folder / contract.INPUTS_FILE, folder / RECORDED_INPUTS_FILE)
    return folder


def close_run(plan: Plan, source: SourceState, outcome: AttemptOutcome, *, started: datetime, ended: datetime) -> Record:
    """Gather what the trainer left, write result.json, and return it. A run that failed may have left nothing."""
    folder = Path(plan.folder)
    result: TrainResult | None = read_if_there(TrainResult, folder / contract.RESULT_FILE)
    rows = read_rows(folder / contract.METRICS_FILE)
    speed = read_curve(folder / contract.METRICS_FILE).speed if rows else None
    record = Record(
        schema=SCHEMA,
        run_id=plan.run_id,
        status=outcome.status,
        exit_code=outcome.code,
        started_at=started.isoformat(timespec="milliseconds"),
        ended_at=ended.isoformat(timespec="milliseconds"),
        seconds=seconds_worked(folder, started, ended),
        steps=result.steps if result else (rows[-1].step if rows else 0),
        train_seconds=result.seconds if result else None,
        samples_per_s=speed.samples_per_s if speed else result.samples_per_s if result else None,
        final_loss=result.final_loss if result else (rows[-1].loss if rows else None),
        evaluation=result.evaluation if result else {},
        checkpoint=result.checkpoint if result else last_checkpoint(folder),
        weights_sha256=result.weights_sha256 if result else "",
        source=source,
        image=plan.image.tag if plan.config.cluster.runtime == "docker" else "",
        forced=plan.config.run.force,
        nodes=outcome.nodes,
        failure=outcome.failure,
        attempts=load_attempts(folder),
        resumptions=load_resumptions(folder),
        ended=result.ended if result else "",
        data_unchecked=outcome.unchecked,
        **identity_of(plan, folder),
    )
    written = write_record(record, folder)
    (folder / contract.DATA_PENDING_FILE).unlink(missing_ok=True)
    return written


def identity_of(plan: Plan, folder: Path) -> dict[str, Any]:
    """What the run used: data, initial weights, image, config, lock and inputs; and the run that it repeats."""
    data: DataReport | None = read_if_there(DataReport, folder / contract.DATA_FILE)
    environment: EnvReport | None = read_if_there(EnvReport, folder / contract.ENVIRONMENT_FILE)
    files = {"config_sha256": folder / CONFIG_FILE, "inputs_sha256": folder / contract.INPUTS_FILE}
    hashes = {name: sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for name, path in files.items()}
    return {
        **hashes,
        "data_sha256": data.sha256 if data else "",
        "origin": environment.origin if environment else WeightsLineage(),
        "rerun_of": plan.rerun_of,
        "accepted": plan.accepted,
        "image_id": ", ".join(dict.fromkeys(map(str, read_object(folder / IMAGES_FILE, []).values()))),
        "lock_sha256": plan.image.files.get(LOCK_FILE, ""),
    }


def keep_images(images: dict[str, str], folder: Path) -> None:
    """`images`: host -> id of the run's image in the engine of that host."""
    contract.write_text(json.dumps(images, indent=2) + "\n", folder / IMAGES_FILE)


def write_record(record: Record, folder: Path) -> Record:
    """Write seal.json, then result.json, and return what result.json holds: without the credentials of URLs, which pip may print when it
    fails. In this order, a run with a result has a seal; if result.json cannot be written, the run has not ended."""
    masked: Record = contract.decode(Record, mask_credentials(asdict(record)))
    text = contract.encode(masked)
    contract.write(make_seal(folder, record.run_id, unwritten={RECORD_FILE: text.encode()}), folder / SEAL_FILE)
    contract.write_text(text, folder / RECORD_FILE)
    return masked


# ------------------------------------------------------------------------------------------------- attempts and checkpoints


def attempt_files(folder: Path, name: str) -> tuple[Path, ...]:
    """attempts/<number>/`name` of every attempt that has this file, in their order."""
    numbered = [path for path in (folder / ATTEMPTS).glob(f"*/{name}") if path.parent.name.isdecimal()]
    return tuple(sorted(numbered, key=lambda path: int(path.parent.name)))


def load_attempts(folder: Path) -> tuple[Attempt, ...]:
    """The attempts before the last one, in their order."""
    found = (read_if_there(Attempt, path) for path in attempt_files(folder, ATTEMPT_FILE))
    return tuple(attempt for attempt in found if attempt is not None)


def next_number(attempts: Sequence[Attempt]) -> int:
    """The number of the attempt that follows these: one of them may have been removed."""
    return max((attempt.number for attempt in attempts), default=0) + 1


def load_resumptions(folder: Path) -> tuple[Resumption, ...]:
    found = (read_if_there(Resumption, path) for path in attempt_files(folder, RESUMPTION_FILE))
    return tuple(resumption for resumption in found if resumption is not None)


def seconds_worked(folder: Path, started: datetime, ended: datetime) -> float:
    """How long a run took, without the time in which it was stopped and waited for its resumption."""
    resumptions = load_resumptions(folder)
    if not resumptions:
        return round((ended - started).total_seconds(), 3)
    earlier = sum(attempt.seconds for attempt in load_attempts(folder) if attempt.number < resumptions[-1].attempt)
    return round(earlier + (ended - datetime.fromisoformat(resumptions[-1].started_at)).total_seconds(), 3)


def recorded_images(runs: Path) -> set[str]:
    """Tags of the images that records name: a rerun needs them."""
    records = (read_if_there(Record, path) for path in runs.glob(f"*/{RECORD_FILE}"))
    return {record.image for record in records if record is not None and record.image}


def last_checkpoint(folder: Path) -> str:
    """The newest checkpoint of a run, relative to its folder; '' if there is none."""
    newest = newest_name(path.name for path in (folder / contract.CHECKPOINTS).glob("step-*"))
    return f"{contract.CHECKPOINTS}/{newest}" if newest else ""


def checkpoint_place(record: Record, plan: Plan) -> str:
    """The record's checkpoint in the form that stage.checkpoint takes: a folder here, or HOST:FOLDER of the node that wrote it."""
    if plan.is_local:
        return str(Path(plan.folder) / record.checkpoint)
    return f"{bracketed(first_node(record, plan).host)}:{plan.spec.output}/{record.checkpoint}"


def bracketed(host: str) -> str:
    """An IPv6 address gets brackets before `:PATH`, as scp and stage.checkpoint take it."""
    return f"[{host}]" if ":" in host else host


def first_node(record: Record, plan: Plan) -> Node:
    """The node of rank 0 in the last attempt. It may have been a spare."""
    cluster = plan.config.cluster
    host = next((node.host for node in record.nodes if node.node_rank == 0), cluster.working[0].host)
    return next((node for node in cluster.nodes if node.host == host), cluster.working[0])


def newest_name(names: Iterable[str]) -> str:
    """The checkpoint name with the highest step, '' if there is none. A checkpoint gets its name when it is complete."""
    return max((name for name in names if step_of(name)), key=step_of, default="")


def step_of(name: str) -> int:
    """The step in a checkpoint's name, 0 for any other name."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def utc_now() -> datetime:
    return datetime.now(UTC)
