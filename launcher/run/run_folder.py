"""The folder of a run on its nodes: created for the container's user, prepared for another attempt, and its files copied to this machine."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.plan.docker_run import ContainerOptions, Mount, docker_run
from launcher.run.container import remove_containers
from launcher.ssh.background import in_background
from launcher.ssh.parallel import attempt_each, each
from launcher.ssh.transport import Transport
from trainer.contract import (
    DATA_FILE,
    DATA_LEFT_OUT_FILE,
    DATA_PENDING_FILE,
    ENVIRONMENT_FILE,
    FAILURE_FILES,
    METRICS_FILE,
    RESULT_FILE,
    SPEC_FILE,
    TrainSpec,
)

ROOT = "0:0"
FOLDER_BYTES = 2**28
FETCH_S = 120.0  # for copying what the trainers left on the nodes
MIRROR_TIMEOUT_S = 20.0
SETTLE_S = 2.0  # for the last answer of a mirror
STALE = (FAILURE_FILES.format(rank="*"), ENVIRONMENT_FILE, RESULT_FILE)
CREATE_SCRIPT = Path(__file__).parent / "node_scripts" / "create_folder.sh"
NO_PARENT, NO_FOLDER = 10, 11  # exit codes of that script


@dataclass(frozen=True, kw_only=True)
class WorkingNode:
    """A working node: its commands, and the transport that reaches it."""

    command: NodeCommand
    transport: Transport


@dataclass(frozen=True, kw_only=True)
class FolderRequest:
    """What the run's folder on a node is to be: `text` is its spec file, `user` (uid:gid) the container's user that must be able to write there,
    `image` what changes the owner where the login may not. `shared`: all nodes see one folder. `local`: it is the launcher's own folder.
    `checks_first`: in another attempt too, the ranks wait for the data check."""

    spec: TrainSpec
    text: bytes
    image: str
    user: str
    shared: bool
    local: bool
    checks_first: bool = False

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that the container writes to, the run's own first."""
        return (self.spec.output, *((self.spec.data.root,) if self.spec.data.builtin else ()))


def create_folders(nodes: Sequence[WorkingNode], request: FolderRequest) -> None:
    """Create the run's folder on every node. Raises NodeFailed, naming the nodes; a folder that exists belongs to another run."""
    if request.local:
        (node,) = nodes
        make_parents(node, request)
        ensure_owner(node, request)
        return
    creators = nodes[:1] if request.shared else nodes
    each(lambda node: create_on(node, request), creators)
    each(lambda node: make_parents(node, request), nodes[len(creators) :])


def create_on(node: WorkingNode, request: FolderRequest) -> None:
    """By one command: each command costs a login shell of the node, and the user waits for it."""
    host, output = node.command.host, request.spec.output
    pending = DATA_PENDING_FILE if request.spec.waits_for_check else ""
    script, parent = CREATE_SCRIPT.read_text(encoding="utf-8"), str(PurePosixPath(output).parent)
    argv = ("sh", "-c", script, "sh", SPEC_FILE, str(len(request.text)), request.user, pending, parent, *request.folders)
    made = node.transport.feed(argv, (request.text,), timeout_s=60)
    if made.code == NO_PARENT:
        raise parent_missing(host, made.errors)
    if made.code == NO_FOLDER:
        raise NodeFailed(
            f"{host}: {output} could not be created: {made.errors.strip()}. If another run has this id there, choose a different one: --run-id ID"
        )
    login = made.expect(f"{host}: creating {output}").output.split()[-1]
    if login not in (ROOT, request.user):
        change_owner(node, request.folders, request.user, login=login, image=request.image)


def reopen_folders(
    nodes: Sequence[WorkingNode], request: FolderRequest, *, copy_checkpoint: Callable[[Sequence[WorkingNode]], None]
) -> None:
    """Prepare the run's folder for another attempt, on nodes that may or may not have it. Files in which the last attempt reported its end are
    removed; `copy_checkpoint` is called when the nodes share no folder. First the container of an earlier attempt is removed, which a node that was
    unreachable may still have. Raises NodeFailed."""
    each(lambda node: remove_containers(node.command, node.transport, node.command.name), nodes)
    if request.local:
        if request.checks_first:  # resumed: the launcher has written files there
            ensure_owner(nodes[0], request)
        return
    owners = nodes[:1] if request.shared else nodes
    each(lambda node: reopen_on(node, request), owners)
    if not request.shared:
        copy_checkpoint(nodes)

    def finish(node: WorkingNode) -> None:
        make_parents(node, request)
        ensure_owner(node, request)

    each(finish, owners)


def reopen_on(node: WorkingNode, request: FolderRequest) -> None:
    """The folder belongs to the login user while it is changed."""
    transport, host, login, output = node.transport, node.command.host, login_user(node), request.spec.output
    make_parents(node, request)
    transport.run(("mkdir", "-p", "--", output)).expect(f"{host}: creating {output}")
    if login not in (ROOT, request.user):
        change_owner(node, (output,), login, login=login, image=request.image)
    stale = (part for name in STALE for part in ("-o", "-name", name))
    argv = ("find", output, "-maxdepth", "1", "-type", "f", "(", *list(stale)[1:], ")", "-delete")
    transport.run(argv).expect(f"{host}: removing the result files of the last attempt")
    transport.put(request.text, str(PurePosixPath(output) / SPEC_FILE), mode=0o644)
    if request.checks_first or request.spec.data.leaves_rows_out:
        transport.put(b"", str(PurePosixPath(output) / DATA_PENDING_FILE), mode=0o644)


