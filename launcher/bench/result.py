"""docs/results/NAME.jsonl: what a bench has published, a line for each. Appended to, never written over; small, so that git keeps it.

A line holds the figures, what they were measured with (config, code, facts of the running ranks), and its own hash. From it alone the bench
can be run again (launcher.bench.restore). It has no path, host or user of the machine that it ran on.
"""

import json
import os
from collections.abc import Iterator, Mapping
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
NAME_ANOTHER = "Have its rights changed, or name another folder: --results FOLDER. No run is lost"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Of one figure over all repeats."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One run. Rates, seconds a step and memory as `compare` takes them: medians over the steps after the warm-up, the highest memory of any
    rank. `windows`: means of the losses of each tenth of the steps; `rows_sha256`: over every row's loss, gradient norm, learning rate,
    samples and tokens; `record_sha256`: the seal over the run's whole record. `load`: of the launcher's machine over the minute before it
    started, as uptime says it; None where the nodes are others."""

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
    """`dirty`: why a tree with changes was taken, '' for a clean one; their hash is `diff_sha256`. `image_id`: as the engines of the nodes
    say; '' for the process runtime. `base`: in place of the stack's own, ''."""

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
    """Of the cluster what a run computes with. Hosts stay where they are."""

    runtime: str
    nodes: int
    devices_per_node: int | None
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """`config`: as it was composed, without its cluster; `spec`: what the trainer was told, without run id and folders; `variables`: that were
    set for the ranks; `facts`: asked of the running ranks (trainer.contract.environment_facts). `warm_up_steps`: of `steps` (record.metrics). `sha256`:
    of the line without it."""

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
    """Whether its own repeats lie further apart in speed than the band that a rerun is held against: the machine was not steady."""
    span, bands = result.summary["samples_per_s"], result.config.get("run", {}).get("bands") or {}
    band = bands.get("throughput")
    return band is not None and span.lowest < span.highest * (1 - band)


def results_file(folder: Path, experiment: str) -> Path:
    return folder / f"{experiment}.jsonl"


def read_results(path: Path) -> tuple[PublishedResult, ...]:
    """Oldest first; () where nothing was published yet. Raises RecordRefused for a line that was cut short or edited, that a newer version
    wrote, or that is of another experiment."""
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RecordRefused(f"{path} cannot be read: {error.strerror}") from error
    results = tuple(read_line(line, f"{path}, line {number}") for number, line in enumerate(text.splitlines(), start=1))
    for number, result in enumerate(results, start=1):
        if result.experiment != path.stem:
            refuse(f"{path}, line {number}", f"is of {result.experiment}, and belongs to {result.experiment}.jsonl")
    if text and not text.endswith(b"\n"):
        refuse(f"{path}, line {len(results)}", "has no end: the file was cut short")
    return results


def read_line(line: bytes, where: str) -> PublishedResult:
    try:
        data = json.loads(line)
        found = digest(data) if isinstance(data, dict) else ""
    except (ValueError, RecursionError) as error:  # half of a surrogate pair among them, which JSON has and UTF-8 has not
        refuse(where, f"was cut short or edited: {error}")
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        refuse(where, "is no result: it has no schema number")
    if data["schema"] > RESULT_SCHEMA:
        raise RecordRefused(
            f"{where}: written with result schema {data['schema']}, this version reads 1 to {RESULT_SCHEMA}. Use the version that wrote it: "
            f"git log -1 {FOLDER}"
        )
    if data.get("sha256") != found:
        refuse(where, "was edited: its hash is not that of what it holds")
    try:
        result: PublishedResult = contract.decode(PublishedResult, data)
    except (SpecError, OverflowError) as error:
        refuse(where, f"is not what this version reads: {error}")
    if not result.repeats or not all(RUN_ID.fullmatch(name) for name in (result.result_id, *(repeat.run_id for repeat in result.repeats))):
        refuse(where, "has no repeats, or an id that is none")  # folders are called so
    return result


def refuse(where: str, what: str) -> NoReturn:
    raise RecordRefused(
        f"{where} {what}. A result that was changed proves nothing; bring the file back as it was committed: git checkout -- {FOLDER}"
    )


def digest(data: Mapping[str, Any]) -> str:
    """Over the canonical text of all keys but `sha256` itself."""
    return sha256(canonical({key: value for key, value in data.items() if key != "sha256"})).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def require_writable(path: Path) -> None:
    """Raises ConfigRefused where a line could not be added. Asked before the first run as well, which may be hours earlier."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path if path.exists() else path.parent
    except OSError as error:
        raise ConfigRefused(f"{path} cannot be written: {error.strerror}. {NAME_ANOTHER}") from error
    if (path.exists() and not path.is_file()) or not os.access(target, os.W_OK):
        raise ConfigRefused(f"{path} cannot be written. {NAME_ANOTHER}")


def append_result(path: Path, result: PublishedResult) -> PublishedResult:
    """With its hash, as it was written. Raises RunEnded where there is no room; the lines that are there stay, and the new one is whole or
    not there."""
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
                f"{path} could not be written: {error.strerror}. Free room there and type the same command again: its runs are all there"
            ) from error
    return sealed


def find_result(text: str, folder: Path) -> PublishedResult:
    """By its id, a unique prefix of one, `last`, or the name of an experiment for its newest one. Raises ConfigRefused with the valid ones."""
    found = {result.result_id: result for path in published_files(folder) for result in read_results(path)}
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


def published_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.jsonl")) if folder.is_dir() else ()
