"""Everything that a run's folder holds, read leniently, as plain data: problems are listed beside what can be read.

Reports use it, since they must show a failed or damaged run too. A comparison calls `require_whole` first.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from launcher.config.schema import Bands
from launcher.errors import ConfigRefused, RecordRefused
from launcher.record.metrics import Curve, read_curve
from launcher.record.reader import nested, read_lines, read_object
from launcher.record.record import ATTEMPT_FILE, PLAN_FILE, RECORD_FILE, RESUMPTION_FILE, SOURCE_FILE, attempt_files
from launcher.record.recorded_run import load_recorded_run
from trainer import contract
from trainer.contract import InputRefused, SpecError
from trainer.contract.checkpoint_files import STATE_FILE, find_state_file
from trainer.contract.weight_files import hash_weights, weight_files

MAX_ANSWERS = 20_000  # of samples.jsonl
MAX_WEIGHT_BYTES = 2**28  # checkpoints up to this size are always hashed again, which takes about a third of a second
FILES = (SOURCE_FILE, RECORD_FILE, contract.ENVIRONMENT_FILE, contract.DATA_FILE, contract.RESULT_FILE, contract.INPUTS_FILE)
SETTINGS = ("steps", "nodes", "strategy")  # kinds of --accept that change nothing where no setting of them changed
# (value, key in result.json, another file that has it, its key there): a record that was edited, or mixed from two, contradicts itself.
TWICE = (
    ("the final loss", "final_loss", contract.RESULT_FILE, "final_loss"),
    ("the number of steps", "steps", contract.RESULT_FILE, "steps"),
    ("the hash of the weights", "weights_sha256", contract.RESULT_FILE, "weights_sha256"),
    ("the hash of the data", "data_sha256", contract.DATA_FILE, "sha256"),
    ("the evaluation", "evaluation", contract.RESULT_FILE, "evaluation"),
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The JSON files of a run, {} for one that is missing. `curve`: metrics.jsonl. `answers`: of the last evaluation, at most MAX_ANSWERS.
    `attempts`: all but the last. `resumptions`: those that `launch --resume` started. `problems`: what is wrong with the record, one line each."""

    folder: Path
    plan: dict[str, Any]
    record: dict[str, Any]
    source: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    inputs: dict[str, Any]
    curve: Curve
    evaluations: tuple[dict[str, Any], ...]
    answers: tuple[dict[str, Any], ...]
    attempts: tuple[dict[str, Any], ...]
    resumptions: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """The folder's name, since the files may say anything."""
        return self.folder.name

    @property
    def accepted_changes(self) -> dict[str, str]:
        """What the run continued with that it had not begun with: `kind.key` -> the change, and `kind` for a kind that was accepted by itself."""
        found: dict[str, str] = {}
        for resumption in self.resumptions:
            after = f"after step {resumption.get('step')}"
            changes = [change for change in as_list(resumption.get("changes")) if isinstance(change, dict) and change.get("kind")]
            found |= {f"{change['kind']}.{change.get('key')}": f"{change.get('old')} → {change.get('new')} {after}" for change in changes}
            named = {*SETTINGS, *(str(change["kind"]) for change in changes)}
            alone = sorted({str(kind) for kind in as_list(resumption.get("accepted"))} - named)
            found |= dict.fromkeys(alone, f"accepted {after}")
        return found


def as_list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


def read_run_files(folder: Path, *, every_weight: bool = False) -> RunFiles:
    """`every_weight`: hash the last checkpoint again, however large it is. Raises ConfigRefused if the folder has no readable plan: then it is
    not the folder of a run."""
    problems: list[str] = []
    plan = read_object(folder / PLAN_FILE, problems)
    if not plan:
        why = problems[0] if problems else f"it has no {PLAN_FILE}"
        raise ConfigRefused(f"{folder} is not the folder of a run: {why}. See: omnilaunch runs")
    files = {name: read_object(folder / name, problems) for name in FILES}
    record = files[RECORD_FILE]
    refusal = find_refusal(folder) if record else []
    missing = [f"{name} is missing" for name in sorted(expected_files(record)) if not (folder / name).exists()]
    problems += [*(line for line in missing if not any(line in text for text in refusal)), *refusal]
    curve = read_curve(folder / contract.METRICS_FILE) if (folder / contract.METRICS_FILE).exists() else Curve()
    problems += [*curve.problems, *find_contradictions(files, curve), *find_other_weights(record, folder, every_weight=every_weight)]
    return RunFiles(
        folder=folder,
        plan=plan,
        record=record,
        source=files[SOURCE_FILE],
        environment=files[contract.ENVIRONMENT_FILE],
        data=files[contract.DATA_FILE],
        inputs=files[contract.INPUTS_FILE],
        curve=curve,
        evaluations=tuple(read_lines(folder / contract.EVALUATIONS_FILE, problems)),
        answers=tuple(islice(read_lines(folder / contract.SAMPLES_FILE, problems), MAX_ANSWERS)),
        attempts=tuple(found for path in attempt_files(folder, ATTEMPT_FILE) if (found := read_object(path, problems))),
        resumptions=tuple(found for path in attempt_files(folder, RESUMPTION_FILE) if (found := read_object(path, problems))),
        problems=tuple(problems),
    )


