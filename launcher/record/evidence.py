"""Everything that a run's folder says, as plain data: what is missing or cut short is told beside what is there, and stops nobody.

For reports, which must show a failed or broken run too. Who compares asks `require_whole` first.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused, RecordRefused
from launcher.record.metrics import Curve, read_curve
from launcher.record.reader import load_archive
from launcher.record.record import ATTEMPT_FILE, PLAN_FILE, RECORD_FILE, SOURCE_FILE, attempt_files
from trainer import contract
from trainer.contract import SCHEMA, InputRefused, SpecError
from trainer.contract.checkpoint_files import STATE_FILE
from trainer.contract.weight_files import hash_weights, weight_files

MOST_ANSWERS = 20_000  # of samples.jsonl that are looked at
MOST_WEIGHT_BYTES = 2**28  # of a checkpoint that is read again without being asked to: about a third of a second
FILES = (SOURCE_FILE, RECORD_FILE, contract.ENVIRONMENT_FILE, contract.DATA_FILE, contract.RESULT_FILE, contract.INPUTS_FILE)
# (what, where it says so twice): a record that was edited by hand, or put together from two, contradicts itself.
TWICE = (
    ("the final loss", (RECORD_FILE, "final_loss"), (contract.RESULT_FILE, "final_loss")),
    ("the number of steps", (RECORD_FILE, "steps"), (contract.RESULT_FILE, "steps")),
    ("the hash of the weights", (RECORD_FILE, "weights_sha256"), (contract.RESULT_FILE, "weights_sha256")),
    ("the hash of the data", (RECORD_FILE, "data_sha256"), (contract.DATA_FILE, "sha256")),
    ("the evaluation", (RECORD_FILE, "evaluation"), (contract.RESULT_FILE, "evaluation")),
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """`files`: name -> its content, {} where there is none. `answers`: of the last evaluation, the first MOST_ANSWERS. `attempts`: those before
    the last. `problems`: what is wrong with the record, a line each."""

    folder: Path
    files: dict[str, dict[str, Any]]
    curve: Curve
    evaluations: tuple[dict[str, Any], ...]
    answers: tuple[dict[str, Any], ...]
    attempts: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """The folder's name: what is written inside may be anything."""
        return self.folder.name

    @property
    def plan(self) -> dict[str, Any]:
        return self.files[PLAN_FILE]

    @property
    def record(self) -> dict[str, Any]:
        return self.files[RECORD_FILE]

    @property
    def source(self) -> dict[str, Any]:
        return self.files[SOURCE_FILE]

    @property
    def environment(self) -> dict[str, Any]:
        return self.files[contract.ENVIRONMENT_FILE]

    @property
    def data(self) -> dict[str, Any]:
        return self.files[contract.DATA_FILE]

    @property
    def inputs(self) -> dict[str, Any]:
        return self.files[contract.INPUTS_FILE]

    @property
    def ended(self) -> bool:
        return bool(self.record)


def read_evidence(folder: Path, *, every_weight: bool = False) -> Evidence:
    """`every_weight`: the last checkpoint is hashed again, however large it is. Raises ConfigRefused for a folder without a plan that can be
    read: it is no run's."""
    problems: list[str] = []
    plan = read_object(folder / PLAN_FILE, problems)
    if not plan:
        raise ConfigRefused(f"{folder} is not the folder of a run: {problems[0]}. See: omnilaunch runs")
    files = {name: read_object(folder / name, problems) for name in FILES}
    missing = expected_files(files[RECORD_FILE]) - {path.name for path in folder.iterdir()}
    refusal = find_refusal(folder) if files[RECORD_FILE] else []
    told = [f"{name} is missing" for name in sorted(missing)]
    problems += [*(line for line in told if not any(line in text for text in refusal)), *refusal]
    curve = read_curve(folder / contract.METRICS_FILE) if (folder / contract.METRICS_FILE).exists() else Curve()
    problems += [
        *curve.problems,
        *find_contradictions(files, curve, folder),
        *find_swap(files[RECORD_FILE], folder, every_weight=every_weight),
    ]
    attempts = (read_object(path, problems) for path in attempt_files(folder, ATTEMPT_FILE))
    return Evidence(
        folder=folder,
        files={PLAN_FILE: plan, **files},
        curve=curve,
        evaluations=tuple(read_objects(folder / contract.EVALUATIONS_FILE, problems)),
        answers=tuple(islice(read_objects(folder / contract.SAMPLES_FILE, problems), MOST_ANSWERS)),
        attempts=tuple(attempt for attempt in attempts if attempt),
        problems=tuple(problems),
    )


