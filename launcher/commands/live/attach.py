"""`omnilaunch attach`: supervise a run whose launcher has ended, until the run ends."""

import argparse

from launcher.commands.live.live_run import add_run, find_named, load_plan, read_record, require_containers, supervise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    """As if the launcher had never ended. Of a run that has ended, print the record."""
    from launcher.record.description import describe_record

    folder = find_named(arguments)
    plan = load_plan(folder)
    require_containers(plan, "attach")
    record = read_record(folder) or supervise(folder, plan, arguments.say)
    arguments.say(describe_record(record, plan))
    return int(record.exit_code)
