"""Starting a run again after a failure: which nodes take part, what is set aside, where the newest checkpoint is."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

from launcher.config.schema import Cluster
from launcher.record.record import ATTEMPT_FILE, ATTEMPTS, Attempt, Failure, attempt_files, newest_name, step_of
from launcher.redact import mask_credentials
from launcher.run.delivery.broadcast import send
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each, together
from trainer import contract
from trainer.contract import CHECKPOINTS, ENVIRONMENT_FILE, FAILURE_FILES, METRICS_FILE, RESULT_FILE

# For any POSIX shell. A folder that is there and may not be looked into is an error.
LIST = '[ -d "$1" ] || exit 0; cd -- "$1" && for name in step-*; do if [ -d "$name" ]; then printf "%s\\n" "$name"; fi; done'
INCOMING = ".incoming"  # a checkpoint that is being copied to a node; the trainer looks at no hidden names


def replace_lost(cluster: Cluster, lost: Iterable[str], *, minimum: int) -> Cluster:
    """The cluster without its lost nodes: each one's place is taken by the next spare, in the order of the file, so that the ranks of all
    others stay what they were. Where no spare is left, the run becomes smaller, as long as `minimum` (run.minimum_nodes) nodes work; else
    the lost node keeps its place, since it may come back."""
    gone = set(lost)
    spares = [node for node in cluster.nodes if node.spare and node.host not in gone]
    working = []
    for node in cluster.working:
        if node.host in gone and spares:
            node = replace(spares.pop(0), spare=False)
        working.append(node)
    remaining = [node for node in working if node.host not in gone]
    if minimum and len(remaining) >= minimum:
        working = remaining
    return replace(cluster, nodes=(*working, *spares))


def reason_not_to(attempts: Sequence[Attempt], last: Attempt, *, restarts: int) -> str:
    """Why a failed run is not started again; '' when it is. What fails in the same way at the same step twice would do so for ever."""
    if not restarts:
        return "run.restarts=0"
    if len(attempts) >= restarts:
        return f"all {restarts} restart(s) of run.restarts are used"
    if attempts and repeats(attempts[-1], last):
        return f"two attempts running failed in the same way after step {last.steps}"
    return ""


def repeats(earlier: Attempt, later: Attempt) -> bool:
    first, second = earlier.failure, later.failure
    if first is None or second is None or first.rank < 0 or second.rank < 0:
        return False
    return (earlier.steps, first.rank, first.message) == (later.steps, second.rank, second.message)


def set_aside(folder: Path, attempt: Attempt, *, mirrored: bool) -> Attempt:
    """Move what an attempt left in the launcher's folder to attempts/<number>/, where its logs and reports stay. The rows of its steps are
    there as well; in the run's folder the trainer cuts off those after the checkpoint that it goes on from, and where that folder is only
    a mirror of node 0's, they come from there again. Where a launcher was killed while it did this, what has been written since takes the
    place of what it had moved: who attaches gets the same logs and reports once more."""
    aside = folder / ATTEMPTS / str(attempt.number)
    aside.mkdir(parents=True, exist_ok=True)
    for path in (folder / "logs", folder / ENVIRONMENT_FILE, folder / RESULT_FILE, *sorted(folder.glob(FAILURE_FILES.format(rank="*")))):
        if path.exists():
            remove(aside / path.name)
            shutil.move(path, aside / path.name)
    (folder / "logs").mkdir()
    if (folder / METRICS_FILE).exists():
        (shutil.move if mirrored else shutil.copy2)(folder / METRICS_FILE, aside / METRICS_FILE)
    moved = replace(attempt, failure=moved_failure(attempt.failure, folder, aside))
    contract.write(contract.decode(Attempt, mask_credentials(asdict(moved))), aside / ATTEMPT_FILE)
    return moved


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def moved_failure(failure: Failure | None, folder: Path, aside: Path) -> Failure | None:
    if failure is None or not failure.log or not Path(failure.log).is_relative_to(folder):
        return failure
    return replace(failure, log=str(aside / Path(failure.log).relative_to(folder)))


# -------------------------------------------------------------------------------------------------------- checkpoints


def spread_checkpoint(sites: Sequence[WorkingNode], say: Callable[[str], None]) -> str:
    """Let every node have the newest checkpoint that any of them has, where they share no folder; its name, '' when there is none.

    Copied from its node to the others through this machine, all at once, and given its name when it is whole. Raises NodeFailed.
    """
    have = each(newest_on, sites)
    newest = max(have, key=step_of)
    lacking = [site for site, name in zip(sites, have, strict=True) if step_of(name) < step_of(newest)]
    if not lacking:
        return newest
    source = sites[have.index(newest)]
    say(f"copying checkpoint {newest} from {source.command.host} to {', '.join(site.command.host for site in lacking)}")
    folder = PurePosixPath(checkpoints_of(source))
    incoming = str(folder / INCOMING)
    each(lambda site: must(site, "mkdir", "-p", "--", incoming), lacking)
    each(lambda site: must(site, "find", incoming, "-mindepth", "1", "-delete"), lacking)  # of a copy that was interrupted
    load = ("tar", "-C", incoming, "-xf", "-")
    failures = [
        answer
        for answer in send(("tar", "-C", str(folder), "-cf", "-", newest), load, lacking, source.transport, say, what="the checkpoint")
        if answer
    ]
    if failures:
        raise together(failures, len(lacking))
    each(lambda site: must(site, "mv", "-T", "--", f"{incoming}/{newest}", str(folder / newest)), lacking)
    each(lambda site: must(site, "rmdir", "--", incoming), lacking)
    return newest


def restore_rows(site: WorkingNode, folder: Path) -> None:
    """Give a node that is the first one now the rows that its forerunner wrote, from the launcher's folder; and the first one of before those
    that a loss of power took from its disk."""
    path = str(PurePosixPath(site.command.folder) / METRICS_FILE)
    kept = attempt_files(folder, METRICS_FILE)
    if not kept:
        return
    there, here = site.transport.get(path), kept[-1].read_bytes()
    if there is None or (len(there) < len(here) and here.startswith(there.rstrip(b"\0"))):
        site.transport.put(here, path, mode=0o644)


def newest_on(site: WorkingNode) -> str:
    """The name of the node's newest checkpoint, '' where it has none. Raises NodeFailed where that cannot be told: a run would begin anew."""
    listed = site.transport.run(("sh", "-c", LIST, "sh", checkpoints_of(site)))
    return newest_name(listed.expect(f"{site.command.host}: looking for its newest checkpoint").output.splitlines())


def must(site: WorkingNode, *argv: str) -> None:
    site.transport.run(argv).expect(f"{site.command.host}: taking in the checkpoint")


def checkpoints_of(site: WorkingNode) -> str:
    return str(PurePosixPath(site.command.folder) / CHECKPOINTS)
