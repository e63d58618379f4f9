"""Another attempt of a failed run: which nodes take part, what is kept of the last attempt, and the newest checkpoint on every node."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from launcher.config.schema import Cluster
from launcher.record.record import ATTEMPT_FILE, ATTEMPTS, Attempt, attempt_files, step_of
from launcher.redact import mask_credentials
from launcher.run.delivery.broadcast import send
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each, together
from trainer import contract
from trainer.contract import CHECKPOINTS, ENVIRONMENT_FILE, FAILURE_FILES, METRICS_FILE, RESULT_FILE, SpecError
from trainer.contract.checkpoint_files import EARLIER_STATE_FILE, STATE_FILE, CheckpointState, can_resume, describe_missing

INCOMING = ".incoming"  # a checkpoint that is being copied to a node; the trainer ignores hidden names


def replace_lost(cluster: Cluster, lost: Iterable[str], *, minimum: int) -> Cluster:
    """The cluster without its lost nodes. Each is replaced by the next spare, in the order of the file, so that the ranks of all other nodes stay the
    same. Without a spare the run becomes smaller, as long as `minimum` (run.minimum_nodes) nodes are left; otherwise the lost node keeps its place,
    since it may come back."""
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


def reason_against_restart(attempts: Sequence[Attempt], last: Attempt, *, restarts: int) -> str:
    """Why a failed run is not started again; '' when it is. What fails twice in the same way at the same step would do so forever."""
    if not restarts:
        return "run.restarts=0"
    if len(attempts) >= restarts:
        return f"run.restarts={restarts} is used up"
    if attempts and failed_the_same_way(attempts[-1], last):
        return f"two attempts in a row failed in the same way after step {last.steps}"
    return ""


def failed_the_same_way(earlier: Attempt, later: Attempt) -> bool:
    first, second = earlier.failure, later.failure
    if first is None or second is None or first.rank < 0 or second.rank < 0:
        return False
    return (earlier.steps, first.rank, first.message) == (later.steps, second.rank, second.message)


def archive_attempt(folder: Path, attempt: Attempt, *, mirrored: bool) -> Attempt:
    """Move the logs and reports of an attempt from the launcher's folder to attempts/<number>/. metrics.jsonl is copied there; the trainer removes its
    rows after the checkpoint that it resumes from. Where that file is only a copy of node 0's (`mirrored`) it is moved, since it is copied again.

    When the launcher was killed during this, files that were written since replace those that it had moved: the launcher that attaches receives the
    same logs and reports once more."""
    archive = folder / ATTEMPTS / str(attempt.number)
    archive.mkdir(parents=True, exist_ok=True)
    for path in (folder / "logs", folder / ENVIRONMENT_FILE, folder / RESULT_FILE, *sorted(folder.glob(FAILURE_FILES.format(rank="*")))):
        if path.exists() and not is_moved(path, archive / path.name):
            if (archive / path.name).is_dir():
                shutil.rmtree(archive / path.name)
            shutil.move(path, archive / path.name)
    (folder / "logs").mkdir(exist_ok=True)
    if (folder / METRICS_FILE).exists():
        (shutil.move if mirrored else shutil.copy2)(folder / METRICS_FILE, archive / METRICS_FILE)
    failure = attempt.failure
    if failure and failure.log and Path(failure.log).is_relative_to(folder):
        failure = replace(failure, log=str(archive / Path(failure.log).relative_to(folder)))
    moved = replace(attempt, failure=failure)
    contract.write(contract.decode(Attempt, mask_credentials(asdict(moved))), archive / ATTEMPT_FILE)
    return moved


def is_moved(path: Path, target: Path) -> bool:
    """Whether a launcher that was killed here has moved the folder already, and made the empty one for the next attempt."""
    return path.is_dir() and target.is_dir() and not any(path.iterdir())


# -------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, kw_only=True)
class FoundStates:
    """The checkpoints of a node. `newest`: the name of the newest complete one that a run of so many steps can resume from, '' for none.
    `broken`: why newer ones are skipped, by name. `ended`: the name of a newer one that has weights only, '' for none."""

    newest: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    ended: str = ""


def find_states(node: WorkingNode, steps: int) -> FoundStates:
    """Reads omnilaunch_state.json and the sizes of the files, newest checkpoint first, as the trainer will do. Raises NodeFailed."""
    broken: dict[str, str] = {}
    ended = ""
    for name in list_checkpoints(node):
        folder = str(PurePosixPath(checkpoint_folder(node)) / name)
        try:
            name_of_state = STATE_FILE
            text = node.transport.get(f"{folder}/{STATE_FILE}")
            if text is None and (text := node.transport.get(f"{folder}/{EARLIER_STATE_FILE}")) is not None:
                name_of_state = EARLIER_STATE_FILE
            state: CheckpointState = contract.decode(CheckpointState, json.loads(text or b"{}"))
        except (ValueError, SpecError) as error:
            broken[name] = f"its {name_of_state} cannot be read: {error}" if text else f"it has no {STATE_FILE}"
            continue
        if lacks := describe_missing(lacking_files(node, folder, state), name_of_state):
            broken[name] = lacks
        elif can_resume(state, steps):
            return FoundStates(newest=name, broken=broken, ended=ended)
        else:
            ended = ended or name
    return FoundStates(broken=broken, ended=ended)


def lacking_files(node: WorkingNode, folder: str, state: CheckpointState) -> list[str]:
    find = ("find", "-L", folder, "-type", "f", "-printf", "%P\\t%s\\n")
    lines = node.transport.run(find).expect(f"{node.command.host}: looking at {folder}").output.splitlines()
    sizes = dict(line.rpartition("\t")[::2] for line in lines)
    return [name for name, size in state.files.items() if sizes.get(name) != str(size)]


def copy_newest_checkpoint(
    nodes: Sequence[WorkingNode], say: Callable[[str], None], *, steps: int = 0, sources: Sequence[WorkingNode] = ()
) -> str:
    """Copy the newest checkpoint that any node has to all others, for nodes that share no folder. Returns its name, '' when there is none.
    `sources`: further nodes that may have it, and do not take part. `steps`: run.steps, 0 = any checkpoint will do.

    It goes from its node through this machine to all others at once, and gets its name when it is complete. What an interrupted copy left is
    removed first. Raises NodeFailed.
    """
    having = (*nodes, *sources)
    have = each(lambda node: newest_checkpoint(node, steps), having)
    newest = max(have, key=step_of)
    lacking = [node for node, name in zip(nodes, have, strict=False) if step_of(name) < step_of(newest)]
    if not lacking:
        return newest
    source = having[have.index(newest)]
    say(f"copying checkpoint {newest} from {source.command.host} to {', '.join(node.command.host for node in lacking)}")
    folder = PurePosixPath(checkpoint_folder(source))
    incoming = str(folder / INCOMING)
    each(lambda node: run_all(node, ("mkdir", "-p", "--", incoming), ("find", incoming, "-mindepth", "1", "-delete")), lacking)
    pack, unpack = ("tar", "-C", str(folder), "-cf", "-", newest), ("tar", "-C", incoming, "-xf", "-")
    failures = [answer for answer in send(pack, unpack, lacking, source.transport, say, what="the checkpoint") if answer]
    if failures:
        raise together(failures, len(lacking))
    move = ("mv", "-T", "--", f"{incoming}/{newest}", str(folder / newest))
    each(lambda node: run_all(node, move, ("rmdir", "--", incoming)), lacking)
    return newest


def restore_metrics(node: WorkingNode, folder: Path) -> None:
    """Give a node that is now the first one the metrics rows of the previous first node, from the launcher's folder. A first node that stayed gets
    those that a power failure took from its disk."""
    path = str(PurePosixPath(node.command.folder) / METRICS_FILE)
    kept = attempt_files(folder, METRICS_FILE)
    if not kept:
        return
    there, here = node.transport.get(path), kept[-1].read_bytes()
    if there is None or (len(there) < len(here) and here.startswith(there.rstrip(b"\0"))):
        node.transport.put(here, path, mode=0o644)


def newest_checkpoint(node: WorkingNode, steps: int = 0) -> str:
    """The name of the node's newest complete checkpoint; of its newest one when none is complete, which the trainer then refuses; '' when it has
    none. Raises NodeFailed."""
    names = list_checkpoints(node)
    return (find_states(node, steps).newest or names[0]) if names else ""


def list_checkpoints(node: WorkingNode) -> list[str]:
    """The names of the node's checkpoints, the newest first. Raises NodeFailed when its folder cannot be read: the run would otherwise start from the
    first step."""
    folder = checkpoint_folder(node)
    find = ("find", "-H", folder, "-mindepth", "1", "-maxdepth", "1", "-xtype", "d", "-name", "step-*", "-printf", "%f\\n")
    listed = node.transport.run(("env", "LC_ALL=C", *find))
    if listed.code and listed.errors.strip().endswith((": No such file or directory", ": Not a directory")):
        return []
    found = listed.expect(f"{node.command.host}: looking for its newest checkpoint").output.splitlines()
    return sorted(filter(step_of, found), key=step_of, reverse=True)


def run_all(node: WorkingNode, *commands: tuple[str, ...]) -> None:
    for argv in commands:
        node.transport.run(argv).expect(f"{node.command.host}: receiving the checkpoint")


def checkpoint_folder(node: WorkingNode) -> str:
    return str(PurePosixPath(node.command.folder) / CHECKPOINTS)
