"""Plans and records as text for a person. The last lines are what one sees first: verdict, and what to do next."""

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.check.rules import check
from launcher.check.strategy import choose_strategy
from launcher.config.compose import compose
from launcher.config.schema import AXES, Node
from launcher.errors import ConfigRefused
from launcher.image.docker import BuiltImage
from launcher.image.stack import LABEL, Image, load_stacks
from launcher.memory.estimate import estimate_memory
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan, to_plain
from launcher.record.index import figure
from launcher.record.record import RECORD_FILE, Record, bracketed, checkpoint_place, first_node
from launcher.redact import mask_credentials
from trainer.contract import CHECKPOINTS, METRICS_FILE, TrainSpec

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
GIB = 2**30
OPEN_LABEL = "org.opencontainers.image."


def plan_json(plan: Plan) -> str:
    return json.dumps(to_plain(plan), indent=2, ensure_ascii=False)


def describe_plan(plan: Plan) -> str:
    """Everything that `launch` would do, then the verdict."""
    import yaml

    parts = (
        ("config", yaml.safe_dump(mask_credentials(asdict(plan.config)), sort_keys=False, allow_unicode=True, width=140)),
        *((("DeepSpeed config", json.dumps(plan.spec.deepspeed, indent=2)),) if plan.spec.stage.kind == "train" else ()),
        *((f"node {command.node_rank}: {command.host}", describe_command(command)) for command in plan.commands),
        ("image", describe_planned(plan)),
        ("memory of the fullest device", describe_memory(plan)),
        ("verdict", describe_verdict(plan)),
    )
    return "\n".join(f"== {title}\n{text.rstrip()}\n" for title, text in parts).rstrip()


def describe_command(command: NodeCommand) -> str:
    lines = [f"{key}={shlex.quote(value)}" for key, value in mask_credentials(command.environment).items()]
    told = {"data": command.prepare, "start": command.start, "probe": command.probe, "logs": command.logs, "stop": command.stop}
    lines += [f"{name}: {shlex.join(argv)}" for name, argv in told.items() if argv]
    return "\n".join(lines)


def describe_planned(plan: Plan) -> str:
    image = plan.image
    rows = {
        "tag": image.tag,
        "Dockerfile": f"images/rendered/{image.stack}/Dockerfile",
        "lock": image.lock or "none yet for this architecture: the image can be planned, not built",
    }
    if plan.config.cluster.runtime == "process":
        rows["used"] = "no: cluster.runtime=process runs in the environment of this command"
    return table(rows)


def describe_images(images: tuple[BuiltImage, ...]) -> str:
    """One line an image, newest first."""
    lines = [f"{image.name:40} {image.size_bytes / 1e9:6.2f} GB  {image.architecture:8} {image.created}" for image in images]
    return "\n".join(lines) or "no images of omnilaunch in this engine; build one with: omnilaunch image build hardware=cpu"


def describe_image(image: BuiltImage) -> str:
    """What is in a built image: its labels, and its layers from the last to the first."""
    rows = {
        "image": image.name,
        "id": image.id,
        "built": image.created,
        "for": image.architecture,
        "runs as": image.user or "root",
        "size": f"{image.size_bytes / 1e9:.2f} GB",
    }
    labels = {name.removeprefix(LABEL).removeprefix(OPEN_LABEL): value for name, value in sorted(image.labels.items()) if value}
    layers = [f"{size / 1e6:9.1f} MB  {command[:100]}" for size, command in image.layers if size]
    return "\n".join((table(rows | labels), "", "layers, last first", *layers))


def describe_unbuilt(image: Image) -> str:
    return table(
        {
            "image": image.tag,
            "built": "no",
            "from": image.base,
            "lock": image.lock or "none yet for this architecture",
            "next": f"{program()} image build with the same words",
        }
    )


def describe_memory(plan: Plan) -> str:
    """The verdict of launcher.memory.estimate as a table: item, size, and whether it is counted or calibrated."""
    states, memory = plan.states, plan.memory or estimate_memory(plan.config)
    told = {"weights": f"{states.parameters:,} parameters", "gradients": f"{states.trainable:,} trained"}
    trains = plan.spec.stage.kind == "train"
    items = (item for item in memory.items if trains or item.size_bytes)
    rows = {item.name: f"{gib(item.size_bytes)}  {item.basis:10}  {told.get(item.name, '')}".rstrip() for item in items}
    if memory.limit_bytes is None:
        rows["peak"] = f"{gib(memory.total_bytes)}  the device's memory is not known: nothing was held against it"
    else:
        left = memory.limit_bytes - memory.total_bytes
        rows["peak"] = (
            f"{gib(memory.total_bytes)}  of {memory.limit_bytes / GIB:g} GiB: {left / GIB:.3f} GiB to spare ({left / memory.limit_bytes:.0%})"
        )
    rows |= {f"host, a node: {item.name}": f"{gib(item.size_bytes)}  {item.basis}" for item in memory.host_items}
    lines = [table(rows), f"taken for granted: {memory.assumption}"]
    return "\n".join((*lines, f"strategy: {plan.choice}") if plan.choice and trains else lines)


def gib(size: int) -> str:
    return f"{size / GIB:9.3f} GiB"


