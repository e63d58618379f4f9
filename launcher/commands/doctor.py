"""`omnilaunch doctor`: check the nodes of a cluster, or this machine, and print every finding with its fix. `doctor data`: the data instead."""

import argparse
import os

from launcher.commands.plan import PROJECT, add_overrides, conf_of, plan_of
from trainer.contract import Exit

DATA = "data"  # before the overrides: the data of a run, as by `omnilaunch data check`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "as for plan: cluster=lab hardware=h200; after the word data: check the data, and say what stands out about it")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    if DATA in arguments.overrides[:1]:
        from launcher.commands import data

        return data.run(argparse.Namespace(**{**vars(arguments), "overrides": arguments.overrides[1:], "out": ""}))
    from launcher.doctor.findings import describe_findings, findings_json, has_errors
    from launcher.image.stack import load_stacks
    from launcher.run.session import examine_nodes

    plan = plan_of(arguments.overrides, "", only_nodes=True, conf=conf_of(arguments))
    examination = examine_nodes(plan, load_stacks(PROJECT / "images"), os.environ, launching=False)
    arguments.say(findings_json(examination.findings) if arguments.json else describe_findings(examination.findings))
    return Exit.NODE if has_errors(examination.findings) else Exit.OK
