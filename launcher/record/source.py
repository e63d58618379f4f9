"""The state of the source tree that a run was planned and started with: the commit, and what the tree had that the commit does not have.

A tree is dirty if the commit alone does not give what the run used: a change below CODE, or in a file of conf/ that the run's config was
composed from, except conf/cluster, which only says where it runs. Everything else (a README, a published result, a report, notes) is listed
by name, as information. So looking at runs never makes a tree dirty.

The diff covers CODE and nothing else. What conf/ says is in the record already, composed, and is compared key by key; files of conf/ may
also hold URLs with credentials.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from launcher.redact import holds_credentials, printable
from trainer.contract.listing import keep_some

CODE = ("images", "launcher", "trainer", "pyproject.toml")  # what is copied into an image or imported by a run
MAX_DIFF_BYTES = 4 * 2**20
MAX_NEW_FILE_BYTES = 2**20  # a larger untracked file is data, and is named instead of recorded
PLACE = "cluster"  # the folder of conf/ whose files say where a run runs, not what it does
MAX_LISTED = 20  # names of files outside CODE that are listed
RECORD_SCHEMA = 2  # of a run's folder; schema 1 has no checksums, no diff and no list of inputs


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """`commit`: '' if the folder is not a git tree or has no commit. `dirty`: a file below CODE or of `conf` differs from the commit; in
    records of earlier versions also any other tracked file. `diff_sha256`: of source.diff, '' if CODE had no changes. `diff_lacks`: what is
    missing in source.diff, '' if nothing is. `conf`: files that the run's config was composed from and that the commit does not have like
    this. `changed`, `untracked`: the other tracked files that were changed, and the other untracked ones, for information."""

    commit: str
    dirty: bool
    diff_sha256: str = ""
    diff_bytes: int = 0
    diff_lacks: str = ""
    record_schema: int = 1
    untracked: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    conf: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TreeStatus:
    """What `git status` lists: tracked files that were changed below CODE (`code`), the submodules among them, tracked files that were
    changed elsewhere, and untracked files and folders elsewhere."""

    code: tuple[str, ...] = ()
    submodules: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceTree:
    """`diff`: in the form that `git apply` takes, at most MAX_DIFF_BYTES; b'' if there are no changes. `code`: names of changed and new files
    below CODE."""

    state: SourceState
    diff: bytes = b""
    code: tuple[str, ...] = ()


def read_source(project: Path, used: Sequence[str] = ()) -> SourceTree:
    """Commit, changes and diff of the project's tree. `used`: the files that the run's config was composed from, relative to the project, or
    absolute for those outside it. Nothing in the tree, and no failure of git after the first answer, loses the commit."""
    try:
        commit = git(project, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return SourceTree(state=SourceState(commit="", dirty=False, record_schema=RECORD_SCHEMA))
    try:
        status, conf = read_status(project), find_changed_conf(project, used)
        # Untracked files below CODE that .gitignore does not exclude; a git repository of its own is one name, which ends with '/'.
        new = split_names(git(project, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE))
        diff, lacks = read_diff(project, new, status.submodules) if status.code or new else (b"", "")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
        lacks = f"all of it: {printable(said[0] if said else str(error))}"
        status, conf, new, diff = TreeStatus(), (), (), b""
    state = SourceState(
        commit=commit,
        dirty=bool(status.code or new or conf or lacks),
        diff_sha256=sha256(diff).hexdigest() if diff else "",
        diff_bytes=len(diff),
        diff_lacks=lacks,
        record_schema=RECORD_SCHEMA,
        untracked=list_names(status.untracked),
        changed=list_names(name for name in status.changed if printable(name) not in conf),
        conf=conf,
    )
    return SourceTree(state=state, diff=diff, code=tuple(map(printable, (*status.code, *new))))


def read_status(project: Path) -> TreeStatus:
    status: dict[str, list[str]] = {"code": [], "submodules": [], "changed": [], "untracked": []}
    # Each entry ends with a null byte, so that a name may hold anything: https://git-scm.com/docs/git-status, "Porcelain Format Version 2".
    for entry in split_names(git(project, "status", "--porcelain=v2", "-z", "--no-renames")):
        if entry[0] == "?":
            status["untracked"] += [entry[2:]] if not is_code(entry[2:]) else []
            continue
        fields = entry.split(" ", 8 if entry[0] == "1" else 10)
        status["code" if is_code(fields[-1]) else "changed"].append(fields[-1])
        if fields[2][0] == "S" and is_code(fields[-1]):
            status["submodules"].append(fields[-1])
    return TreeStatus(**{name: tuple(found) for name, found in status.items()})


def find_changed_conf(project: Path, used: Sequence[str]) -> tuple[str, ...]:
    """Those of the files that the commit does not have like this: changed, untracked, ignored, or outside the tree."""
    named = [name for name in used if Path(name).parent.name != PLACE]
    outside, inside = [name for name in named if name.startswith("/")], [name for name in named if not name.startswith("/")]
    if not inside:
        return tuple(map(printable, outside))
    tracked = {*split_names(git(project, "--literal-pathspecs", "ls-files", "-z", "--", *inside))}
    changed = {*split_names(git(project, "--literal-pathspecs", "diff", "--name-only", "--no-renames", "-z", "HEAD", "--", *inside))}
    return tuple(map(printable, (*(name for name in inside if name in changed or name not in tracked), *outside)))


def list_names(names: Iterable[str]) -> tuple[str, ...]:
    return keep_some([printable(name) for name in names], MAX_LISTED)


def is_code(name: str) -> bool:
    return name.split("/")[0] in CODE


def read_diff(project: Path, new: Sequence[str], submodules: Sequence[str]) -> tuple[bytes, str]:
    """(the diff of CODE against HEAD with the new files; what it lacks). The tree's own index is not changed."""
    lacks = {name: why for name in new if (why := reason_to_leave_out(project / name))}
    lacks |= dict.fromkeys(submodules, "a submodule with another commit or with changes")
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as scratch:
        index = Path(scratch) / "index"
        shutil.copyfile(git(project, "rev-parse", "--path-format=absolute", "--git-path", "index").decode().strip(), index)
        taken = os.fsencode("\0".join(name for name in new if name not in lacks))
        if taken:
            words = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            git(project, *words, index=index, content=taken)
        # Everything that the user's git config could change is given: equal trees must have equal diffs, which `git apply` reads.
        written = ("--no-color", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--diff-algorithm=myers", "--no-renames")
        diff_words = ("diff", *written, "--binary", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all", "HEAD", "--", *CODE)
        diff = git(project, *diff_words, index=index)
    listed = [f"{printable(name)}, {why}" for name, why in lacks.items()]
    if holds_credentials(diff.decode(errors="replace")):
        return b"", "all of it: it holds a URL with credentials"
    if len(diff) > MAX_DIFF_BYTES:
        listed.append(f"everything after its first {MAX_DIFF_BYTES:,} of {len(diff):,} bytes")
    return diff[:MAX_DIFF_BYTES], "; ".join(listed)


def reason_to_leave_out(path: Path) -> str:
    """'' if git can read the new file and it is small. A symbolic link is recorded as a link, whether or not its target exists."""
    if path.is_symlink():
        return ""
    if path.is_dir():
        return "a git repository of its own"
    size = path.stat().st_size
    if size > MAX_NEW_FILE_BYTES:
        return f"new and larger than {MAX_NEW_FILE_BYTES:,} bytes"
    return "" if os.access(path, os.R_OK) else "new and not readable"


def split_names(output: bytes) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in output.split(b"\0") if name)


def git(project: Path, *words: str, index: Path | None = None, content: bytes = b"") -> bytes:
    """What git prints. `index`: a file to use in place of the tree's own index. Raises OSError, and CalledProcessError if git fails."""
    argv = ("env", f"GIT_INDEX_FILE={index}", "git", *words) if index else ("git", *words)
    return subprocess.run(argv, cwd=project, input=content, capture_output=True, check=True).stdout
