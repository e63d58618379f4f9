"""What is done on a node around its container: the run's folder made and handed to the container's user, files put and fetched."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.plan.container import ContainerOptions, Mount, docker_run
from launcher.ssh.parallel import after, attempt_each, each
from launcher.ssh.transport import Transport
from trainer.contract import DATA_FILE, ENVIRONMENT_FILE, FAILURE_FILES, METRICS_FILE, RESULT_FILE, SPEC_FILE, TrainSpec

ROOT = "0:0"
FOLDER_BYTES = 2**28
FETCH_S = 120.0  # for what the nodes' trainers left, reports and rows
STALE = (FAILURE_FILES.format(rank="*"), ENVIRONMENT_FILE, RESULT_FILE)


# Arguments: the spec's name and size, the container's user, the folder above, the run's folder, others that it writes to. The spec comes over
# stdin. Prints who logs in; where that is root, the folders are the container's user's afterwards.
NO_PARENT, NO_FOLDER = 10, 11
PLACE = f"""umask 022
name=$1 bytes=$2 user=$3 above=$4 run=$5; shift 5
mkdir -p -- "$above" "$@" || exit {NO_PARENT}
mkdir -- "$run" || exit {NO_FOLDER}
cat >"$run/.$name" && [ "$(wc -c <"$run/.$name")" -eq "$bytes" ] && mv -- "$run/.$name" "$run/$name" || exit
own=$(id -u):$(id -g)
if [ "$own" = {ROOT} ] && [ "$user" != {ROOT} ]; then chown -R -- "$user" "$run" "$@" || exit; fi
echo "$own"
"""


@dataclass(frozen=True, kw_only=True)
class WorkingNode:
    """A working node: what it is told, and how it is reached."""

    command: NodeCommand
    transport: Transport


def place_run(sites: Sequence[WorkingNode], spec: TrainSpec, text: bytes, *, image: str, user: str, shared: bool, local: bool) -> None:
    """Make the run's folder on every node, with the spec's `text` in it, writable by the container's `user` (uid:gid). `local`: the folder is the
    launcher's own and there already. Raises NodeFailed, naming the nodes; a folder that is there belongs to another run."""
    if local:
        (site,) = sites
        give(site, prepared(site, spec), image=image, user=user)
        return
    if shared:  # all see what the first one makes
        place_on(sites[0], spec, text, image=image, user=user)
        each(lambda site: prepared(site, spec), sites[1:])
        return
    each(lambda site: place_on(site, spec, text, image=image, user=user), sites)


def place_on(site: WorkingNode, spec: TrainSpec, text: bytes, *, image: str, user: str) -> None:
    """In one command: each costs a node's login shell, which stands between the user and the first step."""
    host, folders = site.command.host, folders_of(spec)
    argv = ("sh", "-c", PLACE, "sh", SPEC_FILE, str(len(text)), user, str(PurePosixPath(spec.output).parent), *folders)
    made = site.transport.feed(argv, (text,), timeout_s=60)
    if made.code == NO_PARENT:
        raise no_parent(host, made.errors)
    if made.code == NO_FOLDER:
        raise NodeFailed(
            f"{host}: {spec.output} could not be made: {made.errors.strip()}. Another run may have this id there; choose one: --run-id"
        )
    own = made.expect(f"{host}: making {spec.output}").output.split()[-1]
    if own not in (ROOT, user):
        hand_over(site, folders, user, own=own, image=image)


def reopen_run(
    sites: Sequence[WorkingNode],
    spec: TrainSpec,
    text: bytes,
    *,
    image: str,
    user: str,
    shared: bool,
    local: bool,
    spread: Callable[[Sequence[WorkingNode]], None],
) -> None:
    """The same for another attempt, on nodes that may have the run's folder or not. What the last attempt said of its end is removed,
    `spread` brings the checkpoint to nodes that share no folder. A container of an earlier attempt goes first: a node that was away kept
    it. Raises NodeFailed."""
    each(lambda site: site.transport.run(site.command.remove), sites)
    if local:
        return
    owners = sites[:1] if shared else sites
    each(lambda site: reopen_on(site, spec, text, image=image, user=user), owners)
    if not shared:
        spread(sites)
    each(lambda site: give(site, prepared(site, spec), image=image, user=user), owners)


def reopen_on(site: WorkingNode, spec: TrainSpec, text: bytes, *, image: str, user: str) -> None:
    """The folder belongs to who logs in while it is changed."""
    transport, host, own = site.transport, site.command.host, login_of(site)
    prepared(site, spec)
    transport.run(("mkdir", "-p", "--", spec.output)).expect(f"{host}: making {spec.output}")
    if own not in (ROOT, user):
        hand_over(site, (spec.output,), own, own=own, image=image)
    stale = (part for name in STALE for part in ("-o", "-name", name))
    argv = ("find", spec.output, "-maxdepth", "1", "-type", "f", "(", *list(stale)[1:], ")", "-delete")
    transport.run(argv).expect(f"{host}: removing what the last attempt said of its end")
    transport.put(text, str(PurePosixPath(spec.output) / SPEC_FILE), mode=0o644)


