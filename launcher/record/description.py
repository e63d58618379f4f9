"""A finished run as text for a person: how it ended, where its files are, and the next commands."""

import shlex
from pathlib import Path
from typing import Any

from launcher.check.rules import check
from launcher.config.compose import compose
from launcher.config.conf_folder import ConfFolder
from launcher.config.defaults import keys_of, without_keys
from launcher.config.schema import Node
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import RUNS_FOLDER, Plan
from launcher.plan.rows import settle_rows
from launcher.plan.text import command_line, duration, figure, relative, table
from launcher.record.metrics import describe_speed, newest_rows, read_curve
from launcher.record.reader import read_if_there
from launcher.record.record import (
    RECORD_FILE,
    Record,
    bracketed,
    checkpoint_place,
    first_node,
    last_checkpoint,
    load_attempts,
    step_of,
)
from launcher.record.run_name import typed_name
from trainer.contract import CHECKPOINTS, DATA_FILE, METRICS_FILE, DataReport, describe_left_out
from trainer.contract.spec import StageSpec

COUNTED = {"infer": "questions", "serve": "requests"}
LABELS = {  # of figures whose names say too little; the names are those of result.json
    "bytes": "bytes of weights",
    "bytes_before": "bytes of weights before",
    "size_ratio": "size, × that before",
    "size_of_16_bits": "size, × 16-bit weights",
    "logit_error": "largest logit error",
    "logit_bound": "logit error allowed",
    "logit_agreement": "same next token, share",
    "probes": "inputs compared",
}
PROJECT = Path(__file__).resolve().parents[2]
# What can come next: after a stage of a kind, and after one that left an adapter or trained the projector alone.
FOLLOWING_STAGES = {
    "train": ("evaluate", "lora", "serve"),
    "projector": ("evaluate", "lm", "lora", "serve"),
    "adapter": ("evaluate", "merge", "serve"),
    "evaluate": (),
    "merge": ("evaluate", "quantize", "serve"),
    "convert": ("evaluate", "serve"),
    "quantize": ("evaluate", "serve"),
}
TRAINING_STAGES = ("lm", "lora")  # of those
# Keys, and sections of keys, that only a stage that trains reads.
OF_TRAINING = tuple(
    f"run.{key}"
    for key in ("steps", "epochs", "save_every", "save_every_s", "keep_checkpoints", "keep_best", "restarts", "evaluation.every")
)
SECTIONS_OF_TRAINING = ("run.early_stop.", "data.augmentation.")


def describe_record(record: Record, plan: Plan, *, following: bool = True) -> str:
    """How a run ended, where its files are, and the next commands; without these if not `following`."""
    folder = Path(plan.folder)
    trained = plan.spec.stage.kind == "train"
    rows: dict[str, Any] = {"status": record.status} | ({"steps": f"{record.steps} of {plan.spec.steps}"} if trained else {})
    if record.ended:
        rows["ended"] = record.ended
    data: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if data is not None and data.left_out:
        rows["left out"] = describe_left_out(data.left_out)
    if record.data_unchecked:
        rows["data"] = f"not fully checked: {record.data_unchecked}"
    if record.final_loss is not None:
        rows["final loss"] = figure(record.final_loss)
    if trained and (speed := describe_speed(read_curve(folder / METRICS_FILE))):
        rows["throughput"] = speed
    rows["took"] = duration(record.seconds) + (
        f", {duration(record.train_seconds)} of it training" if record.train_seconds and trained else ""
    )
    for name, value in record.evaluation.items():
        rows[LABELS.get(name, name.replace("_", " "))] = describe_count(value, plan.spec.stage.kind) if name == "count" else figure(value)
    if record.checkpoint:
        rows["checkpoint"] = relative(folder / record.checkpoint) if is_here(plan) else checkpoint_place(record, plan)
    elif trained and any(node.killed for node in record.nodes):
        rows["checkpoint"] = f"none: {describe_kill(plan, folder) if record.steps else 'it ended before its first step'}"
    left = [f"{node.host}: {node.left.splitlines()[0]}" for node in record.nodes if node.left]
    if left and record.failure is None:  # a failure names them too
        rows["not cleared"] = f"{'; '.join(left)}; when it answers: {command_line('stop', record.run_id)}"
    rows |= {
        "record": relative(folder / RECORD_FILE),
        **({"rows": relative(folder / METRICS_FILE)} if trained else {}),
        "log": relative(folder / "logs" / "node0.log"),
    }
    text = table(rows)
    if resume := resume_line(folder, plan, record.status):
        return f"{text}\n\n{resume}"
    return text if not (record.checkpoint and following) else f"{text}\n\nnext steps\n{next_commands(record, plan)}"