def require_whole(evidence: Evidence) -> None:
    """Raises RecordRefused for a run that has not ended, and for a record that was cut short or contradicts itself."""
    if not evidence.ended and not evidence.problems:
        raise RecordRefused(
            f"run {evidence.run_id} has no {RECORD_FILE}: it is under way, or its launcher was killed. Next: omnilaunch attach {evidence.run_id}"
        )
    if evidence.problems:
        told = "\n".join(f"  {problem}" for problem in evidence.problems)
        raise RecordRefused(
            f"the record of run {evidence.run_id} is not whole, and nothing is compared with it:\n{told}\n"
            f"Bring the folder again from where the run was made: {evidence.folder}"
        )


def bands_of(evidence: Evidence) -> Bands:
    """Those that the run's config stated before it started. Raises ConfigRefused where they cannot be read."""
    stated = nested(evidence.plan, "config", "run", "bands") or {}
    try:
        bands: Bands = contract.decode(Bands, stated, "config.run.bands")
    except SpecError as error:
        raise ConfigRefused(f"{evidence.folder / PLAN_FILE}: {error}") from error
    return bands


def nested(data: Any, *keys: str) -> Any:
    """None where a key on the way is not there."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


# ---------------------------------------------------------------------------------------------------------------- files


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none; what is wrong with it is added to `problems`."""
    if not path.exists():
        if path.name == PLAN_FILE:
            problems.append(f"it has no {PLAN_FILE}")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} was cut short or edited: {error}")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    if data.get("schema", SCHEMA) != SCHEMA:
        problems.append(
            f"{path.name} was written with schema {data['schema']!r}, this version reads {SCHEMA}: use the version that wrote it"
        )
        return {}
    return data


def read_objects(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """A JSON object a line; one line among `problems` for all that are none."""
    if not path.exists():
        return
    wrong = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                wrong += 1
    if wrong:
        problems.append(f"{path.name}: {wrong} line(s) are no row")


def expected_files(record: dict[str, Any]) -> set[str]:
    """What the folder of a run that ended well has besides."""
    if record.get("status") != "finished":
        return set()
    always = {SOURCE_FILE, contract.ENVIRONMENT_FILE, contract.DATA_FILE, contract.RESULT_FILE}
    return always | ({contract.METRICS_FILE} if record.get("steps") else set())


def find_refusal(folder: Path) -> list[str]:
    """What the strict reader says against the record of a run that has ended."""
    try:
        load_archive(folder, rows=False)
    except RecordRefused as error:
        return [str(error)]
    return []


def find_contradictions(files: dict[str, dict[str, Any]], curve: Curve, folder: Path) -> Iterator[str]:
    """Where two files of the record say two things."""
    for what, (one, key), (other, other_key) in TWICE:
        if files[one] and files[other] and files[one].get(key) != files[other].get(other_key):
            yield f"{what}: {one} says {files[one].get(key)!r}, {other} says {files[other].get(other_key)!r}"
    record = files[RECORD_FILE]
    if record.get("status") != "finished":
        return
    if curve.step and curve.step[-1] != record.get("steps"):
        yield f"{contract.METRICS_FILE} ends with step {curve.step[-1]}, {RECORD_FILE} says that {record.get('steps')} were done"
    elif curve.step and isinstance(record.get("final_loss"), float) and not alike(curve.loss[-1], record["final_loss"]):
        yield f"the final loss: {contract.METRICS_FILE} says {curve.loss[-1]!r}, {RECORD_FILE} says {record['final_loss']!r}"


def alike(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def find_swap(record: dict[str, Any], folder: Path, *, every_weight: bool) -> Iterator[str]:
    """A last checkpoint that holds other weights than the run has saved, where it lies on this machine."""
    checkpoint, said = folder / str(record.get("checkpoint")), record.get("weights_sha256")
    state = read_object(checkpoint / STATE_FILE, []) if record.get("checkpoint") and record.get("status") == "finished" else {}
    if not state:
        return
    found = state.get("weights_sha256")
    try:
        files = weight_files(checkpoint)
        here = all(path.is_file() for path in files)  # a checkpoint is no part of the record, and large: it may be gone
        if found == said and here and (every_weight or sum(path.stat().st_size for path in files) <= MOST_WEIGHT_BYTES):
            found = hash_weights(checkpoint)
    except (InputRefused, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{record['checkpoint']} is not whole: {error}"
        return
    if found != said:
        yield f"{record['checkpoint']} holds the weights {found!r}, {RECORD_FILE} says {said!r}"
