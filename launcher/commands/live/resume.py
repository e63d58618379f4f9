"""`omnilaunch launch --resume`: continue a run that was stopped, killed or failed, in its own folder and from its newest checkpoint."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.live.detach import describe_detached, refuse_detach
from launcher.commands.plan import PROJECT, SCRATCH
from launcher.errors import ConfigRefused
from launcher.record.lock import lock_run
from launcher.record.run_name import find_run
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.bench.paused_run import PausedRun
    from launcher.bench.resume import ResumePlan
    from launcher.config.conf_folder import ConfFolder
    from launcher.plan.plan import Plan
    from launcher.record.record import Record
    from launcher.run.session import Session

Say = Callable[[str], None]


def resume_run(
    name: str, overrides: Sequence[str], accept: Sequence[str], *, say: Say, detach: bool, conf: "ConfFolder", following: bool = True
) -> int:
    """`following`: print the next commands, which a chain carries out itself."""
    from launcher.bench.paused_run import read_paused_run
    from launcher.bench.rerun import accepted_kinds
    from launcher.bench.resume import KINDS
    from launcher.record.description import describe_record

    folder, accepted = find_run(name, Path.cwd() / "runs"), accepted_kinds(accept, KINDS)
    read_paused_run(folder)  # what cannot be resumed at all is refused before the folder is written to
    refuse_read_only(folder)
    gc.enable()  # `main` turned it off; from here on the process may live for days
    with lock_run(folder):
        paused = read_paused_run(folder)
        refuse_detach(detach, paused.plan.config.cluster.runtime)
        planned = plan_again(paused, tuple(overrides), accepted, conf)
        record, plan = continue_run(paused, planned, tuple(overrides), say, detach=detach)
    say(describe_record(record, plan, following=following) if record else describe_detached(plan.run_id))
    return record.exit_code if record else Exit.OK


def refuse_read_only(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise ConfigRefused(
            f"{folder} cannot be written to by this user, and a run is resumed in its own folder. Change its permissions, or mount it writable; "
            f"or start a new run from its weights: stage.checkpoint={folder}"
        )


def plan_again(paused: "PausedRun", overrides: tuple[str, ...], accepted: tuple[str, ...], conf: "ConfFolder") -> "ResumePlan":
    from launcher.bench.resume import plan_resume
    from launcher.bench.worktree import find_tree, try_image
    from launcher.plan.local_context import context_for, local_context
    from launcher.plan.plan import refuse

    root = Path(paused.plan.spec.output).parents[1] if paused.plan.is_local else Path.cwd()
    tree = find_tree(paused.recorded, PROJECT, root / SCRATCH)
    tree = try_image(paused.recorded, tree) if paused.plan.config.cluster.runtime == "docker" else tree
    local = local_context(PROJECT)
    planned = plan_resume(paused, overrides, accepted, tree, local, os.environ, conf=conf, context_for=context_for)
    refuse(planned.plan.verdict, launching=True, overrides=planned.plan.overrides)
    return planned


def continue_run(
    paused: "PausedRun", planned: "ResumePlan", overrides: tuple[str, ...], say: Say, *, detach: bool
) -> "tuple[Record | None, Plan]":
    """End what is left of the last attempt, and run the next one. (record, None where it is detached; the plan with what was found on the
    nodes)."""
    from launcher.plan.local_context import local_context
    from launcher.record.record import Resumption
    from launcher.record.source import read_source
    from launcher.run.resume import LastAttempt, finish, resume, settle
    from launcher.run.session import open_session

    with open_session(paused.plan, local_context(PROJECT), os.environ, say=say, terminal=sys.stdout.isatty(), launching=False) as (
        old,
        here,
    ):
        source = paused.recorded.source
        last = settle(LastAttempt(plan=old, record=paused.record, started=paused.started, source=source, session=here))
        if planned.plan.spec.steps == paused.plan.spec.steps and (record := finish(last)):
            return record, last.plan
        for note in planned.notes:
            say(note)
        draft = Resumption(attempt=0, started_at="", step=0, overrides=overrides, accepted=planned.accepted, changes=planned.changes)
        now = read_source(planned.project, planned.plan.files).state if "code" in planned.accepted else source
        with open_nodes(planned, say) as (plan, session):
            return resume(plan, draft, last, session, source=now, detach=detach), plan


@contextmanager
def open_nodes(planned: "ResumePlan", say: Say) -> "Iterator[tuple[Plan, Session]]":
    """As for a launch, on this machine; elsewhere as for another attempt, where a spare takes the place of a node that does not respond."""
    from launcher.plan.local_context import local_context
    from launcher.run.session import open_session

    plan, context, terminal = planned.plan, local_context(planned.project), sys.stdout.isatty()
    with open_session(plan, context, os.environ, say=say, terminal=terminal, launching=plan.is_local) as (plan, session):
        if not plan.is_local:
            say(f"checking {', '.join(node.host for node in plan.config.cluster.working)}")
            plan, session = session.move(plan, frozenset())
        yield plan, session
