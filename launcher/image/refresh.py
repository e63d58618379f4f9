"""`omnilaunch image refresh`: the only command that looks versions up. Resolves every lock with uv, and asks the registries for the digests
of the base images.

The requirements are the versions of a row of images/versions.yaml, and pyproject.toml for everything else. uv prefers the versions of an
existing lock, so that a refresh changes only what has to change. All locks are resolved before the first is written.

A torch with a local version (2.13.0+cpu) exists only on PyTorch's own index. Its row is resolved there alone, and kept if that index does
not answer. The other packages are resolved with the torch of the same version on the common index, without its accelerator libraries.
"""

import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ImageFailed
from launcher.image.lock import join, name_of, read_lock, split_rows, version_of
from launcher.image.registry import tag_digest
from launcher.image.resolver import NEVER, IndexUnreachable, find_uv, resolve
from launcher.image.stack import BUILD_LOCK, UNPINNED, VERSIONS_FILE, Stack, find_stack, read_table, torch_lock

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
HEADER = "# Written by: omnilaunch image refresh. Do not edit.\n"
ALONE = f"""# A local wheel with the same hash serves as well as the index.
# Installed alone, with --no-deps: an index that cannot be reached then costs one look-up instead of one for every package.
--extra-index-url {TORCH_INDEX}
"""
OWN_HEADS = {
    BUILD_LOCK: "# What builds the source distributions among the locked packages; installed before them.\n",
    "launcher.txt": "# The launcher's packages, CPython {python}, in agreement with the trainer's CPU lock.\n",
    "dev.txt": "# What the tests need in addition, CPython {python}, in agreement with both other locks.\n",
}
BUILD_TOOLS = "setuptools>=77"
# The stack and architecture of the environment that `make setup` installs: launcher, trainer and tests together.
SETUP_STACK, SETUP_ARCHITECTURE = "cpu", "x86_64"
ACCELERATOR_LIBRARIES = ("nvidia-", "cuda-", "triton")
PLATFORM = "{}-manylinux_2_28"  # the glibc that most wheels need; the oldest base, Ubuntu 22.04, has 2.35

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LockTarget:
    """One lock to write: its path below images/, its stacks and architecture, and the version of torch in it."""

    lock: str
    stacks: tuple[Stack, ...]
    architecture: str
    torch: str

    @property
    def platform(self) -> str:
        return PLATFORM.format(self.architecture)

    @property
    def python(self) -> str:
        return self.stacks[0].python

    @property
    def alone(self) -> bool:
        """Whether torch has a lock of its own, which is installed first."""
        return self.stacks[0].family != "cuda"

    @property
    def title(self) -> str:
        names = " and ".join(stack.name for stack in self.stacks)
        return f"Stack{'s' if len(self.stacks) > 1 else ''} {names}, {self.architecture}, CPython {self.python}"


def refresh(root: Path, *, stacks: tuple[str, ...], say: Say, upgrade: bool = False) -> tuple[Path, ...]:
    """Resolve and write the locks; return the files that changed. `stacks`: the rows to resolve, all if empty; the locks of the launcher
    and of the tests belong to the CPU's row. `upgrade`: take the newest version of everything that no row pins. When it raises
    ImageFailed, no file has been changed."""
    uv, images = find_uv(), root / "images"
    versions = images / VERSIONS_FILE
    before = versions.read_text(encoding="utf-8")
    table = read_table(before, versions)
    chosen = {name: find_stack(table, name) for name in stacks or table}
    found: dict[Path, str] = {}
    renewed = dict(table)
    for target in targets(table):
        if any(stack.name in chosen for stack in target.stacks):
            texts = resolve_target(uv, target, root, say, upgrade)
            found |= texts
            for stack in target.stacks:
                locks = {**renewed[stack.name].locks, target.architecture: target.lock if texts else ""}
                renewed[stack.name] = replace(renewed[stack.name], locks=locks)
    if SETUP_STACK in chosen:
        found |= own_locks(uv, root, renewed[SETUP_STACK], found, say, upgrade)
    digests = {base: look_up(base, known, say) for base, known in {stack.base: stack.digest for stack in chosen.values()}.items()}
    renewed |= {name: replace(renewed[name], digest=digests[stack.base]) for name, stack in chosen.items()}
    found[versions] = rewrite_table(before, renewed, versions)
    return write_all(found)