def prepared(site: WorkingNode, spec: TrainSpec) -> tuple[str, ...]:
    """The folders that the container writes to, with those above them made."""
    folders = folders_of(spec)
    made = site.transport.run(("mkdir", "-p", "--", str(PurePosixPath(spec.output).parent), *folders[1:]))
    if made.code:
        raise no_parent(site.command.host, made.errors)
    return folders


def folders_of(spec: TrainSpec) -> tuple[str, ...]:
    """Those that the container writes to, the run's own first."""
    return (spec.output, *((spec.data.root,) if spec.data.builtin else ()))


def no_parent(host: str, errors: str) -> NodeFailed:
    said = next(iter(errors.strip().splitlines()), "mkdir failed")
    return NodeFailed(
        f"{host}: {said}. Make the folder there once for the user who logs in "
        "(sudo install -d -o USER FOLDER), or choose another: cluster.root=FOLDER"
    )


def give(site: WorkingNode, folders: tuple[str, ...], *, image: str, user: str) -> None:
    """Let the container's user write there. Nothing needs to be done where that is who logs in; else root does it, of the node or, where
    the login is none, of a container."""
    own = login_of(site)
    if own == user:
        return
    hand_over(site, folders, user, own=own, image=image)


def login_of(site: WorkingNode) -> str:
    """uid:gid of who logs in there."""
    asked = (site.transport.run(("id", option)).expect(f"{site.command.host}: asking who logs in") for option in ("-u", "-g"))
    return ":".join(answer.output.strip() for answer in asked)


def hand_over(site: WorkingNode, folders: tuple[str, ...], user: str, *, own: str, image: str) -> None:
    change = ("chown", "-R", "--", user, *folders)
    if own != ROOT:
        mounts = tuple(Mount(path=folder, read_only=False) for folder in folders)
        options = ContainerOptions(image=image, network="none", user=ROOT, mounts=mounts, entrypoint=change[0])
        change = docker_run(options, change[1:])
    site.transport.run(change, timeout_s=120).expect(
        f"{site.command.host}: giving {folders[0]} to the container's user {user} (to run as the one who logs in: cluster.user={own})"
    )


def fetch_results(sites: Sequence[WorkingNode], folder: Path, *, ranks_per_node: int) -> dict[str, str]:
    """Copy what the trainer left to the launcher's own folder of the run; host -> why it could not be asked. Missing files are no error:
    a run that failed has only some."""

    def fetch(site: WorkingNode) -> None:
        ranks = range(site.command.node_rank * ranks_per_node, (site.command.node_rank + 1) * ranks_per_node)
        names = [FAILURE_FILES.format(rank=rank) for rank in ranks]
        if site.command.node_rank == 0:
            names += [RESULT_FILE, ENVIRONMENT_FILE, DATA_FILE, METRICS_FILE]
        for name in names:
            content = site.transport.get(str(PurePosixPath(site.command.folder) / name))
            if content is not None:
                (folder / name).write_bytes(content)

    answers = attempt_each(fetch, sites, until=after(FETCH_S))
    return {site.command.host: str(answer) for site, answer in zip(sites, answers, strict=True) if isinstance(answer, NodeFailed)}


def fetch_folder(site: WorkingNode, name: str, target: Path) -> None:
    """A folder in the run's folder of a node as a .tgz here; nothing where there is none, or where it is larger than FOLDER_BYTES. Raises
    NodeFailed."""
    parent = site.command.folder
    if site.transport.run(("test", "-d", f"{parent}/{name}")).code == 0:
        receive(site, ("tar", "-C", parent, "-czf", "-", name), target)


def fetch_file(site: WorkingNode, name: str, target: Path) -> None:
    """A file that may be a long one in the same way, as it is."""
    path = f"{site.command.folder}/{name}"
    if site.transport.run(("test", "-f", path)).code == 0:
        receive(site, ("cat", "--", path), target)


def receive(site: WorkingNode, argv: tuple[str, ...], target: Path) -> None:
    """What a command there writes, as a file here, whole or not at all."""
    part, written = target.with_name(f".{target.name}.part"), 0
    try:
        with site.transport.stream(argv, silence_s=FETCH_S) as chunks, part.open("wb") as file:
            for chunk in chunks:
                written += file.write(chunk)
                if written > FOLDER_BYTES:
                    return
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class Mirror:
    """A growing file of a node, kept up to date here by asking for what is new."""

    def __init__(self, site: WorkingNode, name: str, folder: Path) -> None:
        self.site, self.path, self.source = site, folder / name, str(PurePosixPath(site.command.folder) / name)
        self.asking: threading.Thread | None = None

    def update(self) -> None:
        """Ask, unless an earlier question has no answer yet; beside the caller, who has other nodes to watch."""
        if self.asking is None or not self.asking.is_alive():
            self.asking = threading.Thread(target=self.ask, name="omnilaunch-mirror", daemon=True)
            self.asking.start()

    def settle(self) -> None:
        """Wait for an answer that is under way: nothing is added afterwards."""
        if self.asking is not None:
            self.asking.join()

    def ask(self) -> None:
        """NodeFailed is the watcher's to find; here a node that does not answer has nothing new."""
        have = self.path.stat().st_size if self.path.exists() else 0
        try:
            new = self.site.transport.run(("tail", "-c", f"+{have + 1}", "--", self.source), timeout_s=20)
        except NodeFailed:
            return
        if new.code == 0 and new.output:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(new.output)