def describe_count(count: float, kind: str) -> str:
    what = COUNTED.get(kind, "held-out samples")
    return f"{count:,.0f} {what.removesuffix('s') if count == 1 else what}"


def describe_kill(plan: Plan, folder: Path) -> str:
    """Why the ranks of a run that was stopped have saved nothing."""
    limit = plan.config.run.stop_timeout_s
    shorter = f", or after run.stop_timeout_s={limit}" if limit is not None else " or signal, or because they took too long"
    return f"the ranks were killed before they had saved, at a second Ctrl-C{shorter}"


def resume_line(folder: Path, plan: Plan, status: str) -> str:
    """How to continue a run that did not finish, and what of it was not saved; '' for any other. `status`: of its record, '' for a run without
    one."""
    began = status != "refused" or bool(load_attempts(folder))
    if plan.spec.stage.kind != "train" or status == "finished" or not began:
        return ""
    lost = describe_loss(folder, plan)
    command = command_line("launch", "--resume", typed_name(folder, Path.cwd() / RUNS_FOLDER))
    return f"{lost}\nto go on: {command}" if lost else f"to go on: {command}"


def describe_loss(folder: Path, plan: Plan) -> str:
    """Which steps a resumption repeats; '' where none, and where the checkpoints are on other machines."""
    rows = newest_rows(folder / METRICS_FILE)
    if not rows or not is_here(plan):
        return ""
    last, saved = rows[-1].step, step_of(Path(last_checkpoint(folder)).name)
    if not saved:
        return f"nothing was saved: it starts again from the beginning, and repeats steps 1 to {last}"
    return f"saved up to step {saved}: steps {saved + 1} to {last} are repeated" if saved < last else ""


def command_from_weights(plan: Plan, *words: str) -> str:
    """The launch of a run like this one, of the same stage, that starts from its weights. `words`: what it changes."""
    start = (f"stage.checkpoint={plan.run_id}", *words)
    return command_line("launch", *without_keys(plan.overrides, keys_of(start)), *start, *plan.options)


def next_commands(record: Record, plan: Plan) -> str:
    """Launches of the following stages, from the checkpoint of this run, with the same overrides; only those that would be accepted."""
    kept = tuple(word for word in plan.overrides if word.partition("=")[0].partition(".")[0] != "stage")
    stage, run = plan.spec.stage, typed_name(Path(plan.folder), Path.cwd() / RUNS_FOLDER)
    after = FOLLOWING_STAGES.get(outcome_of(stage), ())
    batch = tuple(word for word in plan.overrides if word.startswith("stage.global_batch="))  # that of the rows, where they are few
    following = (
        (*overrides_for(name, kept), f"stage={name}", f"stage.checkpoint={run}", *(batch if name in TRAINING_STAGES else ()))
        for name in after
    )
    conf = ConfFolder(project=PROJECT / "conf", own=Path(plan.conf) if plan.conf else None)
    lines = [command_line("launch", *words, *plan.options) for words in following if is_launchable(words, conf)]
    cluster = plan.config.cluster
    if lines and not is_here(plan) and not cluster.shared and len(cluster.working) > 1:  # cluster.sync takes it to the others from here
        lines.insert(0, bring_command(first_node(record, plan), plan))
    return "\n".join(f"  {line}" for line in (*lines, command_line("runs")))


def outcome_of(stage: StageSpec) -> str:
    """The key in FOLLOWING_STAGES."""
    if stage.kind != "train":
        return stage.kind
    return "adapter" if stage.lora else "projector" if tuple(stage.trainable) == ("projector",) else "train"


def overrides_for(stage: str, kept: tuple[str, ...]) -> tuple[str, ...]:
    """Those that a stage reads: one that does not train makes no steps."""
    if stage in TRAINING_STAGES:
        return kept
    return tuple(word for word in kept if word.partition("=")[0] not in OF_TRAINING and not word.startswith(SECTIONS_OF_TRAINING))


def is_here(plan: Plan) -> bool:
    """Whether the files that the trainer wrote are on this machine."""
    return plan.folder == plan.spec.output


def bring_command(node: Node, plan: Plan) -> str:
    """Copies the checkpoints of a run's first node into this machine's folder of the run."""
    way = (*(("-J", node.jump) if node.jump else ()), *(("-P", str(node.port)) if node.port else ()))
    target = f"{node.user}@{bracketed(node.host)}" if node.user else bracketed(node.host)
    return shlex.join(("scp", "-r", *way, f"{target}:{plan.spec.output}/{CHECKPOINTS}", relative(Path(plan.folder))))


def is_launchable(overrides: tuple[str, ...], conf: ConfFolder) -> bool:
    try:
        config = settle_rows(compose(overrides, conf), keys_of(overrides), Path.cwd())
    except ConfigRefused:
        return False
    return check(config, load_stacks(PROJECT / "images")).launchable