def describe_verdict(plan: Plan) -> str:
    config, spec, verdict = plan.config, plan.spec, plan.verdict
    names = " ".join(f"{axis}={getattr(config, axis).name}" for axis in AXES)
    lines = [
        names,
        describe_work(spec),
        *(f"note: {note}" for note in verdict.notes),
        *(f"forced ({config.run.force}):\n{problem}" for problem in verdict.forced),
    ]
    if verdict.launchable:
        return "\n".join((*lines, "ok", f"next: {command_line('launch', *plan.overrides)}"))
    return "\n".join((*lines, "planned; a launch is refused:", *map(str, verdict.problems)))


def describe_work(spec: TrainSpec) -> str:
    """What the ranks will do, in a line."""
    stage, batch, ranks = spec.stage, spec.batch, spec.device.world_size
    where = f"on {ranks} device(s)" if spec.device.cards == 1 else f"over the {spec.device.cards} cards of one node"
    weights = stage.checkpoint or spec.model.source.id or spec.model.source.path
    if stage.kind == "merge":
        return f"the adapter {weights} is folded into its base, file by file"
    if stage.conversion is not None:
        return f"{weights} in {stage.conversion.dtype}, file by file; what does not survive: {stage.conversion.unfit}"
    if stage.quantization is not None:
        return f"{weights} in {stage.quantization.scheme}, but for {', '.join(stage.quantization.keep) or 'nothing'}"
    if stage.inference is not None:
        what = f"the rows of {stage.inference.input}" if stage.inference.input else "one question"
        return f"{what}, {stage.inference.batch} at a time, {where}"
    if stage.serving is not None:
        return f"http://{stage.serving.address}:{stage.serving.port} on the node, {stage.serving.max_batch} answers at a time, {where}"
    if stage.kind == "evaluate":
        return f"{', '.join(spec.evaluation.metrics)} of {weights}, {spec.evaluation.batch} questions at a time, {where}"
    shares = f"{batch.micro_batch} x {batch.accumulation} accumulated x {ranks} device(s)"
    return f"{batch.global_batch} samples a step = {shares}, {spec.steps} steps"


def describe_record(record: Record, plan: Plan) -> str:
    """How a run ended, where things lie, and the commands to go on with."""
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
        rows[name.replace("_", " ")] = f"{value:g} {COUNTED.get(plan.spec.stage.kind, 'held-out samples')}" if name == "count" else figure(value)
    if record.checkpoint:
        rows["checkpoint"] = relative(folder / record.checkpoint) if is_here(plan) else checkpoint_place(record, plan)
    elif trained and any(node.killed for node in record.nodes):
        late = f"killed after run.stop_timeout_s={plan.config.run.stop_timeout_s} without saving; raise it, or set run.save_every"
        rows["checkpoint"] = f"none: {late if record.steps else 'it ended before its first step'}"
    left = [f"{node.host}: {node.left.splitlines()[0]}" for node in record.nodes if node.left]
    if left and record.failure is None:  # a failure is told with them
        rows["not cleared"] = f"{'; '.join(left)}; when it answers: {command_line('stop', record.run_id)}"
    rows |= {
        "record": relative(folder / RECORD_FILE),
        **({"rows": relative(folder / METRICS_FILE)} if trained else {}),
        "log": relative(folder / "logs" / "node0.log"),
    }
    text = table(rows)
    return text if not record.checkpoint else f"{text}\n\ngo on with\n{next_commands(record, plan)}"


def next_commands(record: Record, plan: Plan) -> str:
    """The same words with another stage, from what this run has saved; those alone that a launch would take."""
    kept = tuple(word for word in plan.overrides if word.partition("=")[0].partition(".")[0] != "stage")
    stage = plan.spec.stage
    after = FOLLOWING_STAGES.get("adapter" if stage.kind == "train" and stage.lora else stage.kind, ())
    following = ((*kept, f"stage={name}", f"stage.checkpoint={record.run_id}") for name in after)
    lines = [command_line("launch", *words) for words in following if is_launchable(words)]
    cluster = plan.config.cluster
    if lines and not is_here(plan) and not cluster.shared and len(cluster.working) > 1:  # cluster.sync takes it to the others from here
        lines.insert(0, bring_command(first_node(record, plan), plan))
    return "\n".join(f"  {line}" for line in (*lines, command_line("runs")))


def is_here(plan: Plan) -> bool:
    """Whether what the trainer wrote lies on this machine."""
    return plan.is_local


def bring_command(node: Node, plan: Plan) -> str:
    """The checkpoints of a run's first node into this machine's folder of the run."""
    way = (*(("-J", node.jump) if node.jump else ()), *(("-P", str(node.port)) if node.port else ()))
    target = f"{node.user}@{bracketed(node.host)}" if node.user else bracketed(node.host)
    return shlex.join(("scp", "-r", *way, f"{target}:{plan.spec.output}/{CHECKPOINTS}", relative(Path(plan.folder))))


def is_launchable(overrides: tuple[str, ...]) -> bool:
    try:
        config = compose(overrides, PROJECT / "conf")
    except ConfigRefused:
        return False
    config = replace(config, strategy=choose_strategy(config))
    return check(config, load_stacks(PROJECT / "images")).launchable


def command_line(*words: str) -> str:
    return shlex.join((program(), *map(mask_credentials, words)))


def program() -> str:
    """The command as the user typed it: `make` runs .venv/bin/omnilaunch, which need not be on PATH."""
    return sys.argv[0] if Path(sys.argv[0]).name == "omnilaunch" else "omnilaunch"


def table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def relative(path: Path) -> str:
    """Shorter where it can be: as seen from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
