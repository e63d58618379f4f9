"""The code that a run was planned and carried out with, as a record keeps it: the commit, and what the tree had besides.

The diff holds what a run is made of (MADE_OF) and nothing else: the config is in the record whole, as it was resolved, and files of conf/
may hold addresses with credentials.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from launcher.redact import holds_credentials

MADE_OF = ("images", "launcher", "trainer", "pyproject.toml")
MOST_DIFF_BYTES = 4 * 2**20
MOST_NEW_FILE_BYTES = 2**20  # an untracked file that is larger is data, and is named instead
RECORD_SCHEMA = 2  # of a run's folder; 1: of before there were seals, diffs and manifests


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """The code that ran. `dirty`: the tree had changes that the commit does not hold; '' commit: not a git tree. `diff_sha256`: of
    source.diff, '' where MADE_OF had no changes; `diff_lacks`: why that file is not the whole of them, '' where it is."""

    commit: str
    dirty: bool
    diff_sha256: str = ""
    diff_bytes: int = 0
    diff_lacks: str = ""
    record_schema: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceTree:
    """`diff`: as git apply takes it, bounded; b'' where there is none."""

    state: SourceState
    diff: bytes = b""


def read_source(project: Path) -> SourceTree:
    """Commit, dirty flag and diff of the project's tree, asked of git."""
    try:
        commit = git(project, "rev-parse", "HEAD").decode().strip()
        changed = git(project, "status", "--porcelain").strip()
        diff, lacks = read_diff(project) if changed else (b"", "")
    except (OSError, subprocess.CalledProcessError):
        return SourceTree(state=SourceState(commit="", dirty=False, record_schema=RECORD_SCHEMA))
    digest = sha256(diff).hexdigest() if diff else ""
    state = SourceState(
        commit=commit, dirty=bool(changed), diff_sha256=digest, diff_bytes=len(diff), diff_lacks=lacks, record_schema=RECORD_SCHEMA
    )
    return SourceTree(state=state, diff=diff)


def read_diff(project: Path) -> tuple[bytes, str]:
    """(diff of MADE_OF against HEAD, new files included; what it lacks). The tree's own index stays as it is."""
    listed = git(project, "ls-files", "--others", "--exclude-standard", "-z", "--", *MADE_OF).decode(errors="surrogateescape")
    new = [name for name in listed.split("\0") if name]
    large = [name for name in new if (project / name).stat().st_size > MOST_NEW_FILE_BYTES]
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as aside:
        index = Path(aside) / "index"
        shutil.copyfile(git(project, "rev-parse", "--path-format=absolute", "--git-path", "index").decode().strip(), index)
        environment = {"GIT_INDEX_FILE": str(index)}
        taken = [name for name in new if name not in large]
        if taken:
            git(project, "add", "--intent-to-add", "--", *taken, environment=environment)
        diff = git(project, "diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", *MADE_OF, environment=environment)
    return bound(diff, large)


def bound(diff: bytes, large: Sequence[str]) -> tuple[bytes, str]:
    """The diff without credentials and within its limit, and what that leaves out."""
    lacks = [f"{name}, new and larger than {MOST_NEW_FILE_BYTES:,} bytes" for name in large]
    if holds_credentials(diff.decode(errors="replace")):
        return b"", "all of it: it holds a URL with credentials"
    if len(diff) > MOST_DIFF_BYTES:
        lacks.append(f"what follows its first {MOST_DIFF_BYTES:,} of {len(diff):,} bytes")
        diff = diff[:MOST_DIFF_BYTES]
    return diff, "; ".join(lacks)


def git(project: Path, *words: str, environment: Mapping[str, str] | None = None) -> bytes:
    """What git prints. Raises OSError, and CalledProcessError where it refuses."""
    with_variables = ("env", *(f"{name}={value}" for name, value in (environment or {}).items())) if environment else ()
    return subprocess.run((*with_variables, "git", *words), cwd=project, capture_output=True, check=True).stdout