def make_parents(node: WorkingNode, request: FolderRequest) -> None:
    """Create the parent of the run's folder, and the other folders that the container writes to."""
    made = node.transport.run(("mkdir", "-p", "--", str(PurePosixPath(request.spec.output).parent), *request.folders[1:]))
    if made.code:
        raise parent_missing(node.command.host, made.errors)


def parent_missing(host: str, errors: str) -> NodeFailed:
    said = next(iter(errors.strip().splitlines()), "mkdir failed")
    return NodeFailed(
        f"{host}: {said}. Create the folder there once for the login user (sudo install -d -o USER FOLDER), or choose another: cluster.root=FOLDER"
    )


def ensure_owner(node: WorkingNode, request: FolderRequest) -> None:
    """Give the folders to the container's user. Nothing is done when that is the login user."""
    login = login_user(node)
    if login != request.user:
        change_owner(node, request.folders, request.user, login=login, image=request.image)


def login_user(node: WorkingNode) -> str:
    """uid:gid of the login user."""
    asked = (node.transport.run(("id", option)).expect(f"{node.command.host}: asking for the login user") for option in ("-u", "-g"))
    return ":".join(answer.output.strip() for answer in asked)


def change_owner(node: WorkingNode, folders: tuple[str, ...], user: str, *, login: str, image: str) -> None:
    """By root: the node's, or where the login user is not root, a container's."""
    change = ("chown", "-R", "--", user, *folders)
    if login != ROOT:
        mounts = tuple(Mount(path=folder, read_only=False) for folder in folders)
        change = docker_run(ContainerOptions(image=image, network="none", user=ROOT, mounts=mounts, entrypoint=change[0]), change[1:])
    node.transport.run(change, timeout_s=120).expect(
        f"{node.command.host}: giving {folders[0]} to the container's user {user} (to run as the login user instead: cluster.user={login})"
    )


# -------------------------------------------------------------------------------------------------------------- copies


def fetch_results(nodes: Sequence[WorkingNode], folder: Path, *, ranks_per_node: int, until: Callable[[], bool]) -> None:
    """Copy what the trainers left to the launcher's folder of the run, as far as the nodes respond before `until` is true. A missing file is no
    error: a failed run has only some of them."""

    def fetch(node: WorkingNode) -> None:
        ranks = range(node.command.node_rank * ranks_per_node, (node.command.node_rank + 1) * ranks_per_node)
        names = [FAILURE_FILES.format(rank=rank) for rank in ranks]
        if node.command.node_rank == 0:
            names += [RESULT_FILE, ENVIRONMENT_FILE, DATA_FILE, DATA_LEFT_OUT_FILE, METRICS_FILE]
        for name in names:
            content = node.transport.get(str(PurePosixPath(node.command.folder) / name))
            if content is not None:
                (folder / name).write_bytes(content)

    attempt_each(fetch, nodes, until=until)


def fetch_large(node: WorkingNode, name: str, target: Path, *, packed: bool = False) -> None:
    """Copy a file of the run's folder, or a folder `packed` as a .tgz, whole or not at all. Nothing is copied when it does not exist or is larger
    than FOLDER_BYTES. Raises NodeFailed."""
    parent, path = node.command.folder, f"{node.command.folder}/{name}"
    if node.transport.run(("test", "-d" if packed else "-f", path)).code:
        return
    argv = ("tar", "-C", parent, "-czf", "-", name) if packed else ("cat", "--", path)
    part, written = target.with_name(f".{target.name}.part"), 0
    try:
        with node.transport.stream(argv, silence_s=FETCH_S) as chunks, part.open("wb") as file:
            for chunk in chunks:
                written += file.write(chunk)
                if written > FOLDER_BYTES:
                    return
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class Mirror:
    """A copy of a growing file of a node, extended by asking for the bytes that are new. They are written as they are: decoding them would replace
    a character that is cut at the end of a piece, and shift the position from which the next piece is read."""

    def __init__(self, node: WorkingNode, name: str, folder: Path) -> None:
        self.node, self.path, self.source = node, folder / name, str(PurePosixPath(node.command.folder) / name)
        self.asking: Future[None] | None = None
        self.lock, self.closed = threading.Lock(), False

    def update(self) -> None:
        """Ask in the background, unless the last question has no answer yet."""
        if self.asking is None or self.asking.done():
            self.asking = in_background(self.ask, name="omnilaunch-mirror")

    def settle(self) -> None:
        """Wait up to SETTLE_S for the answer that is under way. After this call nothing is added: an answer that comes later is dropped."""
        if self.asking is not None:
            wait([self.asking], timeout=SETTLE_S)
        with self.lock:
            self.closed = True

    def ask(self) -> None:
        """A node that does not respond has nothing new here; whether it is lost is decided elsewhere."""
        have = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.node.transport.stream(("tail", "-c", f"+{have + 1}", "--", self.source), silence_s=MIRROR_TIMEOUT_S) as chunks:
                for chunk in chunks:
                    with self.lock:
                        if self.closed:
                            return
                        with self.path.open("ab") as file:
                            file.write(chunk)
        except NodeFailed:
            return
