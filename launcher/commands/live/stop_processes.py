"""`omnilaunch stop` for a run without containers: its launcher gets the signal of Ctrl-C, and is waited for."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.live.live_run import has_ended, read_record, say_resume
from launcher.errors import ConfigRefused, RunEnded
from launcher.record.lock import ask_to_stop, find_holder, is_asked_to_stop, is_locked
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.plan.plan import Plan

POLL_S = 0.2
LEAVING_S = 30.0  # for a launcher to end after its ranks have ended: the last evaluation of the logs, and the record


def stop_processes(folder: Path, plan: "Plan", say: Callable[[str], None]) -> int:
    """Raises ConfigRefused for a launcher on another machine or of another user, and RunEnded where it does not end in time."""
    from launcher.plan.commands import FOLDER_VARIABLE
    from launcher.run.stop import end_processes
    from launcher.ssh.transport import processes_with

    if not has_ended(folder) and (pid := find_launcher(folder, plan)):
        stop_launcher(folder, plan, pid, say)
    elif Path(plan.spec.output).resolve() == folder.resolve() and processes_with(
        FOLDER_VARIABLE, plan.spec.output
    ):  # not of a copied folder
        say(f"the ranks of run {plan.run_id} still run without a launcher: they are asked to save and end")
        end_processes(plan)
    else:
        say(f"nothing of run {plan.run_id} runs")
    describe_rest(folder, plan, say)
    return Exit.OK


def find_launcher(folder: Path, plan: "Plan") -> int:
    """The id of the process that supervises the run, 0 where none does. The kernel knows that the lock is held, and the process has its file
    open: an id that was used again is not taken for it."""
    if not is_locked(folder):
        return 0
    holder = find_holder(folder)
    if holder is None:
        raise ConfigRefused(
            f"run {plan.run_id} is supervised, but not by a process of this machine. Type omnilaunch stop {plan.run_id} there"
        )
    if holder.problem:
        raise ConfigRefused(f"run {plan.run_id} is supervised by {holder.described}: {holder.problem}")
    return holder.pid


def stop_launcher(folder: Path, plan: "Plan", pid: int, say: Callable[[str], None]) -> None:
    """The signal once, however often this command is typed: a second one would end the run without saving."""
    from launcher.record.record import utc_now
    from launcher.run.stop_limit import describe_work, find_limit_s

    if is_asked_to_stop(folder):
        say(f"run {plan.run_id} was asked to stop before: {describe_work(plan, folder)}")
    else:
        os.kill(pid, signal.SIGINT)
        ask_to_stop(folder, utc_now())
        say(f"run {plan.run_id} was asked to stop: {describe_work(plan, folder)}")
    limit_s, began = find_limit_s(plan, folder) + LEAVING_S, time.monotonic()
    while not has_ended(folder) and is_locked(folder):
        if time.monotonic() - began > limit_s:
            raise RunEnded(
                f"run {plan.run_id} has not ended within {limit_s:.0f} s. Its launcher is process {pid}; to end it without saving: kill -INT {pid}"
            )
        time.sleep(POLL_S)


def describe_rest(folder: Path, plan: "Plan", say: Callable[[str], None]) -> None:
    """How the run ended, and what starts it again."""
    from launcher.commands.live.status import describe_end

    record = read_record(folder)
    if record is not None:
        say(describe_end(record, plan))
    say_resume(folder, plan, say, status=record.status if record else "")
