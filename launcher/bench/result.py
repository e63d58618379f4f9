"""docs/results/NAME.jsonl: the published results of a bench, one per line. Lines are appended and never changed; they are small enough for git.

A line holds the figures, what they were measured with (config, code, environment facts of the ranks), and its own hash. It is enough to run
the bench again (`restore`). It has no path, host or user of the machine.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from launcher.errors import ConfigRefused, RecordRefused, RunEnded, suggest
from launcher.record.run_name import LAST, RUN_ID
from trainer import contract
from trainer.contract import SpecError

FOLDER = "docs/results"
RESULT_SCHEMA = 1
NAME_ANOTHER = "Change its permissions, or choose another folder: --results FOLDER. No run is lost"


@dataclass(frozen=True, kw_only=True)
class Span:
    """One figure over all repeats."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One run. Rates, step time and memory are those of `compare`: medians over the steps after the warm-up, the highest peak of any rank.
    `windows`: the mean loss of each tenth of the steps. `rows_sha256`: over loss, gradient norm, learning rate, samples and tokens of every
    row. `record_sha256`: of the run's whole record. `load`: the load average of the launcher's machine over the minute before the run; None
    if the run used other nodes."""

    run_id: str
    record_sha256: str
    started_at: str
    seconds: float
    samples_per_s: float
    tokens_per_s: float
    step_s: float
    peak_bytes: int
    final_loss: float
    windows: tuple[float, ...]
    evaluation: dict[str, float]
    rows_sha256: str
    weights_sha256: str
    load: float | None = None


@dataclass(frozen=True, kw_only=True)
class Code:
    """`dirty`: why a tree with changes was measured, '' for a clean one; `diff_sha256` is the hash of the changes. `image_id`: reported by the
    engines of the nodes, '' without containers. `base`: a base image in place of the stack's own, else ''."""

    commit: str
    diff_sha256: str
    dirty: str
    stack: str
    architecture: str
    base: str
    fingerprint: str
    image_id: str
    lock_sha256: str


@dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """What the cluster contributes to the computation. Hosts are not published."""

    runtime: str
    nodes: int
    devices_per_node: int | None
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """`config`: without its cluster. `spec`: without run id and folders. `variables`: environment variables that were set for the ranks. `facts`:
    reported by the ranks (trainer.contract.environment_facts). `warm_up_steps`: do not count for the speed (record.metrics). `sha256`: of the
    line without this key."""

    schema: int
    result_id: str
    experiment: str
    made_at: str
    steps: int
    warm_up_steps: int
    summary: dict[str, Span]
    rows_equal: bool
    weights_equal: bool
    repeats: tuple[Repeat, ...]
    config: dict[str, Any]
    config_sha256: str
    site: ClusterShape
    spec: dict[str, Any]
    variables: dict[str, str]
    code: Code
    data_sha256: str
    weights: dict[str, str]
    facts: dict[str, str]
    sha256: str = ""


def is_unsteady(result: PublishedResult) -> bool:
    """Whether the speed of its own repeats varies more than the band of a rerun allows: other work on the machine disturbed them."""
    span, bands = result.summary["samples_per_s"], result.config.get("run", {}).get("bands") or {}
    band = bands.get("throughput")
    return band is not None and span.lowest < span.highest * (1 - band)


def results_file(folder: Path, experiment: str) -> Path:
    return folder / f"{experiment}.jsonl"


def read_results(path: Path) -> tuple[PublishedResult, ...]:
    """Oldest first; () if there is no such file. Raises RecordRefused for a line that was cut short or edited, that a newer version wrote, or
    that belongs to another experiment."""
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RecordRefused(f"{path} cannot be read: {error.strerror}") from error
    results = tuple(read_line(line, f"{path}, line {number}") for number, line in enumerate(text.splitlines(), start=1))
    for number, result in enumerate(results, start=1):
        if result.experiment != path.stem:
            refuse(f"{path}, line {number}", f"is a result of {result.experiment}, and belongs to {result.experiment}.jsonl")
    if text and not text.endswith(b"\n"):
        refuse(f"{path}, line {len(results)}", "has no end: the file was cut short")
    return results


