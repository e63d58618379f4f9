"""`omnilaunch status`: how a run ended; of a running one, the state of its container on each node."""

import argparse

from launcher.commands.live.live_run import add_run, connect_nodes, find_named, load_plan, read_record, require_containers
from trainer.contract import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    from launcher.run.stop import state_of
    from launcher.ssh.parallel import attempt_each

    folder = find_named(arguments)
    plan, record = load_plan(folder), read_record(folder)
    if record is not None:
        steps = f", step {record.steps} of {plan.spec.steps}" if plan.spec.stage.kind == "train" else ""
        arguments.say(f"{record.status} at {record.ended_at}{steps}")
        return Exit.OK
    require_containers(plan, "status")
    with connect_nodes([plan]) as nodes:
        states = attempt_each(state_of, nodes)
    for node, state in zip(nodes, states, strict=True):
        arguments.say(f"{node.command.host:30} {state}")
    return Exit.OK
