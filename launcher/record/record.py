"""`runs/<run_id>/`: the plan before the first effect, the result after the last. Never overwritten, never written by halves."""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from launcher.config.schema import Config, Node
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan, encode_spec, to_plain
from launcher.record.checksums import SEAL_FILE, make_seal
from launcher.record.source import SourceState as SourceState
from launcher.redact import mask_credentials
from launcher.run.diagnosis import Diagnosis, explain_log, root_rank
from launcher.run.failures.symptom import Kind
from launcher.run.node_log import lines_of, read_end, unnamed
from launcher.run.node_process import NodeResult
from launcher.run.progress import read_lines
from trainer import contract
from trainer.contract import SCHEMA, DataReport, EnvReport, Exit, FailureReport, SpecError, StepRow, TrainResult, WeightsLineage

PLAN_FILE = "plan.json"
CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"
DIFF_FILE = "source.diff"
LOCK_FILE = "lock.txt"
IMAGES_FILE = "images.json"
RECORDED_INPUTS_FILE = "recorded_inputs.json"  # of the run that this one repeats
RECORD_FILE = "result.json"
ATTEMPTS = "attempts"  # attempts/<number>/: what an attempt that was followed by another has left, and the plan of one that follows
ATTEMPT_FILE = "attempt.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a folder, a label and a part of a container's name
CAUSES = ("cause", "layer")  # kinds of a known failure that tell of the process which printed it
Status = Literal["finished", "stopped", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class Precedent:
    """The record that a rerun repeats. `older`: its own trainer reads the new run's spec too, and refuses keys that it does not know."""

    folder: Path
    older: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed first. `rank` -1: no rank said why, so `tail` holds the last lines of the node's log. `meaning` and what to do (`fix`) are
    '' where the failure is none of the known ones."""

    host: str
    rank: int
    code: int
    message: str
    log: str
    tail: tuple[str, ...]
    meaning: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run that failed and may be followed by another. `steps`: the last step that it wrote a row of."""

    number: int
    started_at: str
    seconds: float
    steps: int
    nodes: tuple[NodeResult, ...]
    failure: Failure | None


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
    attempts: tuple[Attempt, ...] = ()  # those before the last
    origin: WeightsLineage = field(default_factory=WeightsLineage)  # what the run began with, as the trainer found it
    rerun_of: str = ""  # the run whose record this one was started from
    accepted: tuple[str, ...] = ()  # in which ways it was said to differ from that one
    image_id: str = ""  # as the engines of the nodes say, where a container ran
    config_sha256: str = ""  # of config.json
    lock_sha256: str = ""
    inputs_sha256: str = ""  # of inputs.json, which has the hash of every file that the run read


def name_run(config: Config, now: datetime, *, pid: int) -> str:
    """`20261121-010203-tiny_llava-full-cpu-3f0a`: sorts by time, says what it is, and differs from what another launcher calls its run in
    the same second."""
    suffix = sha256(f"{now.isoformat()} {pid}".encode()).hexdigest()[:4]
    return f"{now:%Y%m%d-%H%M%S}-{config.model.name}-{config.stage.name}-{config.hardware.name}-{suffix}"


def valid_run_id(text: str) -> str:
    """The text itself. Raises ConfigRefused where no run can be called so."""
    if not RUN_ID.fullmatch(text):
        raise ConfigRefused(f"--run-id {text!r}: a run id is 1 to 100 letters, digits, '_', '.' and '-', and begins with a letter or digit")
    return text


def open_run(plan: Plan, source: SourceState, *, diff: bytes = b"", lock: Path | None = None, precedent: Precedent | None = None) -> Path:
    """Make the run's folder and write what is known before anything happens. `lock`: the file that the image's packages are locked by.
    Raises ConfigRefused if the folder is there or cannot be made."""
    folder = Path(plan.folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and error.filename == str(folder):
            raise ConfigRefused(f"{folder} is there already: a run is never overwritten. Leave the run id out, or give another.") from error
        raise ConfigRefused(f"{folder} cannot be made: {error.strerror}. Name another place with cluster.root=FOLDER.") from error
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
    older = precedent.folder / contract.SPEC_FILE if precedent and precedent.older else None
    contract.write_text(encode_spec(plan.spec, like=older), folder / contract.SPEC_FILE)
    if precedent and (precedent.folder / contract.INPUTS_FILE).is_file():
        shutil.copyfile(precedent.folder / contract.INPUTS_FILE, folder / RECORDED_INPUTS_FILE)
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
        source=source,
        image=plan.image.tag if plan.config.cluster.runtime == "docker" else "",
        forced=plan.config.run.force,
        nodes=nodes,
        failure=failure,
        attempts=load_attempts(folder),
        origin=find_origin(folder),
        **identity(plan, folder),
    )
    return write_record(record, folder)


def identity(plan: Plan, folder: Path) -> dict[str, Any]:
    """What two runs are told to be of one kind by, beside the code."""
    return {
        "data_sha256": find_data(folder),
        "rerun_of": plan.rerun_of,
        "accepted": plan.accepted,
        "image_id": ", ".join(dict.fromkeys(read_images(folder).values())),
        "config_sha256": hash_if_there(folder / CONFIG_FILE),
        "lock_sha256": plan.image.files.get(LOCK_FILE, ""),
        "inputs_sha256": hash_if_there(folder / contract.INPUTS_FILE),
    }


def find_data(folder: Path) -> str:
    """The hash of the data that the run was checked with; '' where it did not get that far."""
    data: DataReport | None = read_if_there(DataReport, folder / contract.DATA_FILE)
    return data.sha256 if data else ""


def find_origin(folder: Path) -> WeightsLineage:
    """What the run began with, as the trainer found it."""
    environment: EnvReport | None = read_if_there(EnvReport, folder / contract.ENVIRONMENT_FILE)
    return environment.origin if environment else WeightsLineage()


def hash_if_there(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def keep_images(images: dict[str, str], folder: Path) -> None:
    """`images`: host -> the id that its engine has for the run's image."""
    contract.write_text(json.dumps(images, indent=2) + "\n", folder / IMAGES_FILE)


def read_images(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IMAGES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(host): str(image) for host, image in found.items()} if isinstance(found, dict) else {}


def write_record(record: Record, folder: Path) -> Record:
    """Write seal.json and then result.json, and give back what that holds: the credentials of URLs are left out, as pip may say them when it
    fails. In this order, a run that has a result has a seal; where the second is not written, the run has not ended."""
    masked: Record = contract.decode(Record, mask_credentials(asdict(record)))
    text = contract.encode(masked)
    contract.write(make_seal(folder, record.run_id, unwritten={RECORD_FILE: text.encode()}), folder / SEAL_FILE)
    contract.write_text(text, folder / RECORD_FILE)
    return masked


def read_if_there(cls: Any, path: Path) -> Any:
    """The dataclass in `path`, or None when the trainer did not get that far."""
    try:
        return contract.read(cls, path) if path.exists() else None
    except SpecError:
        return None  # cut short by what ended the run; the raw file stays where it is


def attempt_files(folder: Path, name: str) -> tuple[Path, ...]:
    """attempts/<number>/`name` of every attempt that has it, in their order."""
    numbered = [path for path in (folder / ATTEMPTS).glob(f"*/{name}") if path.parent.name.isdecimal()]
    return tuple(sorted(numbered, key=lambda path: int(path.parent.name)))


def load_attempts(folder: Path) -> tuple[Attempt, ...]:
    """The attempts before the one that is under way or that ended the run, in their order."""
    found = (read_if_there(Attempt, path) for path in attempt_files(folder, ATTEMPT_FILE))
    return tuple(attempt for attempt in found if attempt is not None)


def recorded_images(runs: Path) -> set[str]:
    """Tags of the images that records name: a rerun asks for them."""
    records = (read_if_there(Record, path) for path in runs.glob(f"*/{RECORD_FILE}"))
    return {record.image for record in records if record is not None and record.image}


def read_rows(path: Path) -> tuple[StepRow, ...]:
    """Whole rows of metrics.jsonl, torn ones left out; a last line without its newline is still being written."""
    if not path.exists():
        return ()
    return read_lines(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1])


def last_checkpoint(folder: Path) -> str:
    """The newest checkpoint of a run, relative to its folder; '' when there is none."""
    newest = newest_name(path.name for path in (folder / contract.CHECKPOINTS).glob("step-*"))
    return f"{contract.CHECKPOINTS}/{newest}" if newest else ""


def checkpoint_place(record: Record, plan: Plan) -> str:
    """Where the record's checkpoint lies, as stage.checkpoint takes it: a folder here, or HOST:FOLDER of the node that wrote it."""
    if plan.folder == plan.spec.output:
        return str(Path(plan.folder) / record.checkpoint)
    return f"{bracketed(first_node(record, plan).host)}:{plan.spec.output}/{record.checkpoint}"


def bracketed(host: str) -> str:
    """As scp, and stage.checkpoint, take a host before a path: an IPv6 address has colons of its own."""
    return f"[{host}]" if ":" in host else host


def first_node(record: Record, plan: Plan) -> Node:
    """The node of rank 0 in the last attempt, which may have been a spare."""
    cluster = plan.config.cluster
    host = next((node.host for node in record.nodes if node.node_rank == 0), cluster.working[0].host)
    return next((node for node in cluster.nodes if node.host == host), cluster.working[0])


def newest_name(names: Iterable[str]) -> str:
    """Of checkpoints' names the one of the last step, '' where there is none. A checkpoint gets its name when it is whole."""
    return max((name for name in names if step_of(name)), key=step_of, default="")


def step_of(name: str) -> int:
    """0 for what is no checkpoint's name."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def find_failure(plan: Plan, nodes: tuple[NodeResult, ...]) -> Failure | None:
    """What failed first: the first rank that reports something else than what another one's end did to it, else the first node that was lost
    or whose log holds a cause, else the first of all. Where a node was lost, an error that is not a known one is held for its doing."""
    reports = sorted(reports_in(Path(plan.folder)), key=lambda report: report.unix_s)
    failed = sorted((node for node in nodes if node.code), key=lambda node: node.seconds)
    told = [reported_failure(plan, report) for report in reports]
    lost = any(node.lost for node in failed)
    for failure, kind in told:
        if kind in CAUSES or (kind != "consequence" and (failure.code == Exit.USAGE or not lost)):
            return failure
    ended = [ended_failure(plan, node) for node in failed]
    caused = (failure for failure, kind in ended if kind in CAUSES)
    return next(caused, None) or next((failure for failure, _ in (*told, *ended)), None)


def reports_in(folder: Path) -> list[FailureReport]:
    """What ranks said of their own end. Those that were killed said nothing."""
    found = (read_if_there(FailureReport, path) for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*"))))
    return [report for report in found if report is not None]


def reported_failure(plan: Plan, report: FailureReport) -> tuple[Failure, Kind | None]:
    """A rank's report as a failure, and how much it says. What only names a layer is looked up in the node's log."""
    rank = report.rank // plan.spec.device.devices_per_node
    log = Path(plan.folder) / "logs" / f"node{rank}.log"
    meaning = explain_log(f"{report.message}\n{report.traceback}")
    if meaning and meaning.kind in ("layer", "wrapper"):
        text = read_end(log)
        deeper = cause_in("\n".join(lines_of(text, report.rank))) or cause_in(unnamed(text))
        meaning = deeper or meaning
    tail = tuple(report.traceback.splitlines()[-10:]) if report.code == Exit.BUG else ()  # what is said on purpose says it all
    host = plan.commands[rank].host
    failure = Failure(host=host, rank=report.rank, code=report.code, message=report.message, log=str(log), tail=tail)
    return explained(failure, meaning), meaning.kind if meaning else None


def cause_in(text: str) -> Diagnosis | None:
    found = explain_log(text)
    return found if found and found.kind == "cause" else None


def ended_failure(plan: Plan, node: NodeResult) -> tuple[Failure, Kind | None]:
    """A node without a report as a failure, by its exit code and its log, and how much they say."""
    log = Path(plan.folder) / "logs" / f"node{node.node_rank}.log"
    text = read_end(log)
    message, own = f"the ranks ended with exit code {node.code} and left no report", tuple[str, ...]()
    if node.lost:
        text = message = f"the node did not answer any more (cluster.node_timeout_s={plan.config.cluster.node_timeout_s})"
    elif root := root_rank(unnamed(text)):
        message = f"rank {root[0]} ended with exit code {root[1]} and left no report"
        own = lines_of(text, root[0])
    # Where members had to be killed, their codes tell of the launcher.
    meaning = cause_in("\n".join(own)) or explain_log(unnamed(text), 0 if node.killed else node.code)
    tail = own[-15:] or tuple(read_end(log).splitlines()[-15:])
    failure = Failure(host=node.host, rank=-1, code=node.code, message=message, log=str(log), tail=tail)
    return explained(failure, meaning), meaning.kind if meaning else None


def explained(failure: Failure, meaning: Diagnosis | None) -> Failure:
    """With what it means, and with the line that says so where the last lines do not show it."""
    if meaning is None:
        return failure
    seen = any(meaning.line in line for line in (*failure.tail, failure.message))
    tail = failure.tail if seen else (meaning.line, "...", *failure.tail)
    return replace(failure, tail=tail, meaning=meaning.means, fix=meaning.fix)


def utc_now() -> datetime:
    return datetime.now(UTC)
