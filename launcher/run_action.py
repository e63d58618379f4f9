"""What can be done with a run that is there: attach, stop, status, logs. Its folder says which containers on which nodes are its own.

Like image_action, imported by every command, so it imports late itself.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused, NodeFailed, suggest
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.node import Site
    from launcher.plan import Plan

PROJECT = Path(__file__).resolve().parent.parent
POLL_S = 0.5


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    for name, (verb, text) in ACTIONS.items():
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("run", metavar="RUN", help="its id, as `omnilaunch runs` shows it")
        if name == "logs":
            sub.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
        sub.set_defaults(verb=verb, say=say)


def attach_run(arguments: argparse.Namespace) -> int:
    """Supervision as if it had never been left; of a run that has ended, its record."""
    from launcher.launch import attach
    from launcher.record import SOURCE_FILE, SourceState, read_if_there
    from launcher.show import describe_record

    folder = find_run(arguments.run)
    plan, record = load_plan(folder), recorded(folder)
    require_containers(plan, "attach")
    if record is None:
        source = read_if_there(SourceState, folder / SOURCE_FILE) or SourceState(commit="", dirty=False)
        started = datetime.fromtimestamp((folder / "plan.json").stat().st_mtime, UTC)
        with reach(plan, arguments.say) as desk:
            record = attach(plan, source, started, desk)
    arguments.say(describe_record(record, plan))
    return int(record.exit_code)


def stop_run(arguments: argparse.Namespace) -> int:
    """Ask the ranks to save and end, remove the containers, and look whether they are gone. Raises NodeFailed that names every node where
    that is not so."""
    folder = find_run(arguments.run)
    plan = load_plan(folder)
    require_containers(plan, "stop")
    with reach(plan, arguments.say) as desk:
        from launcher.fleet import each
        from launcher.launch import sites_of

        sites = sites_of(plan, desk)
        each(lambda site: site.transport.run(site.command.stop), sites)
        deadline = time.monotonic() + plan.config.run.stop_timeout_s
        while any(each(is_running, sites)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        each(lambda site: site.transport.run(site.command.remove), sites)
        left = [site.command.host for site, there in zip(sites, each(is_there, sites), strict=True) if there]
        if left:
            raise NodeFailed(f"the container is still there on {', '.join(left)}: docker rm --force {sites[0].command.name} there says why")
    arguments.say(f"nothing of run {plan.run_id} is left on {', '.join(command.host for command in plan.commands)}")
    return Exit.OK


def show_status(arguments: argparse.Namespace) -> int:
    """One line a node: what its engine says of the container, now."""
    from launcher.fleet import attempt_each
    from launcher.launch import sites_of

    folder = find_run(arguments.run)
    plan, record = load_plan(folder), recorded(folder)
    if record is not None:
        arguments.say(f"{record.status} at {record.ended_at}, step {record.steps} of {plan.spec.steps}")
        return Exit.OK
    require_containers(plan, "status")
    with reach(plan, arguments.say) as desk:
        answers = attempt_each(state_of, sites_of(plan, desk))
    for command, answer in zip(plan.commands, answers, strict=True):
        arguments.say(f"{command.host:30} {answer}")
    return Exit.OK


def show_logs(arguments: argparse.Namespace) -> int:
    """Every rank's output, each line with its node in front."""
    folder = find_run(arguments.run)
    for line in follow(folder, ended=lambda: not arguments.follow or recorded(folder) is not None):
        arguments.say(line)
    return Exit.OK


def follow(folder: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """Whole lines of all logs as they come; once more after the end, so that the last lines are there."""
    offsets: dict[Path, int] = {}
    last = False
    while True:
        for path in sorted((folder / "logs").glob("node*.log")):
            with path.open("rb") as file:
                file.seek(offsets.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            offsets[path] = offsets.get(path, 0) + len(whole) + len(newline)
            yield from (f"[{path.stem}] {line}" for line in whole.decode("utf-8", errors="replace").splitlines())
        if last:
            return
        last = ended()
        if not last:
            time.sleep(POLL_S)


# ---------------------------------------------------------------------------------------------------------------- parts


def find_run(name: str) -> Path:
    """The run's folder below this one. Raises ConfigRefused listing the runs that there are."""
    from launcher.record import PLAN_FILE

    runs = Path.cwd() / "runs"
    names = [path.parent.name for path in runs.glob(f"*/{PLAN_FILE}")]
    if name not in names:
        raise ConfigRefused(f"there is no run {name!r} in {runs}; {suggest(name, names)}" if names else f"there are no runs in {runs}")
    return runs / name


def load_plan(folder: Path) -> "Plan":
    from launcher.plan import Plan
    from launcher.record import PLAN_FILE
    from trainer.contract import SpecError, decode

    try:
        plan: Plan = decode(Plan, json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")), "plan")
    except (OSError, ValueError, SpecError) as error:
        raise ConfigRefused(f"{folder / PLAN_FILE} cannot be read by this version: {error}") from error
    return plan


def recorded(folder: Path) -> Any:
    """The record of a run that has ended, else None."""
    from launcher.record import RECORD_FILE, Record, read_if_there

    return read_if_there(Record, folder / RECORD_FILE)


def require_containers(plan: "Plan", verb: str) -> None:
    if plan.config.cluster.runtime != "docker":
        raise ConfigRefused(
            f"run {plan.run_id} has no containers (cluster.runtime=process): its launcher holds the processes. End it there with Ctrl-C; "
            f"to {verb} a run from anywhere, launch it with cluster.runtime=docker"
        )


def reach(plan: "Plan", say: Callable[[str], None]) -> Any:
    from launcher.desk import open_desk

    return open_desk(plan, PROJECT, os.environ, say=say, terminal=sys.stdout.isatty())


def state_of(site: "Site") -> str:
    found = site.transport.run(site.command.probe)
    return found.output.strip() if found.code == 0 else "no container"


def is_running(site: "Site") -> bool:
    return state_of(site).startswith(("running", "created", "restarting"))


def is_there(site: "Site") -> bool:
    return site.transport.run(site.command.probe).code == 0


ACTIONS = {
    "attach": (attach_run, "take up the supervision of a run again"),
    "stop": (stop_run, "save and end a run on all its nodes"),
    "status": (show_status, "what the nodes say of a run"),
    "logs": (show_logs, "the output of all ranks"),
}
