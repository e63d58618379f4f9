"""What can be done with a run that is there: attach, stop, status, logs. Its folder says which containers on which nodes are its own.

Like image_action, imported by every command, so it imports late itself.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigRefused, NodeFailed, RunEnded, suggest
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.plan.plan import Plan
    from launcher.run.run_folder import WorkingNode
    from launcher.ssh.transport import Running

PROJECT = Path(__file__).resolve().parents[2]
POLL_S = 0.5
PIECE_BYTES = 1 << 20
RECORD_S = 5.0  # that its launcher takes to write the record when all has ended


def add_to(verbs: Any, say: Callable[[str], None]) -> None:
    for name, (verb, text) in ACTIONS.items():
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("run", metavar="RUN", help="its id, as `omnilaunch runs` shows it")
        if name == "logs":
            sub.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
        sub.set_defaults(verb=verb, say=say)


def attach_run(arguments: argparse.Namespace) -> int:
    """Supervision as if it had never been left; of a run that has ended, its record."""
    from launcher.record.description import describe_record

    folder = find_run(arguments.run)
    plan = load_plan(folder)
    require_containers(plan, "attach")
    record = recorded(folder) or supervise(folder, plan, arguments.say)
    arguments.say(describe_record(record, plan))
    return int(record.exit_code)


def stop_run(arguments: argparse.Namespace) -> int:
    """Let the run save and end under its launcher, or under this one where that is gone; then look on every node of every attempt whether
    nothing is left. Raises NodeFailed that names every node where something is or where that could not be found out."""
    from launcher.record.lock import ask_to_stop, is_claimed
    from launcher.record.record import utc_now
    from launcher.run.stop import end_run

    folder = find_run(arguments.run)
    plans = load_plans(folder)
    plan = plans[-1]
    require_containers(plan, "stop")
    ask_to_stop(folder, utc_now())
    if not has_ended(folder) and not is_claimed(folder):
        with suppress(RunEnded, NodeFailed):  # how it ended is in the record; what is left is looked at below
            supervise(folder, plan, arguments.say)
    deadline = time.monotonic() + plan.stop_limit_s
    busy = is_busy(folder, until=deadline)
    with reach_sites(load_plans(folder)) as sites:  # of an attempt that was begun meanwhile, too
        endings = end_run(sites, accelerator=plan.config.hardware.accelerator, grace_s=max(0.0, deadline - time.monotonic()))
    left = [f"  {ending.host}: {ending.left}" for ending in endings if ending.left]
    if busy and is_busy(folder, until=time.monotonic() + RECORD_S):
        left.append("  its launcher has not ended yet: it starts nothing any more, and ends as soon as what it waits for answers")
    clear = [ending.host for ending in endings if not ending.left]
    if clear:
        arguments.say(f"nothing of run {plan.run_id} is left on {', '.join(clear)}")
    if left:
        names = "\n".join(left)
        raise NodeFailed(
            f"of run {plan.run_id} something is left, or may be:\n{names}\n  Next, when they answer: omnilaunch stop {plan.run_id}"
        )
    return Exit.OK


def is_busy(folder: Path, *, until: float) -> bool:
    """Whether its launcher is still at it at that time (time.monotonic); no longer asked than it takes to end."""
    from launcher.record.lock import is_claimed

    while busy := not has_ended(folder) and is_claimed(folder):
        if time.monotonic() >= until:
            break
        time.sleep(POLL_S)
    return busy


def supervise(folder: Path, plan: "Plan", say: Callable[[str], None]) -> Any:
    """Its record, when it has ended."""
    from launcher.record.record import SOURCE_FILE, SourceState, read_if_there
    from launcher.run.launch import attach

    gc.enable()  # which the door of the command line has turned off: this may take days
    plan = with_credentials(plan)
    source = read_if_there(SourceState, folder / SOURCE_FILE) or SourceState(commit="", dirty=False)
    started = datetime.fromtimestamp((folder / "plan.json").stat().st_mtime, UTC)
    with reach(plan, say) as desk:
        return attach(plan, source, started, desk)


def with_credentials(plan: "Plan") -> "Plan":
    """The plan with the addresses whose credentials this environment gives: none is ever written to a run's folder."""
    from launcher.redact import give_credentials

    cluster = plan.config.cluster
    given = replace(cluster, delivery=give_credentials(cluster.delivery, os.environ))
    return replace(plan, config=replace(plan.config, cluster=given))


