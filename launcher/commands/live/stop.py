"""`omnilaunch stop`: let a run save and end, and then make sure that nothing of it is left on any node."""

import argparse
import time
from contextlib import suppress
from pathlib import Path

from launcher.commands.live.live_run import (
    add_run,
    connect_nodes,
    find_named,
    has_ended,
    load_plans,
    say_resume,
    supervise,
)
from launcher.commands.live.stop_processes import stop_processes
from launcher.errors import NodeFailed, RunEnded
from launcher.record.lock import ask_to_stop, is_locked
from trainer.contract import Exit

POLL_S = 0.5
RECORD_S = 5.0  # what a launcher takes to write the record after everything has ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """The run ends under its own launcher, or under this one where that has ended. Then every node of every attempt is checked. Raises
    NodeFailed naming each node where something is left, or where that could not be checked."""
    from launcher.plan.text import command_line
    from launcher.record.reader import read_object
    from launcher.record.record import RECORD_FILE, utc_now
    from launcher.record.run_name import typed_name
    from launcher.run.stop import end_run
    from launcher.run.stop_limit import find_limit_s

    folder = find_named(arguments)
    plan = load_plans(folder)[-1]
    if plan.config.cluster.runtime != "docker":
        return stop_processes(folder, plan, arguments.say)
    ask_to_stop(folder, utc_now())
    if not has_ended(folder) and not is_locked(folder):
        with suppress(RunEnded, NodeFailed):  # how it ended is in the record; what is left is checked below
            supervise(folder, plan, arguments.say)
    deadline = time.monotonic() + find_limit_s(plan, folder)
    busy = is_busy(folder, until=deadline)
    with connect_nodes(load_plans(folder)) as nodes:  # read again: another attempt may have started meanwhile
        stops = end_run(nodes, accelerator=plan.config.hardware.accelerator, grace_s=max(0.0, deadline - time.monotonic()))
    left = [f"  {stop.host}: {stop.left}" for stop in stops if stop.left]
    if busy and is_busy(folder, until=time.monotonic() + RECORD_S):
        left.append(
            "  the launcher of the run is still there: it starts nothing more, and ends as soon as the command it waits for returns"
        )
    if clear := [stop.host for stop in stops if not stop.left]:
        arguments.say(f"nothing of run {plan.run_id} is left on {', '.join(clear)}")
    if has_ended(folder):
        arguments.say(f"how it ended: {command_line('status', typed_name(folder, Path.cwd() / 'runs'))}")
        say_resume(folder, plan, arguments.say, status=str(read_object(folder / RECORD_FILE, []).get("status", "")))
    if left:
        lines = "\n".join(left)
        raise NodeFailed(
            f"something of run {plan.run_id} is left, or could not be checked:\n{lines}\n"
            f"  Next, when these nodes respond: omnilaunch stop {plan.run_id}"
        )
    return Exit.OK


def is_busy(folder: Path, *, until: float) -> bool:
    """Whether the run's launcher is still working at the time `until` (of time.monotonic). Returns earlier when it has ended."""
    while busy := not has_ended(folder) and is_locked(folder):
        if time.monotonic() >= until:
            break
        time.sleep(POLL_S)
    return busy
