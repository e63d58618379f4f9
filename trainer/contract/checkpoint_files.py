"""Which checkpoint a run resumes from: the newest complete one in the run's folder, found from the files only.

Standard library only, so that the launcher can ask the same question before it restarts the ranks.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from trainer.contract import CHECKPOINTS, LINE_FEED, METRICS_FILE, SCHEMA, ImageForm, InputRefused, SpecError, TrainSpec, read, write_text
from trainer.contract.listing import list_some

STATE_FILE = "omnilaunch_state.json"
# The name in earlier versions. transformers' Trainer writes a file of that name beside its weights too, which is not ours: see find_state_file.
EARLIER_STATE_FILE = "trainer_state.json"
STATE_FILES = (STATE_FILE, EARLIER_STATE_FILE)
CHECKPOINT_NAME = "step-{step:06d}"
CHECKPOINT_PATTERN = re.compile(r"step-(\d{6,})")

SHOWN = 5  # missing files that a message names

# Settings that may differ between attempts of one run: they change where and how fast steps are computed, not their result.
CHANGEABLE_SECTIONS = ("device.", "evaluation.", "deepspeed.", "profile.", "expects.", "early_stop.")
CHANGEABLE_KEYS = {
    *("save_every", "save_every_s", "keep_checkpoints", "keep_best", "checkpoint_background", "trackers", "trackers_named"),
    *("schema", "run_id", "output", "gradient_checkpointing", "hang_timeout_s"),
    *("checkpoint_every", "checkpoint_groups", "loss_chunk", "kernels", "expects"),
    *("batch.micro_batch", "batch.accumulation", "data.root", "data.workers", "data.rows", "accepted_changes"),
    *("data.info", "data.mirror"),
    "earlier_steps",
}
# What `spec.accepted_changes` lets differ.
ACCEPTABLE_KEYS: dict[str, tuple[str, ...]] = {
    "steps": ("steps",),
    "data": (
        *("data.name", "data.builtin", "data.train", "data.evaluation", "data.images", "data.split", "data.split_seed"),
        *("data.max_samples", "data.mixing", "data.mixing_stop"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """omnilaunch_state.json. `files`: name -> bytes of every other file of the checkpoint. `spec`: dotted key -> value of all settings that
    must be equal to resume. `data_sha256`: of the file of training rows. `world_size`: number of ranks that saved; 0 = weights only, of the
    last step. `trained`: groups trained by this run and by those it started from. `base`: WeightsLineage.mark of an adapter's base.
    `window_ends`: as of TrainSpec, with data.length_aware=window. `images`: WeightsLineage.images after this run."""

    schema: int
    step: int
    weights_sha256: str
    data_sha256: str
    world_size: int
    spec: dict[str, Any]
    files: dict[str, int]
    run_id: str = ""
    trained: tuple[str, ...] = ()
    base: str = ""
    window_ends: tuple[int, ...] = ()
    images: ImageForm = LINE_FEED

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        return f"{CHECKPOINTS}/{CHECKPOINT_NAME.format(step=self.step)}"


@dataclass(frozen=True, kw_only=True)
class MetricsSummary:
    """Number of metrics rows that are kept, the seconds of their steps, and the loss of the last one."""

    count: int = 0
    seconds: float = 0.0
    loss: float | None = None


def newest_checkpoint(run: Path) -> CheckpointState | None:
    """The newest complete checkpoint of a run. Checkpoints that are being written have hidden names; incomplete copies and checkpoints with
    missing files are skipped."""
    return max(whole_checkpoints(run), key=lambda state: state.step, default=None)


def newest_resumable(run: Path, steps: int) -> CheckpointState | None:
    """The newest complete checkpoint from which a run of `steps` steps can take its next step, or evaluate if it has none to take."""
    return max((state for state in whole_checkpoints(run) if can_resume(state, steps)), key=lambda state: state.step, default=None)


def can_resume(state: CheckpointState, steps: int) -> bool:
    """That of the last step has weights only: a run that was given more steps cannot continue from it."""
    return state.world_size > 0 or state.step >= steps


def whole_checkpoints(run: Path) -> Iterator[CheckpointState]:
    for folder in (run / CHECKPOINTS).glob("step-*"):
        if CHECKPOINT_PATTERN.fullmatch(folder.name) and (state := whole_state(folder)) is not None:
            yield state


def broken_checkpoints(run: Path) -> dict[Path, str]:
    """Folders named like a checkpoint that are incomplete, sorted by name, and what each of them lacks."""
    folders = sorted(path for path in (run / CHECKPOINTS).glob("step-*") if CHECKPOINT_PATTERN.fullmatch(path.name))
    return {folder: reason for folder in folders if (reason := inspect_checkpoint(folder)[1])}


def is_newer(folder: Path) -> bool:
    """Whether a newer version of the trainer wrote this checkpoint, so that its state cannot be read here."""
    try:
        schema = json.loads((find_state_file(folder) or folder / STATE_FILE).read_text(encoding="utf-8"))["schema"]
        return bool(schema > SCHEMA)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def find_state_file(folder: Path) -> Path | None:
    """The file with the CheckpointState of a folder that a run of ours saved; None for any other folder.

    transformers' Trainer, and with it TRL, LLaMA-Factory, ms-swift and Unsloth, write a trainer_state.json into checkpoint-N (trainer_callback.py,
    TrainerState): it has no schema. One that cannot be read is ours where the folder has a name that we give."""
    if (folder / STATE_FILE).is_file():
        return folder / STATE_FILE
    earlier = folder / EARLIER_STATE_FILE
    if not earlier.is_file():
        return None
    try:
        content = json.loads(earlier.read_text(encoding="utf-8"))
        ours = isinstance(content, dict) and "schema" in content
    except (OSError, ValueError, RecursionError):
        ours = False
    return earlier if ours or CHECKPOINT_PATTERN.fullmatch(folder.name) else None


def whole_state(folder: Path) -> CheckpointState | None:
    """The state of a checkpoint; None unless it has the right name and every file the recorded size."""
    state, reason = inspect_checkpoint(folder)
    return None if reason else state


def inspect_checkpoint(folder: Path) -> tuple[CheckpointState | None, str]:
    """The state, and why the checkpoint is not complete ('' if it is)."""
    file = find_state_file(folder) or folder / STATE_FILE
    try:
        state: CheckpointState = read(CheckpointState, file)
    except SpecError as error:
        return None, str(error)
    if folder.name != CHECKPOINT_NAME.format(step=state.step):
        return state, f"its {file.name} is of step {state.step}"
    return state, describe_missing(missing_files(folder, state), file.name)


def describe_missing(names: Sequence[str], file: str = STATE_FILE) -> str:
    """For files that are missing or have another size than `file` says; '' for none."""
    return f"{list_some(names, SHOWN)} missing or not of the size that {file} says" if names else ""


def missing_files(folder: Path, state: CheckpointState) -> tuple[str, ...]:
    """Names of files that are missing or have another size."""
    return tuple(name for name, size in state.files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size)


def fixed_settings(spec: TrainSpec) -> dict[str, Any]:
    """The spec as dotted keys, without the settings that may differ between attempts of one run. Values are plain JSON."""
    plain = json.loads(json.dumps(asdict(spec)))
    return {key: value for key, value in flatten(plain) if is_fixed(key)}


def is_fixed(key: str) -> bool:
    return key not in CHANGEABLE_KEYS and not f"{key}.".startswith(CHANGEABLE_SECTIONS)


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def default_of(key: str) -> Any:
    """The default of a dotted key of TrainSpec, as plain JSON; None if it has none."""
    kind: Any = TrainSpec
    for name in key.split("."):
        found = {field.name: field for field in fields(kind)}.get(name) if is_dataclass(kind) else None
        if found is None:
            return None
        default = found.default_factory() if found.default_factory is not MISSING else found.default
        kind = get_type_hints(kind)[name]
    return None if default is MISSING or is_dataclass(default) else json.loads(json.dumps(default))


def refuse_other_run(state: CheckpointState, spec: TrainSpec, data_sha256: str) -> None:
    """Raises InputRefused, naming every difference, when the checkpoint in the run's folder belongs to another run."""
    # A checkpoint of an earlier version may hold settings that are free now.
    there, here = {key: value for key, value in state.spec.items() if is_fixed(key)}, fixed_settings(spec)
    new = {key: default_of(key) for key in here if key not in there}  # a version before these keys did what their defaults say
    there = {**new, **there}
    accepted = {key for change in spec.accepted_changes for key in ACCEPTABLE_KEYS[change]}
    changed = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key) and key not in accepted]
    wrong = [f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in changed]
    if state.data_sha256 != data_sha256 and "data" not in spec.accepted_changes:
        wrong.append("the training rows have changed since")
    if wrong:
        raise InputRefused(
            f"{spec.output}/{state.path} belongs to another run: {'; '.join(wrong)}. A run can only be resumed with the same settings. Start a "
            f"new run; with stage.checkpoint={spec.output}/{state.path} it starts from these weights."
        )


def cut_rows(run: Path, step: int) -> MetricsSummary:
    """Keep the rows of steps 1 to `step` in metrics.jsonl, even with gaps; drop incomplete lines and rows of later steps, which will be
    repeated."""
    path = run / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept, stand, last = MetricsSummary(), [], 0
    for line in lines:
        row = parse_metrics_row(line)
        if row is not None and last < row["step"] <= step:
            kept = MetricsSummary(count=kept.count + 1, seconds=kept.seconds + row["seconds"], loss=row["loss"])
            stand.append(line)
            last = row["step"]
    if len(stand) < len(lines):
        write_text("".join(stand), path)
    return kept


def parse_metrics_row(line: str) -> dict[str, Any] | None:
    """None for a line that was being written when the run ended."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "seconds", "loss"} <= row.keys() else None
