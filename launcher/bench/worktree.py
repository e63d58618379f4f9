"""The code that a rerun starts from: this tree where it makes the same image, else the recorded commit in a worktree of its own.

What counts is what the image is made of (Dockerfile, lock, entrypoint, trainer), file by file: a commit that changed none of these is the
same code, and a dirty tree with the same commit is not.
"""

import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from launcher.errors import ConfigRefused, ImageFailed
from launcher.image.stack import Image, load_stacks, render
from launcher.record.reader import Archive
from launcher.record.source import git

TREES = "trees"
DOCKERFILE = "Dockerfile"
NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Tree:
    """`differs`: files that are others than the record's, () for the same code. `why`: what stands in the way of this tree, or of the
    recorded commit. `is_recorded`: the code is the record's, and not this tree's, from a worktree or from its image, which `image_stands_in`."""

    project: Path
    differs: tuple[str, ...] = ()
    why: str = ""
    is_recorded: bool = False
    image_stands_in: bool = False


def find_tree(archive: Archive, project: Path, scratch: Path) -> Tree:
    """`scratch`: where worktrees lie. Whether a tree that differs may be used is not decided here."""
    differs = differing(archive, project)
    if not differs:
        return Tree(project=project)
    try:
        folder = open_worktree(archive, project, scratch)
    except ConfigRefused as error:
        return Tree(project=project, differs=differs, why=str(error))
    still = differing(archive, folder)
    if still:
        why = f"the worktree of {archive.source.commit[:12]} differs too, in {describe_files(still)}: git worktree remove --force {folder}"
        return Tree(project=project, differs=differs, why=why)
    return Tree(project=folder, why=f"this tree differs in {describe_files(differs)}", is_recorded=True)


def try_image(archive: Archive, tree: Tree) -> Tree:
    """Where neither this tree nor git has the code, the image of the record may still be on this machine."""
    from launcher.image.docker import find

    if not tree.differs or find(archive.plan.image) is None:
        return tree
    return Tree(project=tree.project, why=f"this tree differs in {describe_files(tree.differs)}", is_recorded=True, image_stands_in=True)


def differing(archive: Archive, project: Path) -> tuple[str, ...]:
    """Files of the recorded image that this tree makes otherwise."""
    recorded, base = archive.plan.image, archive.plan.config.cluster.delivery.base
    try:
        stack = load_stacks(project / "images")[recorded.stack]
        image: Image = render(stack, architecture=recorded.architecture, root=project, base=base)
    except (ImageFailed, KeyError, OSError) as error:
        return (f"images/versions.yaml ({error})",)
    names = sorted({*recorded.files, *image.files})
    changed = tuple(name for name in names if recorded.files.get(name) != image.files.get(name))
    return changed if image.dockerfile == recorded.dockerfile else (DOCKERFILE, *changed)


def describe_files(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def open_worktree(archive: Archive, project: Path, scratch: Path) -> Path:
    """The recorded commit with its diff, below `scratch`, from an earlier rerun or made now. Raises ConfigRefused saying what is missing."""
    source = archive.source
    if not source.commit:
        raise ConfigRefused("the record names no commit: the run did not start from a git tree")
    if source.diff_lacks:
        raise ConfigRefused(f"the recorded tree had changes that the record does not hold whole: it lacks {source.diff_lacks}")
    if source.dirty and source.record_schema < 2:
        raise ConfigRefused("the recorded tree had changes, and records of that time do not hold them")
    if archive.diff and sha256(archive.diff).hexdigest() != source.diff_sha256:
        raise ConfigRefused("source.diff is not the one that source.json names")
    name = f"{source.commit[:12]}-{source.diff_sha256[:8]}" if archive.diff else source.commit[:12]
    folder = scratch / TREES / name
    if (folder / ".git").exists():
        return folder
    try:
        git(project, "rev-parse", "--verify", "--quiet", f"{source.commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigRefused(f"commit {source.commit} is not in {project}: git fetch origin {source.commit}") from error
    make_worktree(project, folder, source.commit, archive.diff)
    return folder


def make_worktree(project: Path, folder: Path, commit: str, diff: bytes) -> None:
    """Whole or not there: what git refuses half-way is taken away again."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        git(project, "worktree", "prune")
        git(project, "worktree", "add", "--detach", "--quiet", str(folder.resolve()), commit)
        if diff:
            subprocess.run(("git", "apply", "--whitespace=nowarn", "-"), cwd=folder, input=diff, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = shorten(getattr(error, "stderr", b"").decode(errors="replace")) or str(error)
        if folder.exists():
            subprocess.run(("git", "worktree", "remove", "--force", str(folder.resolve())), cwd=project, capture_output=True, check=False)
        raise ConfigRefused(f"commit {commit[:12]} could not be checked out to {folder}: {said}") from error


def shorten(said: str) -> str:
    """What git says first and last: of a full disk it has a line for every file of the tree."""
    lines = said.strip().splitlines()
    return "\n".join((lines[0], f"... {len(lines) - 2} lines more", lines[-1]) if len(lines) > 3 else lines)
