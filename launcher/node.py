"""What is done on a node around its container: the run's folder made and handed to the container's user, files put and fetched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import NodeFailed
from launcher.fleet import each
from launcher.start import NodeCommand
from launcher.transport import Transport
from trainer.contract import DATA_FILE, ENVIRONMENT_FILE, FAILURE_FILES, METRICS_FILE, RESULT_FILE, SPEC_FILE, TrainSpec, encode

ROOT = "0:0"
STALE = (FAILURE_FILES.format(rank="*"), ENVIRONMENT_FILE, RESULT_FILE)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A working node: what it is told, and how it is reached."""

    command: NodeCommand
    transport: Transport


def place_run(sites: Sequence[Site], spec: TrainSpec, *, image: str, user: str, shared: bool, local: bool) -> None:
    """Make the run's folder on every node, with the spec in it, writable by the container's `user` (uid:gid). `local`: the folder is the
    launcher's own and there already. Raises NodeFailed, naming the nodes; a folder that is there belongs to another run."""
    text = encode(spec).encode()
    if local:
        (site,) = sites
        give(site, prepared(site, spec), image=image, user=user)
        return
    if shared:  # one after the other, since all see the same folder
        for place, site in enumerate(sites):
            place_on(site, spec, text, image=image, user=user, first=place == 0)
        return
    each(lambda site: place_on(site, spec, text, image=image, user=user, first=True), sites)


def place_on(site: Site, spec: TrainSpec, text: bytes, *, image: str, user: str, first: bool) -> None:
    transport, host = site.transport, site.command.host
    folders = prepared(site, spec)
    made = transport.run(("mkdir", "--", spec.output))
    if made.code and first:
        raise NodeFailed(
            f"{host}: {spec.output} could not be made: {made.errors.strip()}. Another run may have this id there; choose one: --run-id"
        )
    if first:
        transport.put(text, str(PurePosixPath(spec.output) / SPEC_FILE), mode=0o644)
    give(site, folders, image=image, user=user)


def reopen_run(
    sites: Sequence[Site], spec: TrainSpec, *, image: str, user: str, shared: bool, local: bool, spread: Callable[[Sequence[Site]], None]
) -> None:
    """The same for another attempt, on nodes that may have the run's folder or not. What the last attempt said of its end is removed,
    `spread` brings the checkpoint to nodes that share no folder. A container of an earlier attempt goes first: a node that was away kept
    it. Raises NodeFailed."""
    each(lambda site: site.transport.run(site.command.remove), sites)
    if local:
        return
    owners = sites[:1] if shared else sites
    each(lambda site: reopen_on(site, spec, image=image, user=user), owners)
    if not shared:
        spread(sites)
    each(lambda site: give(site, prepared(site, spec), image=image, user=user), owners)


def reopen_on(site: Site, spec: TrainSpec, *, image: str, user: str) -> None:
    """The folder belongs to who logs in while it is changed."""
    transport, host, own = site.transport, site.command.host, login_of(site)
    prepared(site, spec)
    transport.run(("mkdir", "-p", "--", spec.output)).expect(f"{host}: making {spec.output}")
    if own not in (ROOT, user):
        hand_over(site, (spec.output,), own, own=own, image=image)
    stale = (part for name in STALE for part in ("-o", "-name", name))
    argv = ("find", spec.output, "-maxdepth", "1", "-type", "f", "(", *list(stale)[1:], ")", "-delete")
    transport.run(argv).expect(f"{host}: removing what the last attempt said of its end")
    transport.put(encode(spec).encode(), str(PurePosixPath(spec.output) / SPEC_FILE), mode=0o644)


def prepared(site: Site, spec: TrainSpec) -> tuple[str, ...]:
    """The folders that the container writes to, with those above them made."""
    parent = str(PurePosixPath(spec.output).parent)
    data = (spec.data.root,) if spec.data.builtin else ()
    made = site.transport.run(("mkdir", "-p", "--", parent, *data))
    if made.code:
        raise NodeFailed(
            f"{site.command.host}: {made.errors.strip().splitlines()[0]}. Make the folder there once for the user who logs in "
            "(sudo install -d -o USER FOLDER), or choose another: cluster.root=FOLDER"
        )
    return (spec.output, *data)


def give(site: Site, folders: tuple[str, ...], *, image: str, user: str) -> None:
    """Let the container's user write there. Nothing needs to be done where that is who logs in; else root does it, of the node or, where
    the login is none, of a container."""
    own = login_of(site)
    if own == user:
        return
    hand_over(site, folders, user, own=own, image=image)


def login_of(site: Site) -> str:
    """uid:gid of who logs in there."""
    asked = (site.transport.run(("id", option)).expect(f"{site.command.host}: asking who logs in") for option in ("-u", "-g"))
    return ":".join(answer.output.strip() for answer in asked)


def hand_over(site: Site, folders: tuple[str, ...], user: str, *, own: str, image: str) -> None:
    change = ("chown", "-R", "--", user, *folders)
    if own != ROOT:
        mounts = (part for folder in folders for part in ("--mount", f"type=bind,source={folder},target={folder}"))
        change = ("docker", "run", "--rm", "--network", "none", "--user", ROOT, "--entrypoint", change[0], *mounts, image, *change[1:])
    site.transport.run(change, timeout_s=120).expect(
        f"{site.command.host}: giving {folders[0]} to the container's user {user} (to run as the one who logs in: cluster.user={own})"
    )


def fetch_results(sites: Sequence[Site], folder: Path, *, ranks_per_node: int) -> dict[str, str]:
    """Copy what the trainer left to the launcher's own folder of the run; host -> why it could not be asked. Missing files are no error:
    a run that failed has only some."""
    unreachable: dict[str, str] = {}
    for site in sites:
        ranks = range(site.command.node_rank * ranks_per_node, (site.command.node_rank + 1) * ranks_per_node)
        names = [FAILURE_FILES.format(rank=rank) for rank in ranks]
        if site.command.node_rank == 0:
            names += [RESULT_FILE, ENVIRONMENT_FILE, DATA_FILE, METRICS_FILE]
        try:
            for name in names:
                content = site.transport.get(str(PurePosixPath(site.command.folder) / name))
                if content is not None:
                    (folder / name).write_bytes(content)
        except NodeFailed as error:
            unreachable[site.command.host] = str(error)
    return unreachable


class Mirror:
    """A growing file of a node, kept up to date here by asking for what is new."""

    def __init__(self, site: Site, name: str, folder: Path) -> None:
        self.site, self.path, self.source = site, folder / name, str(PurePosixPath(site.command.folder) / name)

    def update(self) -> None:
        """NodeFailed is the watcher's to find; here a node that does not answer has nothing new."""
        have = self.path.stat().st_size if self.path.exists() else 0
        try:
            new = self.site.transport.run(("tail", "-c", f"+{have + 1}", "--", self.source), timeout_s=20)
        except NodeFailed:
            return
        if new.code == 0 and new.output:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(new.output)
