"""The code that a rerun starts from: this tree if it makes the same image, else the recorded commit, checked out to a git worktree.

What counts is what the image is made of (Dockerfile, lock, entrypoint, trainer), file by file: a commit that changed none of these files is
the same code, and a tree with uncommitted changes is not.
"""

import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from launcher.errors import ConfigRefused, ImageFailed
from launcher.image.stack import Image, load_stacks, render
from launcher.record.recorded_run import RecordedRun
from launcher.record.source import git
from trainer.contract.listing import list_some

TREES = "trees"
DOCKERFILE = "Dockerfile"
MAX_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Tree:
    """`project`: the folder with the code. `differs`: its files that differ from the record, () for the same code. `why`: why this tree, or
    the recorded commit, cannot be used. `is_recorded`: the code is the record's and not that of this tree; it comes from a worktree, or, if
    `from_image`, from the recorded image."""

    project: Path
    differs: tuple[str, ...] = ()
    why: str = ""
    is_recorded: bool = False
    from_image: bool = False


def find_tree(recorded: RecordedRun, project: Path, scratch: Path) -> Tree:
    """`scratch`: the folder for worktrees. The caller decides whether a tree that differs may be used."""
    differs = differing_files(recorded, project)
    if not differs:
        return Tree(project=project)
    try:
        folder = open_worktree(recorded, project, scratch)
    except ConfigRefused as error:
        return Tree(project=project, differs=differs, why=str(error))
    still = differing_files(recorded, folder)
    if still:
        why = f"the worktree of {recorded.source.commit[:12]} differs too, in {list_files(still)}: git worktree remove --force {folder}"
        return Tree(project=project, differs=differs, why=why)
    return Tree(project=folder, why=f"this tree differs in {list_files(differs)}", is_recorded=True)


def try_image(recorded: RecordedRun, tree: Tree) -> Tree:
    """If neither this tree nor git has the code, the recorded image may still be on this machine."""
    from launcher.image.docker import find

    if not tree.differs or find(recorded.plan.image) is None:
        return tree
    return Tree(project=tree.project, why=f"this tree differs in {list_files(tree.differs)}", is_recorded=True, from_image=True)


def differing_files(recorded: RecordedRun, project: Path) -> tuple[str, ...]:
    """Files of the recorded image that this tree would make differently."""
    image, base = recorded.plan.image, recorded.plan.config.cluster.delivery.base
    try:
        stack = load_stacks(project / "images")[image.stack]
        return changed_files(image, render(stack, architecture=image.architecture, root=project, base=base))
    except (ImageFailed, KeyError, OSError) as error:
        return (f"images/versions.yaml ({error})",)


def changed_files(left: Image, right: Image) -> tuple[str, ...]:
    changed = tuple(name for name in sorted({*left.files, *right.files}) if left.files.get(name) != right.files.get(name))
    return changed if left.dockerfile == right.dockerfile else (DOCKERFILE, *changed)


def list_files(names: tuple[str, ...]) -> str:
    return list_some(names, MAX_NAMED)


def open_worktree(recorded: RecordedRun, project: Path, scratch: Path) -> Path:
    """A worktree of the recorded commit with the recorded diff, below `scratch`; one of an earlier rerun is used again. Raises ConfigRefused
    that says what is missing."""
    source, diff = recorded.source, recorded.diff
    if not source.commit:
        raise ConfigRefused("the record names no commit: the run was not started from a git tree")
    if source.diff_lacks:
        raise ConfigRefused(f"the recorded tree had changes that the record does not hold completely: it lacks {source.diff_lacks}")
    if source.dirty and source.record_schema < 2:
        raise ConfigRefused("the recorded tree had changes, and records of schema 1 do not hold them")
    if diff and sha256(diff).hexdigest() != source.diff_sha256:
        raise ConfigRefused("source.diff is not the file whose hash is in source.json")
    folder = scratch / TREES / (f"{source.commit[:12]}-{source.diff_sha256[:8]}" if diff else source.commit[:12])
    if (folder / ".git").exists():
        return folder
    try:
        git(project, "rev-parse", "--verify", "--quiet", f"{source.commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigRefused(f"commit {source.commit} is not in {project}. Next: git fetch origin {source.commit}") from error
    make_worktree(project, folder, source.commit, diff)
    return folder


def make_worktree(project: Path, folder: Path, commit: str, diff: bytes) -> None:
    """If git fails half-way, the worktree is removed again. Raises ConfigRefused."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        git(project, "worktree", "prune")
        git(project, "worktree", "add", "--detach", "--quiet", str(folder.resolve()), commit)
        if diff:
            git(folder, "apply", "--whitespace=nowarn", "-", content=diff)
    except (OSError, subprocess.CalledProcessError) as error:
        said = first_and_last(getattr(error, "stderr", b"").decode(errors="replace")) or str(error)
        if folder.exists():
            subprocess.run(("git", "worktree", "remove", "--force", str(folder.resolve())), cwd=project, capture_output=True, check=False)
        raise ConfigRefused(f"commit {commit[:12]} could not be checked out to {folder}: {said}") from error


def first_and_last(said: str) -> str:
    """The first and the last line of what git printed: on a full disk it prints a line for every file of the tree."""
    lines = said.strip().splitlines()
    return "\n".join((lines[0], f"... {len(lines) - 2} more lines", lines[-1]) if len(lines) > 3 else lines)