def require_whole(run: RunFiles) -> None:
    """Raises RecordRefused if the run has not ended, or its record was cut short or contradicts itself."""
    if run.problems:
        lines = "\n".join(f"  {problem}" for problem in run.problems)
        raise RecordRefused(
            f"the record of run {run.run_id} is damaged, and cannot be compared:\n{lines}\n"
            f"Copy the folder again from the machine where the run was made: {run.folder}"
        )
    if not run.record:
        raise RecordRefused(
            f"run {run.run_id} has no {RECORD_FILE}: it is still running, or its launcher was killed. Next: omnilaunch attach {run.run_id}"
        )


def bands_of(run: RunFiles) -> Bands:
    """The bands that the run's config stated before it started. That of the throughput counts only where the user stated it: a benchmark of the
    project states one for its own reruns (launcher.bench.verdict), and how busy a machine is makes no run another one. Raises ConfigRefused
    if they cannot be read."""
    try:
        bands: Bands = contract.decode(Bands, nested(run.plan, "config", "run", "bands") or {}, "config.run.bands")
    except SpecError as error:
        raise ConfigRefused(f"{run.folder / PLAN_FILE}: {error}") from error
    return bands if states_speed(run.plan) else replace(bands, throughput=None)


def states_speed(plan: dict[str, Any]) -> bool:
    """Whether run.bands.throughput was typed, or is that of an experiment in the user's own conf folder."""
    typed = any(str(word).startswith("run.bands") and "throughput" in str(word) for word in plan.get("overrides") or ())
    files = (PurePath(str(name)) for name in plan.get("files") or ())
    return typed or any(file.is_absolute() and file.parent.name == "experiment" for file in files)


# ------------------------------------------------------------------------------------------------------------ problems


def expected_files(record: dict[str, Any]) -> set[str]:
    """What the folder of a finished run must have, beside its plan and its record."""
    if record.get("status") != "finished":
        return set()
    always = {SOURCE_FILE, contract.ENVIRONMENT_FILE, contract.DATA_FILE, contract.RESULT_FILE}
    return always | ({contract.METRICS_FILE} if record.get("steps") else set())


def find_refusal(folder: Path) -> list[str]:
    """Why the strict reader refuses the record."""
    try:
        load_recorded_run(folder, rows=False)
    except RecordRefused as error:
        return [str(error)]
    return []


def find_contradictions(files: dict[str, dict[str, Any]], curve: Curve) -> Iterator[str]:
    """Values that two files of the record state differently."""
    record = files[RECORD_FILE]
    for what, key, other, other_key in TWICE:
        if record and files[other] and record.get(key) != files[other].get(other_key):
            yield f"{what}: {RECORD_FILE} says {record.get(key)!r}, {other} says {files[other].get(other_key)!r}"
    if record.get("status") != "finished" or not curve.step:
        return
    loss = record.get("final_loss")
    if curve.step[-1] != record.get("steps"):
        yield f"{contract.METRICS_FILE} ends with step {curve.step[-1]}, {RECORD_FILE} says that {record.get('steps')} were done"
    elif isinstance(loss, float) and curve.loss[-1] != loss and not (math.isnan(curve.loss[-1]) and math.isnan(loss)):
        yield f"the final loss: {contract.METRICS_FILE} says {curve.loss[-1]!r}, {RECORD_FILE} says {loss!r}"


def find_other_weights(record: dict[str, Any], folder: Path, *, every_weight: bool) -> Iterator[str]:
    """Whether the last checkpoint, if it is on this machine, still has the weights that the run saved."""
    checkpoint, recorded = folder / str(record.get("checkpoint")), record.get("weights_sha256")
    state = (
        read_object(find_state_file(checkpoint) or checkpoint / STATE_FILE, [])
        if record.get("checkpoint") and record.get("status") == "finished"
        else {}
    )
    if not state:
        return
    found = state.get("weights_sha256")
    try:
        files = weight_files(checkpoint)
        here = all(path.is_file() for path in files)  # a checkpoint is not a part of the record, and is large: it may have been removed
        if found == recorded and here and (every_weight or sum(path.stat().st_size for path in files) <= MAX_WEIGHT_BYTES):
            found = hash_weights(checkpoint)
    except (InputRefused, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{record['checkpoint']} is not whole: {error}"
        return
    if found != recorded:
        yield f"{record['checkpoint']} holds the weights {found!r}, {RECORD_FILE} says {recorded!r}"
