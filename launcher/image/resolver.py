"""Runs uv's resolver: requirements in, the rows of a lock out, each row with every hash of its files."""

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.errors import ImageFailed
from launcher.image.lock import join, name_of, rest_of, split_rows

NEVER = "python_version < '0'"
# uv exits with 1 when the index answered and no version fits, with 2 when it could not reach the index. A proxy that answers with 403
# or 404 in place of the index looks to uv like an index without the package, and so does UV_OFFLINE.
UNREACHABLE = 2
NO_ANSWER = re.compile(r"not found in the package registry|network was disabled|not found in the cache")


class IndexUnreachable(ImageFailed):
    """No index answered, so it is not known whether the requirements can be satisfied together."""


def find_uv() -> str:
    """The path of uv in this Python's environment. Raises ImageFailed if uv is not installed."""
    path = Path(sysconfig.get_path("scripts")) / "uv"
    if not path.is_file():
        raise ImageFailed(f"{path} does not exist: uv resolves the locks and is installed with the tools of the tests. Run: make setup")
    return str(path)


def resolve(
    uv: str,
    requirements: Iterable[str],
    *,
    python: str,
    platform: str,
    kept: Mapping[str, str] | None = None,
    agreeing: Mapping[str, str] | None = None,
    overrides: tuple[str, ...] = (),
    index: str = "",
    alone: bool = False,
) -> dict[str, str]:
    """Name -> row. `kept`: rows whose versions uv prefers; `agreeing`: rows whose versions are constraints; `overrides`: requirements
    that replace what any package asks for; `index`: the index to ask instead of the user's own; `alone`: without dependencies.
    Raises ImageFailed with uv's output, IndexUnreachable when uv could not reach the index."""
    wanted = tuple(requirements)
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as name:
        folder = Path(name)
        (folder / "wanted.in").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        (folder / "overrides.in").write_text("\n".join(overrides) + "\n", encoding="utf-8")
        (folder / "agreeing.in").write_text(join(agreeing or {}), encoding="utf-8")
        lock = folder / "lock.txt"
        lock.write_text(join(kept or {}), encoding="utf-8")
        command = (
            uv, "pip", "compile", str(folder / "wanted.in"), "--output-file", str(lock),
            "--constraints", str(folder / "agreeing.in"), "--overrides", str(folder / "overrides.in"),
            "--python-version", python, "--python-platform", platform,
            "--generate-hashes", "--no-header", "--no-annotate", "--no-config", "--quiet",
            *(("--default-index", index) if index else ()), *(("--no-deps",) if alone else ()),
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        text = lock.read_text(encoding="utf-8")
    if done.returncode:
        kind = IndexUnreachable if done.returncode == UNREACHABLE or NO_ANSWER.search(done.stderr) else ImageFailed
        raise kind(f"uv did not resolve {', '.join(wanted)} for {platform}:\n{done.stderr.strip()}")
    return read_output(text, wanted, platform)


def read_output(text: str, wanted: tuple[str, ...], platform: str) -> dict[str, str]:
    """The rows of uv's output, which must be a lock with at least the wanted packages."""
    rows, rest = split_rows(text), rest_of(text)
    missing = [name for name in map(name_of, wanted) if name not in rows]
    if rest or missing:
        fault = f"is not a lock with hashes, at: {rest}" if rest else f"lacks {', '.join(missing)}"
        raise ImageFailed(f"uv's output for {platform} {fault}; use the uv that make setup installs, and unset UV_FIND_LINKS")
    return rows
