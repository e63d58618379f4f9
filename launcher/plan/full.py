"""Everything that a launch would do: config, DeepSpeed config, commands of each node, image, memory item by item, verdict."""

import json
import shlex
from dataclasses import asdict

from launcher.config.schema import AXES
from launcher.memory.estimate import estimate_memory
from launcher.memory.states import GIB
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan
from launcher.plan.short import IF_IMAGE, describe_tight, describe_unsent, describe_work, list_assumptions, name_verdict, order_notes
from launcher.plan.text import command_line, gib, table
from launcher.redact import mask_credentials
from trainer.contract.wording import plural


def describe_full(plan: Plan, unsent: str = "", named: str = "") -> str:
    """`unsent`: as of describe_short."""
    import yaml

    parts = (
        ("config", yaml.safe_dump(mask_credentials(asdict(plan.config)), sort_keys=False, allow_unicode=True, width=140)),
        *((("DeepSpeed config", json.dumps(plan.spec.deepspeed, indent=2)),) if plan.spec.stage.kind == "train" else ()),
        *((f"node {command.node_rank}: {command.host}", describe_command(command)) for command in plan.commands),
        ("image", describe_planned_image(plan, unsent)),
        ("memory of the device with the highest peak", describe_memory(plan)),
        ("verdict", describe_verdict(plan, named)),
    )
    return "\n".join((head_verdict(plan, unsent), *(f"== {title}\n{text.rstrip()}\n" for title, text in parts))).rstrip()


def head_verdict(plan: Plan, unsent: str = "") -> str:
    """The verdict in a line, hundreds of lines before the reasons."""
    if plan.verdict.launchable and unsent and not plan.verdict.tight:
        return f"{IF_IMAGE}\n"
    if plan.verdict.launchable:
        return f"{name_verdict(plan, plan.memory or estimate_memory(plan.config))}\n"
    return f"planned; a launch is refused, for {plural(len(plan.verdict.problems), 'reason')} at the end\n"


def describe_command(command: NodeCommand) -> str:
    lines = [f"{key}={shlex.quote(value)}" for key, value in mask_credentials(command.environment).items()]
    argvs = {"data": command.prepare, "start": command.start, "probe": command.probe, "logs": command.logs, "stop": command.stop}
    return "\n".join((*lines, *(f"{name}: {shlex.join(argv)}" for name, argv in argvs.items() if argv)))


def describe_planned_image(plan: Plan, unsent: str = "") -> str:
    image = plan.image
    rows = {
        "tag": image.tag,
        "Dockerfile": f"images/rendered/{image.stack}/Dockerfile",
        "lock": image.lock or "none yet for this architecture: the image can be planned, not built",
    }
    if unsent:
        rows["sent"] = describe_unsent(plan, unsent)
    if plan.licence:
        at = f" at {plan.licence.accepted_at}" if plan.licence.accepted_at else ""
        rows["licence"] = f"{plan.licence.name}, accepted{at} with {plan.licence.how}"
    if plan.config.cluster.runtime == "process":
        rows["used"] = "no: cluster.runtime=process runs in the Python environment of this command"
    return table(rows)


def describe_memory(plan: Plan) -> str:
    """The estimate as a table: item, size, and whether it is arithmetic, calibrated or traced."""
    states, memory = plan.states, plan.memory or estimate_memory(plan.config)
    details = {"weights": f"{states.parameters:,} parameters", "gradients": f"{states.trainable:,} trained"}
    trains = plan.spec.stage.kind == "train"
    items = (item for item in memory.items if trains or item.size_bytes)
    rows = {item.name: f"{gib(item.size_bytes)}  {item.basis:10}  {details.get(item.name, '')}".rstrip() for item in items}
    if memory.limit_bytes is None:
        rows["peak"] = f"{gib(memory.total_bytes)}  the device's memory is not known, so nothing was compared with it"
    else:
        left = memory.limit_bytes - memory.total_bytes
        of = f"of {memory.limit_bytes / GIB:g} GiB: {left / GIB:.3f} GiB free ({left / memory.limit_bytes:.0%})"
        rows["peak"] = f"{gib(memory.total_bytes)}  {of}"
    rows |= {f"host, a node: {item.name}": f"{gib(item.size_bytes)}  {item.basis}" for item in memory.host_items}
    tight = (text,) if (text := describe_tight(plan.verdict)) else ()
    lines = [table(rows), *tight, *(f"assumption: {text}" for text in list_assumptions(plan))]
    return "\n".join((*lines, f"strategy: {plan.choice}") if plan.choice and trains else lines)


def describe_verdict(plan: Plan, named: str = "") -> str:
    config, verdict = plan.config, plan.verdict
    lines = [
        " ".join(f"{axis}={getattr(config, axis).name}" for axis in AXES),
        describe_work(plan.spec),
        *(f"note: {note}" for note in order_notes(verdict.notes)),
        *(f"forced ({config.run.force}):\n{problem}" for problem in verdict.forced),
    ]
    if verdict.launchable:
        word = name_verdict(plan, plan.memory or estimate_memory(config))
        words = (*plan.overrides, *(("--run-id", named) if named else ()), *plan.options)
        return "\n".join((*lines, word, f"next: {command_line('launch', *words)}"))
    return "\n".join((*lines, "planned; a launch is refused:", *map(str, verdict.problems)))