def targets(table: dict[str, Stack]) -> tuple[LockTarget, ...]:
    """The locks of the table. A new lock is named after the lock of another architecture. Raises ImageFailed for stacks that share a
    lock and differ in its versions."""
    groups: dict[tuple[str, str], list[Stack]] = {}
    for stack in table.values():
        for architecture, lock in stack.locks.items():
            groups.setdefault((lock or new_lock(stack, architecture), architecture), []).append(stack)
    for (lock, architecture), group in groups.items():
        if len({(*pins(stack, architecture), stack.python, stack.family) for stack in group}) > 1:
            names = " and ".join(f"stacks.{stack.name}" for stack in group)
            raise ImageFailed(f"images/{VERSIONS_FILE}: {names} share {lock} and differ in its versions; give each a file of its own")
    return tuple(
        LockTarget(lock=lock, stacks=tuple(group), architecture=architecture, torch=torch_of(group[0], architecture))
        for (lock, architecture), group in groups.items()
    )


def new_lock(stack: Stack, architecture: str) -> str:
    for sibling, lock in stack.locks.items():
        if lock:
            return lock.replace(sibling, architecture)
    return f"locks/{stack.name}-{architecture}.txt"


def torch_of(stack: Stack, architecture: str) -> str:
    """The torch of the common index is for CUDA on x86_64; with an NPU the one for the CPU is used."""
    return f"{stack.torch}+cpu" if stack.family == "ascend" and architecture == "x86_64" else stack.torch


def pins(stack: Stack, architecture: str) -> tuple[str, ...]:
    """The versions of the row as requirements, torch last."""
    plugin = (stack.plugin.replace(" ", "=="),) if stack.plugin else ()
    return (*(f"{name}=={version}" for name, version in stack.packages.items()), *plugin, f"torch=={torch_of(stack, architecture)}")


def needs(root: Path, extra: str) -> list[str]:
    """Requirements of pyproject.toml: of the launcher if `extra` is empty, else of that extra."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][extra] if extra else project["dependencies"])


# ------------------------------------------------------------------------------------------------------------- resolve


def resolve_target(uv: str, target: LockTarget, root: Path, say: Say, upgrade: bool) -> dict[Path, str]:
    """Path -> text of one lock and of its lock of torch; {} if torch's row is neither known nor available."""
    say(f"resolving {target.lock}")
    path, first = root / "images" / target.lock, target.stacks[0]
    known = read_lock(path) | read_lock(torch_lock(path))
    *pinned, torch = pins(first, target.architecture)
    public, local = torch.partition("+")[::2]
    torch_row = local_torch(uv, target, known.get("torch", ""), say) if local else ""
    if local and not torch_row:
        return {}
    named = {name_of(need) for need in pinned}
    rows = resolve(
        uv,
        [*pinned, *(need for need in needs(root, "trainer") if name_of(need) not in named), public],
        python=target.python,
        platform=target.platform,
        kept={} if upgrade else {name: row for name, row in known.items() if name != "torch"},
        overrides=without_accelerator(uv, public, target) if local else (),
    )
    rows |= {"torch": torch_row} if local else {}
    say_changes(known, rows, say)
    head = f"{HEADER}# {target.title}: the trainer's packages."
    if not target.alone:
        return {path: f"{head}\n{join(rows)}"}
    return {
        path: f"{head} torch comes first and alone, from {torch_lock(path).name}.\n{join(rows)}",
        torch_lock(path): f"{HEADER}# {target.title}: torch.\n{ALONE if local else ''}{rows['torch']}",
    }


def local_torch(uv: str, target: LockTarget, known: str, say: Say) -> str:
    """torch's row with its hashes from PyTorch's index; `known` if that does not answer, '' if nothing is known. Raises ImageFailed if the
    index has no such torch, or if the existing lock is for another version and would be lost."""
    wanted = f"torch=={target.torch}"
    try:
        return resolve(uv, [wanted], python=target.python, platform=target.platform, index=TORCH_INDEX, alone=True)["torch"]
    except IndexUnreachable as error:
        if known.startswith(f"{wanted} "):
            say(f"  {wanted}: {TORCH_INDEX} did not answer, its row is kept")
            return known
        if known:
            raise ImageFailed(
                f"{wanted} (images/{VERSIONS_FILE}, key stacks.{target.stacks[0].name}.torch): {TORCH_INDEX} did not answer, and "
                f"images/{target.lock} is for torch {version_of(known)}; refresh where that index can be reached\n{error}"
            ) from error
        say(f"  {wanted}: {TORCH_INDEX} did not answer, so {target.lock} was not resolved")
        return ""


