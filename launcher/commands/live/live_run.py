"""What attach, stop, status and logs share: the plan and the record in a run's folder, and the connections to the nodes of the run."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.plan import PROJECT
from launcher.errors import ConfigRefused
from launcher.record.run_name import PLAN_FILE, RECORD_FILE, find_run

if TYPE_CHECKING:
    from launcher.plan.plan import Plan
    from launcher.run.run_folder import WorkingNode

RUN_HELP = "a run id, a unique prefix of one, `last`, or the path of a run's folder"


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def find_named(arguments: argparse.Namespace) -> Path:
    return find_run(arguments.run, Path.cwd() / "runs")


def supervise(folder: Path, plan: "Plan", say: Callable[[str], None]) -> Any:
    """Supervise the run until it has ended, and return its record."""
    from launcher.plan.local_context import local_context
    from launcher.record.reader import read_if_there
    from launcher.record.record import SOURCE_FILE, SourceState
    from launcher.run.launch import attach
    from launcher.run.session import open_session

    gc.enable()  # `main` turned it off; this may take days
    plan = with_credentials(plan)
    source = read_if_there(SourceState, folder / SOURCE_FILE) or SourceState(commit="", dirty=False)
    started = datetime.fromtimestamp((folder / PLAN_FILE).stat().st_mtime, UTC)
    terminal = sys.stdout.isatty()
    with open_session(plan, local_context(PROJECT), os.environ, say=say, terminal=terminal, launching=False) as (plan, session):
        return attach(plan, source, started, session)


def with_credentials(plan: "Plan") -> "Plan":
    """The plan with the credentials that this environment gives for its addresses: none is ever written to a run's folder."""
    from launcher.config.credentials import give_credentials

    cluster = plan.config.cluster
    given = replace(cluster, delivery=give_credentials(cluster.delivery, os.environ))
    return replace(plan, config=replace(plan.config, cluster=given))


def load_plan(folder: Path) -> "Plan":
    """The plan of the newest attempt."""
    return load_plans(folder)[-1]


def load_plans(folder: Path) -> "tuple[Plan, ...]":
    """The plan of each attempt that has one, in their order; the first is the run's."""
    from launcher.plan.plan import Plan
    from launcher.record.reader import read_as
    from launcher.record.record import attempt_files

    return tuple(read_as(Plan, path) for path in (folder / PLAN_FILE, *attempt_files(folder, PLAN_FILE)))


def read_record(folder: Path) -> Any:
    """The record of a run that has ended, else None. Raises ConfigRefused for one that cannot be read: the run has ended all the same, and
    supervising it would start it again and overwrite its files."""
    from launcher.errors import RecordRefused
    from launcher.record.reader import read_as
    from launcher.record.record import Record

    if not has_ended(folder):
        return None
    try:
        return read_as(Record, folder / RECORD_FILE)
    except RecordRefused as error:
        raise ConfigRefused(
            f"run {folder.name} has ended, and this version cannot read its record: {error}. To check whether anything of it is left on the "
            f"nodes: omnilaunch stop {folder.name}"
        ) from error


def say_resume(folder: Path, plan: "Plan", say: Callable[[str], None], *, status: str) -> None:
    """How to continue a run that has ended without finishing; a server is started again. `status`: of its record, '' for a run without one."""
    from launcher.plan.text import command_line
    from launcher.record.description import resume_line

    if plan.spec.stage.kind == "serve":
        say(f"a server keeps nothing to continue from; to start one again: {command_line('launch', *plan.overrides, *plan.options)}")
    elif line := resume_line(folder, plan, status):
        say(line)


def has_ended(folder: Path) -> bool:
    return (folder / RECORD_FILE).exists()


def require_containers(plan: "Plan", verb: str) -> None:
    if plan.config.cluster.runtime != "docker":
        resumed = f"; when it has ended, omnilaunch launch --resume {plan.run_id} continues it" if plan.spec.stage.kind == "train" else ""
        raise ConfigRefused(
            f"run {plan.run_id} has no containers (cluster.runtime=process): its processes belong to its launcher. To stop it: omnilaunch stop "
            f"{plan.run_id}{resumed}. `omnilaunch {verb}` works for runs with cluster.runtime=docker"
        )


def connect_nodes(plans: "Sequence[Plan]") -> "AbstractContextManager[tuple[WorkingNode, ...]]":
    from launcher.run.session import reach_containers

    return reach_containers(plans, os.environ)