def show_status(arguments: argparse.Namespace) -> int:
    """One line a node: what its engine says of the container, now."""
    from launcher.run.stop import state_of
    from launcher.ssh.parallel import attempt_each

    folder = find_run(arguments.run)
    plan, record = load_plan(folder), recorded(folder)
    if record is not None:
        steps = f", step {record.steps} of {plan.spec.steps}" if plan.spec.stage.kind == "train" else ""
        arguments.say(f"{record.status} at {record.ended_at}{steps}")
        return Exit.OK
    require_containers(plan, "status")
    with reach_sites([plan]) as sites:
        answers = attempt_each(state_of, sites)
    for site, answer in zip(sites, answers, strict=True):
        arguments.say(f"{site.command.host:30} {answer}")
    return Exit.OK


def show_logs(arguments: argparse.Namespace) -> int:
    """Every rank's output, each line with its node in front."""
    folder = find_run(arguments.run)
    with place_of_logs(folder, follows=arguments.follow) as (place, ended):
        for line in follow(place, ended=ended):
            arguments.say(line)
    return Exit.OK


@contextmanager
def place_of_logs(folder: Path, *, follows: bool) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """The folder with the logs, and whether nothing is added any more. They come to the run's own while a launcher looks after it; of a run
    that was left to itself the containers are asked, where there are any."""
    from tempfile import TemporaryDirectory

    from launcher.record.lock import is_claimed
    from launcher.run.stop import NO_CONTAINER, state_of
    from launcher.ssh.parallel import attempt_each

    plan = load_plan(folder)
    if has_ended(folder) or plan.config.cluster.runtime != "docker" or is_claimed(folder):
        yield folder, lambda: not follows or has_ended(folder)
        return
    with TemporaryDirectory(prefix="omnilaunch-") as aside, reach_sites([plan]) as sites:
        if not any(isinstance(state, str) and state != NO_CONTAINER for state in attempt_each(state_of, sites)):
            yield folder, lambda: True
            return
        (Path(aside) / "logs").mkdir()
        readers = attempt_logs(sites, Path(aside) / "logs", follows=follows)
        yield Path(aside), lambda: all(map(is_over, readers))


def attempt_logs(sites: "Sequence[WorkingNode]", logs: Path, *, follows: bool) -> "tuple[Running | NodeFailed, ...]":
    """What the engine of each node has of its container, as a file that may grow."""
    from launcher.ssh.parallel import attempt_each

    def read(site: "WorkingNode") -> "Running":
        argv = site.command.logs if follows else tuple(word for word in site.command.logs if word != "--follow")
        return site.transport.start(argv, log=logs / f"node{site.command.node_rank}.log")

    readers = attempt_each(read, sites)
    for site, reader in zip(sites, readers, strict=True):
        if isinstance(reader, NodeFailed):
            (logs / f"node{site.command.node_rank}.log").write_text(f"{reader}\n", encoding="utf-8")
    return readers


def is_over(reader: "Running | NodeFailed") -> bool:
    try:
        return isinstance(reader, NodeFailed) or reader.poll() is not None
    except NodeFailed:
        return True