def without_accelerator(uv: str, torch: str, target: LockTarget) -> tuple[str, ...]:
    """uv overrides with which `torch` of the common index replaces the CPU build: every package accepts it, and its accelerator
    libraries are left out."""
    packages = resolve(uv, [torch], python=target.python, platform=target.platform)
    return (torch, *(f"{name} ; {NEVER}" for name in packages if name.startswith(ACCELERATOR_LIBRARIES)))


def own_locks(uv: str, root: Path, stack: Stack, found: dict[Path, str], say: Say, upgrade: bool) -> dict[Path, str]:
    """The locks of the build tools, the launcher and the tests, in agreement with `stack`'s lock in `found`."""
    locks, platform = root / "images" / "locks", PLATFORM.format(SETUP_ARCHITECTURE)
    agreeing = split_rows(found.get(root / "images" / stack.locks[SETUP_ARCHITECTURE], ""))
    texts = {}
    for name, wanted in ((BUILD_LOCK, [BUILD_TOOLS]), ("launcher.txt", needs(root, "")), ("dev.txt", needs(root, "dev"))):
        say(f"resolving locks/{name}")
        known = read_lock(locks / name)
        rows = resolve(uv, wanted, python=stack.python, platform=platform, kept={} if upgrade else known, agreeing=agreeing)
        agreeing |= rows
        say_changes(known, rows, say)
        texts[locks / name] = f"{HEADER}{OWN_HEADS[name].format(python=stack.python)}{join(rows)}"
    return texts


def say_changes(before: dict[str, str], after: dict[str, str], say: Say) -> None:
    """One line for each package that was added, removed or changed its version."""
    for name in sorted(before.keys() | after.keys()):
        old, new = (version_of(rows[name]) if name in rows else "none" for rows in (before, after))
        if old != new:
            say(f"  {name}: {old} -> {new}")


# --------------------------------------------------------------------------------------------------------------- table


def look_up(base: str, known: str, say: Say) -> str:
    """The digest that a base image has in its registry now; `known` when the registry does not answer."""
    try:
        return tag_digest(base)
    except OSError as error:
        say(f"  {base}: its registry gave no digest, {known!r} is kept: {error}")
        return known


def rewrite_table(text: str, table: dict[str, Stack], path: Path) -> str:
    """versions.yaml with its comments and with the digests and lock paths of `table`. Raises ImageFailed for a layout in which they
    cannot be replaced."""
    lines, stack = [], ""
    for line in text.splitlines():
        if head := re.match(r"  ([\w.-]+):$", line):
            stack = head[1]
        elif stack in table and (found := re.fullmatch(r"(    digest: )\S+(.*)", line)):
            line = f"{found[1]}{table[stack].digest or UNPINNED}{found[2]}"
        elif stack in table and (found := re.fullmatch(r"(    locks: )\{.*?\}(.*)", line)):
            pairs = (f"{architecture}: {lock or repr('')}" for architecture, lock in table[stack].locks.items())
            line = f"{found[1]}{{{', '.join(pairs)}}}{found[2]}"
        lines.append(line)
    written = "\n".join(lines) + "\n"
    if wrong := [name for name, stack in read_table(written, path).items() if stack != table.get(name)]:
        keys = ", ".join(f"stacks.{name}" for name in wrong)
        raise ImageFailed(f"{path}, {keys}: to be rewritten, digest and locks must each be on a line of their own, as in the other rows")
    return written


def write_all(texts: dict[Path, str]) -> tuple[Path, ...]:
    """Write the files that differ, all to temporary names first and then renamed; return their paths. Raises ImageFailed."""
    changed = tuple(path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text)
    temporary = {path: path.with_name(f".{path.name}.new") for path in changed}
    try:
        for path, new in temporary.items():
            new.write_text(texts[path], encoding="utf-8")
    except OSError as error:
        for new in temporary.values():
            with suppress(OSError):
                new.unlink(missing_ok=True)
        raise ImageFailed(f"{path}: cannot be written: {error.strerror}; no file was changed") from error
    for path, new in temporary.items():
        new.replace(path)
    return changed
