"""A finished run as text for a person: how it ended, where its files are, and the next commands."""

import shlex
from pathlib import Path
from typing import Any

from launcher.check.rules import check
from launcher.config.compose import compose, keys_of
from launcher.config.schema import Node
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import Plan
from launcher.plan.rows import settle_rows
from launcher.plan.text import command_line, relative, table
from launcher.record.index import figure
from launcher.record.record import RECORD_FILE, Record, bracketed, checkpoint_place, first_node
from trainer.contract import CHECKPOINTS, METRICS_FILE

COUNTED = {"infer": "questions", "serve": "requests"}
PROJECT = Path(__file__).resolve().parents[2]
# What can come next: after a stage of a kind, and after one that left an adapter.
FOLLOWING_STAGES = {
    "train": ("evaluate", "lora", "serve"),
    "adapter": ("evaluate", "merge", "serve"),
    "evaluate": (),
    "merge": ("evaluate", "quantize", "serve"),
    "convert": ("evaluate", "serve"),
    "quantize": ("evaluate", "serve"),
}


def describe_record(record: Record, plan: Plan) -> str:
    """How a run ended, where its files are, and the next commands."""
    folder = Path(plan.folder)
    trained = plan.spec.stage.kind == "train"
    rows: dict[str, Any] = {"status": record.status} | ({"steps": f"{record.steps} of {plan.spec.steps}"} if trained else {})
    if record.final_loss is not None:
        rows["final loss"] = f"{record.final_loss:.4f}"
    if record.samples_per_s and trained:
        rows["speed"] = (
            f"{record.samples_per_s:,.0f} samples/s over {record.train_seconds:.1f} s of training, {record.seconds:.1f} s in all"
        )
    for name, value in record.evaluation.items():
        rows[name.replace("_", " ")] = (
            f"{value:g} {COUNTED.get(plan.spec.stage.kind, 'held-out samples')}" if name == "count" else figure(value)
        )
    if record.checkpoint:
        rows["checkpoint"] = relative(folder / record.checkpoint) if is_here(plan) else checkpoint_place(record, plan)
    elif trained and any(node.killed for node in record.nodes):
        late = f"killed after run.stop_timeout_s={plan.config.run.stop_timeout_s} without saving; raise it, or set run.save_every"
        rows["checkpoint"] = f"none: {late if record.steps else 'it ended before its first step'}"
    left = [f"{node.host}: {node.left.splitlines()[0]}" for node in record.nodes if node.left]
    if left and record.failure is None:  # a failure names them too
        rows["not cleared"] = f"{'; '.join(left)}; when it answers: {command_line('stop', record.run_id)}"
    rows |= {
        "record": relative(folder / RECORD_FILE),
        **({"rows": relative(folder / METRICS_FILE)} if trained else {}),
        "log": relative(folder / "logs" / "node0.log"),
    }
    text = table(rows)
    return text if not record.checkpoint else f"{text}\n\nnext steps\n{next_commands(record, plan)}"


def next_commands(record: Record, plan: Plan) -> str:
    """Launches of the following stages, from the checkpoint of this run, with the same overrides; only those that would be accepted."""
    kept = tuple(word for word in plan.overrides if word.partition("=")[0].partition(".")[0] != "stage")
    stage = plan.spec.stage
    after = FOLLOWING_STAGES.get("adapter" if stage.kind == "train" and stage.lora else stage.kind, ())
    batch = tuple(word for word in plan.overrides if word.startswith("stage.global_batch="))  # that of the rows, where they are few
    following = ((*kept, f"stage={name}", f"stage.checkpoint={record.run_id}", *(batch if name == "lora" else ())) for name in after)
    lines = [command_line("launch", *words) for words in following if is_launchable(words)]
    cluster = plan.config.cluster
    if lines and not is_here(plan) and not cluster.shared and len(cluster.working) > 1:  # cluster.sync takes it to the others from here
        lines.insert(0, bring_command(first_node(record, plan), plan))
    return "\n".join(f"  {line}" for line in (*lines, command_line("runs")))


def is_here(plan: Plan) -> bool:
    """Whether the files that the trainer wrote are on this machine."""
    return plan.folder == plan.spec.output


def bring_command(node: Node, plan: Plan) -> str:
    """Copies the checkpoints of a run's first node into this machine's folder of the run."""
    way = (*(("-J", node.jump) if node.jump else ()), *(("-P", str(node.port)) if node.port else ()))
    target = f"{node.user}@{bracketed(node.host)}" if node.user else bracketed(node.host)
    return shlex.join(("scp", "-r", *way, f"{target}:{plan.spec.output}/{CHECKPOINTS}", relative(Path(plan.folder))))


def is_launchable(overrides: tuple[str, ...]) -> bool:
    try:
        config = settle_rows(compose(overrides, PROJECT / "conf"), keys_of(overrides), Path.cwd())
    except ConfigRefused:
        return False
    return check(config, load_stacks(PROJECT / "images")).launchable