def follow(folder: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """Whole lines of all logs as they come; once more after the end, so that the last lines are there, whole or not."""
    read_bytes: dict[int, int] = {}  # by the file's own number: the log of another attempt has the same name
    last = False
    while True:
        for path in sorted((folder / "logs").glob("node*.log")):
            yield from (f"[{path.stem}] {line}" for line in new_lines(path, read_bytes, last=last))
        if last:
            return
        last = ended()
        if not last:
            time.sleep(POLL_S)


def new_lines(path: Path, read_bytes: dict[int, int], *, last: bool) -> Iterator[str]:
    """A piece at a time, since a log may be larger than the memory. A line that is longer than a piece is cut."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # set aside just now, with its attempt
        return
    with file:
        number = os.fstat(file.fileno()).st_ino
        file.seek(read_bytes.get(number, 0))
        while piece := file.read(PIECE_BYTES):
            taken = piece.rfind(b"\n") + 1 or (len(piece) if last or len(piece) == PIECE_BYTES else 0)
            if not taken:
                return
            read_bytes[number] = file.seek(taken - len(piece), os.SEEK_CUR)
            yield from piece[:taken].decode("utf-8", errors="replace").splitlines()


# ---------------------------------------------------------------------------------------------------------------- parts


def find_run(name: str) -> Path:
    """The run's folder below this one. Raises ConfigRefused listing the runs that there are."""
    from launcher.record.record import PLAN_FILE

    runs = Path.cwd() / "runs"
    names = [path.parent.name for path in runs.glob(f"*/{PLAN_FILE}")]
    if name not in names:
        raise ConfigRefused(f"there is no run {name!r} in {runs}; {suggest(name, names)}" if names else f"there are no runs in {runs}")
    return runs / name


def load_plan(folder: Path) -> "Plan":
    """The plan of the newest attempt."""
    return load_plans(folder)[-1]


def load_plans(folder: Path) -> "tuple[Plan, ...]":
    """The plan of each attempt that has one, in their order; the first is the run's."""
    from launcher.record.record import PLAN_FILE, attempt_files

    return tuple(read_plan(path) for path in (folder / PLAN_FILE, *attempt_files(folder, PLAN_FILE)))


def read_plan(path: Path) -> "Plan":
    from launcher.plan.plan import Plan
    from trainer.contract import SpecError, decode

    try:
        plan: Plan = decode(Plan, json.loads(path.read_text(encoding="utf-8")), "plan")
    except (OSError, ValueError, RecursionError, SpecError) as error:
        raise ConfigRefused(f"{path} cannot be read by this version: {error}") from error
    return plan


def recorded(folder: Path) -> Any:
    """The record of a run that has ended, else None. Raises ConfigRefused for one that cannot be read: its run has ended all the same, and
    who took it up again would start it anew and write over what is there."""
    from launcher.record.record import RECORD_FILE, Record
    from trainer.contract import SpecError, read

    if not has_ended(folder):
        return None
    try:
        return read(Record, folder / RECORD_FILE)
    except SpecError as error:
        raise ConfigRefused(
            f"run {folder.name} has ended, and this version cannot read how: {error}. To look whether anything of it is left: "
            f"omnilaunch stop {folder.name}"
        ) from error


def has_ended(folder: Path) -> bool:
    from launcher.record.record import RECORD_FILE

    return (folder / RECORD_FILE).exists()


def require_containers(plan: "Plan", verb: str) -> None:
    if plan.config.cluster.runtime != "docker":
        raise ConfigRefused(
            f"run {plan.run_id} has no containers (cluster.runtime=process): its launcher holds the processes. End it there with Ctrl-C; "
            f"to {verb} a run from anywhere, launch it with cluster.runtime=docker"
        )


def reach(plan: "Plan", say: Callable[[str], None]) -> Any:
    from launcher.plan.local_context import local_context
    from launcher.run.session import open_session

    return open_session(plan, local_context(PROJECT), os.environ, say=say, terminal=sys.stdout.isatty(), require=False)


def reach_sites(plans: "Sequence[Plan]") -> "AbstractContextManager[tuple[WorkingNode, ...]]":
    from launcher.run.session import reach_sites

    return reach_sites(plans, os.environ)


ACTIONS = {
    "attach": (attach_run, "take up the supervision of a run again"),
    "stop": (stop_run, "save and end a run on all its nodes"),
    "status": (show_status, "what the nodes say of a run"),
    "logs": (show_logs, "the output of all ranks"),
}
