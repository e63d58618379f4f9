"""uv's resolver: requirements in, the rows of a lock out, each with every hash of its files."""

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.errors import ImageFailed

NEVER = "python_version < '0'"
ROW = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\\n(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.MULTILINE)
REST = re.compile(r"^(?!#|--extra-index-url )\S.*", re.MULTILINE)
SEPARATORS = re.compile(r"[-_.]+")
# uv ends with 1 where the index answered and nothing fits, with 2 where it could not ask. A proxy that answers for the index
# with 403 or 404 reads to uv like an index that lacks the package, and so does UV_OFFLINE.
NOT_ASKED = 2
NO_ANSWER = re.compile(r"not found in the package registry|network was disabled|not found in the cache")


class IndexUnreachable(ImageFailed):
    """No index answered; whether the requirements agree is not known."""


def find_uv() -> str:
    """uv as it is installed beside this Python. Raises ImageFailed where it is not."""
    path = Path(sysconfig.get_path("scripts")) / "uv"
    if not path.is_file():
        raise ImageFailed(f"{path} is not there: uv resolves the locks and comes with the tests' tools: make setup")
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
    """Name -> row. `kept`: rows whose versions stay where they can; `agreeing`: rows whose versions hold for what is found, too;
    `overrides`: requirements in place of what any package asks for; `index`: the one to ask, instead of the user's own;
    `alone`: nothing that the requirements need. Raises ImageFailed with what uv said, IndexUnreachable where it could not ask."""
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
        kind = IndexUnreachable if done.returncode == NOT_ASKED or NO_ANSWER.search(done.stderr) else ImageFailed
        raise kind(f"uv did not resolve {', '.join(wanted)} for {platform}:\n{done.stderr.strip()}")
    return read_answer(text, wanted, platform)


def read_answer(text: str, wanted: tuple[str, ...], platform: str) -> dict[str, str]:
    """The rows of uv's answer, which must be a lock of at least what was asked for."""
    rows, rest = cut(text), REST.search(ROW.sub("", text))
    missing = [name for name in map(name_of, wanted) if name not in rows]
    if rest or missing:
        fault = f"is no lock with hashes, at: {rest.group()[:100]}" if rest else f"lacks {', '.join(missing)}"
        raise ImageFailed(f"uv's answer for {platform} {fault}; it must be uv as make setup brings it, with no UV_FIND_LINKS")
    return rows


def read_lock(path: Path) -> dict[str, str]:
    """The rows of a lock; none where there is no such file."""
    return cut(path.read_text(encoding="utf-8")) if path.is_file() else {}


def cut(text: str) -> dict[str, str]:
    """Name -> row of a lock's text."""
    return {plain(match["name"]): match.group() for match in ROW.finditer(text)}


def join(rows: Mapping[str, str]) -> str:
    """The text of a lock, in the order of the names."""
    return "".join(rows[name] for name in sorted(rows))


def version_of(row: str) -> str:
    return row.split("==", 1)[1].split()[0]


def name_of(requirement: str) -> str:
    """`types-pyyaml` of `types_PyYAML>=6 ; python_version < '4'`."""
    return plain(re.split(r"[<>=!~ ;\[]", requirement)[0])


def plain(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return SEPARATORS.sub("-", name).lower()