def read_line(line: bytes, where: str) -> PublishedResult:
    try:
        data = json.loads(line)
        found = digest(data) if isinstance(data, dict) else ""
    except (ValueError, RecursionError) as error:  # ValueError: also for a lone surrogate, which JSON allows and UTF-8 does not
        refuse(where, f"was cut short or edited: {error}")
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        refuse(where, "is not a result: it has no schema number")
    if data["schema"] > RESULT_SCHEMA:
        raise RecordRefused(
            f"{where}: written with result schema {data['schema']}, this version reads 1 to {RESULT_SCHEMA}. Use the version that wrote it: "
            f"git log -1 {FOLDER}"
        )
    if data.get("sha256") != found:
        refuse(where, "was edited: its hash does not match its content")
    try:
        result: PublishedResult = contract.decode(PublishedResult, data)
    except (SpecError, OverflowError) as error:
        refuse(where, f"cannot be read by this version: {error}")
    if not result.repeats or not all(RUN_ID.fullmatch(name) for name in (result.result_id, *(repeat.run_id for repeat in result.repeats))):
        refuse(where, "has no repeats, or an invalid id")  # ids become names of folders
    return result


def refuse(where: str, what: str) -> NoReturn:
    raise RecordRefused(f"{where} {what}. A result that was changed proves nothing; restore the committed file: git checkout -- {FOLDER}")


def digest(data: Mapping[str, Any]) -> str:
    """Over the canonical JSON of all keys except `sha256`."""
    return sha256(canonical({key: value for key, value in data.items() if key != "sha256"})).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def require_writable(path: Path) -> None:
    """Raises ConfigRefused if no line can be added. Also called before the first run, which may be hours earlier."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path if path.exists() else path.parent
    except OSError as error:
        raise ConfigRefused(f"{path} cannot be written: {error.strerror}. {NAME_ANOTHER}") from error
    if (path.exists() and not path.is_file()) or not os.access(target, os.W_OK):
        raise ConfigRefused(f"{path} cannot be written. {NAME_ANOTHER}")


def append_result(path: Path, result: PublishedResult) -> PublishedResult:
    """Append the result, and return it with its hash. Raises RunEnded on a full disk; then the file is unchanged."""
    require_writable(path)
    plain = json.loads(json.dumps(asdict(result)))
    sealed = replace(result, sha256=digest(plain))
    line = json.dumps(plain | {"sha256": sealed.sha256}, ensure_ascii=False).encode() + b"\n"
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, before)
            raise RunEnded(
                f"{path} could not be written: {error.strerror}. Free disk space there and run the same command again: all runs are kept"
            ) from error
    return sealed


def find_result(text: str, folder: Path) -> PublishedResult:
    """By its id, a unique prefix of one, `last`, or the name of an experiment for its newest one. Raises ConfigRefused with the valid ones."""
    found = {result.result_id: result for path in sorted(folder.glob("*.jsonl")) for result in read_results(path)}
    newest = {result.experiment: result for result in found.values()}
    if not found:
        raise ConfigRefused(f"there is no result {text!r} in {folder}: nothing is published yet: omnilaunch bench NAME")
    if text == LAST:
        return sorted(found.values(), key=lambda result: result.made_at)[-1]  # of one time, the line that was appended last
    matching = [result for result_id, result in found.items() if text and result_id.startswith(text)]
    if text in found or text in newest:
        return found.get(text) or newest[text]
    if len(matching) > 1:
        raise ConfigRefused(f"{text!r} is the beginning of {len(matching)} results: {', '.join(result.result_id for result in matching)}")
    if not matching:
        raise ConfigRefused(f"there is no result {text!r} in {folder}: {suggest(text, (*newest, *found))}")
    return matching[0]
