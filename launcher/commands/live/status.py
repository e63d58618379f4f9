"""`omnilaunch status`: how a run ended; of a running one, its step, and the state of its container on each node."""

import argparse
from typing import TYPE_CHECKING, Any

from launcher.commands.live.live_run import add_run, connect_nodes, find_named, load_plan, read_record, say_resume
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.plan.plan import Plan
    from launcher.record.index import RunEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    from launcher.record.index import RUNNING, RunEntry
    from launcher.record.record import utc_now
    from launcher.run.stop import NO_CONTAINER, state_of
    from launcher.ssh.parallel import attempt_each

    folder = find_named(arguments)
    plan, record = load_plan(folder), read_record(folder)
    if record is not None:
        arguments.say(describe_end(record, plan))
        say_resume(folder, plan, arguments.say, status=record.status)
        return Exit.OK
    entry = RunEntry(folder=folder, record=None)
    is_gone = entry.status != RUNNING
    if plan.config.cluster.runtime == "docker":
        with connect_nodes([plan]) as nodes:
            states = attempt_each(state_of, nodes)
        for node, state in zip(nodes, states, strict=True):
            arguments.say(f"{node.command.host:30} {state}")
        is_gone = is_gone and all(state == NO_CONTAINER for state in states)
    arguments.say(describe_running(entry, plan, (utc_now() - entry.started_at).total_seconds()))
    if is_gone:
        say_resume(folder, plan, arguments.say, status="")
    return Exit.OK


def describe_end(record: Any, plan: "Plan") -> str:
    """When and how the run ended, and after a failure what failed."""
    from launcher.plan.text import duration, figure

    when = f"{record.ended_at[:19].replace('T', ' ')} UTC, after {duration(record.seconds)}"
    steps = f", step {record.steps:,} of {plan.spec.steps:,}" if plan.spec.stage.kind == "train" else ""
    loss = f", loss {figure(record.final_loss)}" if steps and record.final_loss is not None else ""
    failure = f"\n{record.failure.host}: {record.failure.message}" if record.failure else ""
    return f"{record.status} at {when}{steps}{loss}{failure}"


def describe_running(entry: "RunEntry", plan: "Plan", seconds: float) -> str:
    """The last step whose row is here. Only containers can be supervised again."""
    from launcher.plan.commands import FOLDER_VARIABLE
    from launcher.plan.text import duration, figure
    from launcher.record.index import RUNNING
    from launcher.ssh.transport import processes_with

    row, has_containers = entry.last_row, plan.config.cluster.runtime == "docker"
    step = f", step {row['step']:,} of {plan.spec.steps:,}, loss {figure(row['loss'])}" if row else ", before its first step"
    where = step if plan.spec.stage.kind == "train" else ""
    if entry.status == RUNNING:
        return f"running for {duration(seconds)}{where}"
    if not has_containers and processes_with(FOLDER_VARIABLE, plan.spec.output):
        return (
            f"no record{where}: its launcher was killed, and its ranks still run. To let them save and end: omnilaunch stop {entry.run_id}"
        )
    if not has_containers:
        return f"no record{where}: its launcher was killed. To see the output: omnilaunch logs {entry.run_id}"
    return f"no launcher supervises it{where}. To supervise it: omnilaunch attach {entry.run_id}"
