"""`image refresh`: the only code that looks anything up. Resolves every lock with uv, asks the registries for the bases' digests.

What is asked for comes from two places: the versions of a row of images/versions.yaml, and pyproject.toml for all else. A lock that
is there already is what uv prefers, so that a refresh changes only what has to change. All is resolved first and written then.

A torch with a local version (2.13.0+cpu) is only on PyTorch's own index. Its row is asked there alone, and kept as it is where that
index cannot be reached; the other packages are resolved without it, beside what torch itself asks for.
"""

import re
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ImageFailed
from launcher.image import BUILD_LOCK, UNPINNED, VERSIONS_FILE, Stack, find_stack, load_stacks, torch_lock

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
HEADER = "# Written by: omnilaunch image refresh. Do not edit.\n"
ALONE = f"""# A local wheel with the same hash serves as well as the index.
# Installed alone, with --no-deps: an index that cannot be reached then costs one look-up instead of one for every package.
--extra-index-url {TORCH_INDEX}
"""
BUILD_TOOLS = "setuptools>=77"
ACCELERATOR_LIBRARIES = ("nvidia-", "cuda-", "triton")
PYTHON = "3.11"
PLATFORM = "{}-manylinux_2_28"
BLOCK = re.compile(r"^(?P<name>[\w.-]+)==\S+ \\\n(?: {4}--hash=\S+(?: \\)?\n)+", re.MULTILINE)
NORMAL = re.compile(r"[-_.]+")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One lock to write: for which stacks and architecture, and the torch that is asked for there."""

    lock: str
    stacks: tuple[Stack, ...]
    architecture: str
    torch: str

    @property
    def alone(self) -> bool:
        """Whether torch has a lock of its own, installed before the rest."""
        return self.stacks[0].family != "cuda"

    @property
    def title(self) -> str:
        names = " and ".join(stack.name for stack in self.stacks)
        return f"Stack{'s' if len(self.stacks) > 1 else ''} {names}, {self.architecture}, CPython {self.stacks[0].python}"


def refresh(root: Path, *, stacks: tuple[str, ...], say: Say, upgrade: bool = False) -> tuple[Path, ...]:
    """Resolve again and write; the files written. `stacks`: rows to do, all of them and the launcher's own locks when empty.
    Raises ImageFailed with nothing written."""
    uv, table = find_uv(), load_stacks(root / "images")
    chosen = {name: find_stack(table, name) for name in stacks or table}
    written: dict[Path, str] = {} if stacks else own_locks(uv, root, upgrade)
    paths: dict[tuple[str, str], str] = {}
    for target in targets(chosen):
        found = resolve_target(uv, target, root, say, upgrade)
        written |= found
        paths |= {(stack.name, target.architecture): target.lock if found else "" for stack in target.stacks}
    found_digests = {base: look_up(base, known, say) for base, known in {stack.base: stack.digest for stack in chosen.values()}.items()}
    digests = {stack.name: found_digests[stack.base] for stack in chosen.values()}
    versions = root / "images" / VERSIONS_FILE
    written[versions] = rewrite_table(versions.read_text(encoding="utf-8"), table, digests, paths)
    changed = {path: text for path, text in written.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return tuple(changed)


def targets(stacks: dict[str, Stack]) -> tuple[Target, ...]:
    """The locks to write. Stacks that share a lock share its versions; one that has none yet is named after its sibling."""
    groups: dict[tuple[str, str], list[Stack]] = {}
    for stack in stacks.values():
        for architecture, lock in stack.locks.items():
            groups.setdefault((lock or new_lock(stack, architecture), architecture), []).append(stack)
    return tuple(
        Target(lock=lock, stacks=tuple(group), architecture=architecture, torch=torch_of(group[0], architecture))
        for (lock, architecture), group in groups.items()
    )


def new_lock(stack: Stack, architecture: str) -> str:
    for sibling, lock in stack.locks.items():
        if lock:
            return lock.replace(sibling, architecture)
    return f"locks/{stack.name}-{architecture}.txt"


def torch_of(stack: Stack, architecture: str) -> str:
    """The common index has torch for CUDA on x86_64; beside an NPU it is the one for the CPU."""
    return f"{stack.torch}+cpu" if stack.family == "ascend" and architecture == "x86_64" else stack.torch


# ------------------------------------------------------------------------------------------------------------- resolve


def resolve_target(uv: str, target: Target, root: Path, say: Say, upgrade: bool) -> dict[Path, str]:
    """Path -> text of one lock, and of torch's own; nothing where torch's hash is neither known nor to be had."""
    say(f"resolving {target.lock}")
    path, first = root / "images" / target.lock, target.stacks[0]
    wanted = [f"{name}=={version}" for name, version in first.packages.items()]
    wanted += [first.plugin.replace(" ", "==")] if first.plugin else []
    wanted += [need for need in needs(root, "trainer") if name_of(need) not in first.packages]
    local = "+" in target.torch
    blocks = resolve(
        uv,
        [*wanted, *(torch_needs(uv, target.torch) if local else (f"torch=={target.torch}",))],
        platform=PLATFORM.format(target.architecture),
        existing=path,
        upgrade=upgrade,
        without=("torch",) if local else (),
    )
    if local:
        torch = local_torch(uv, target, torch_lock(path), say)
        if not torch:
            return {}
        blocks["torch"] = torch
    head = f"{HEADER}# {target.title}: the trainer's packages."
    if not target.alone:
        return {path: f"{head}\n{joined(blocks)}"}
    return {
        path: f"{head} torch comes first and alone, from {torch_lock(path).name}.\n{joined(blocks)}",
        torch_lock(path): f"{HEADER}# {target.title}: torch.\n{ALONE if local else ''}{blocks['torch']}",
    }


def local_torch(uv: str, target: Target, known: Path, say: Say) -> str:
    """torch's row with its hashes, from PyTorch's index, or as it is known; '' where it is neither."""
    platform = PLATFORM.format(target.architecture)
    try:
        return resolve(uv, [f"torch=={target.torch}"], platform=platform, index=TORCH_INDEX, alone=True)["torch"]
    except ImageFailed:
        blocks = cut(known.read_text(encoding="utf-8")) if known.is_file() else {}
        kept = blocks.get("torch", "")
        if kept.startswith(f"torch=={target.torch} "):
            say(f"  torch {target.torch}: {TORCH_INDEX} did not answer, its row is kept")
            return kept
        say(f"  torch {target.torch}: {TORCH_INDEX} did not answer, so {target.lock} was not resolved")
        return ""


def torch_needs(uv: str, version: str) -> tuple[str, ...]:
    """Names of what torch itself asks for, beside no accelerator."""
    found = resolve(uv, [f"torch=={version.split('+')[0]}"], platform=PLATFORM.format("aarch64"))
    return tuple(name for name in found if name != "torch" and not name.startswith(ACCELERATOR_LIBRARIES))


def own_locks(uv: str, root: Path, upgrade: bool) -> dict[Path, str]:
    """What builds, the launcher, and what the tests need besides, in agreement with the trainer's CPU lock."""
    locks = root / "images" / "locks"
    cpu, platform = locks / "cpu-x86_64.txt", PLATFORM.format("x86_64")
    build = resolve(uv, [BUILD_TOOLS], platform=platform, existing=locks / BUILD_LOCK, upgrade=upgrade)
    launcher = resolve(uv, needs(root, ""), platform=platform, existing=locks / "launcher.txt", constraints=(cpu,), upgrade=upgrade)
    both = cut(cpu.read_text(encoding="utf-8")) | launcher
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as folder:
        agreed = Path(folder) / "agreed.txt"
        agreed.write_text(joined(both), encoding="utf-8")
        tests = resolve(uv, needs(root, "dev"), platform=platform, existing=locks / "dev.txt", constraints=(agreed,), upgrade=upgrade)
    return {
        locks
        / BUILD_LOCK: f"{HEADER}# What builds the source distributions among the locked packages; installed before them.\n{joined(build)}",
        locks
        / "launcher.txt": f"{HEADER}# The launcher's packages, CPython {PYTHON}, in agreement with the trainer's CPU lock.\n{joined(launcher)}",
        locks / "dev.txt": f"{HEADER}# What the tests need besides, CPython {PYTHON}, in agreement with both other locks.\n{joined(tests)}",
    }


def needs(root: Path, extra: str) -> list[str]:
    """Requirements of pyproject.toml: of the launcher, or of one of its extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][extra] if extra else project["dependencies"])


def name_of(requirement: str) -> str:
    return NORMAL.sub("-", re.split(r"[<>=!~ ;\[]", requirement)[0]).lower()


def resolve(
    uv: str,
    requirements: Iterable[str],
    *,
    platform: str,
    existing: Path | None = None,
    constraints: tuple[Path, ...] = (),
    without: tuple[str, ...] = (),
    index: str = "",
    alone: bool = False,
    upgrade: bool = False,
) -> dict[str, str]:
    """Name -> its row with every hash. `existing`: a lock whose versions are kept where they can be; `without`: packages that are
    left out with their needs; `alone`: no dependencies. Raises ImageFailed with what uv said."""
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as name:
        folder = Path(name)
        (folder / "wanted.in").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (folder / "without.in").write_text("".join(f"{package}; python_version < '0'\n" for package in without), encoding="utf-8")
        output = folder / "lock.txt"
        output.write_text(joined(cut(existing.read_text(encoding="utf-8"))) if existing and existing.is_file() else "", encoding="utf-8")
        command = (
            uv, "pip", "compile", str(folder / "wanted.in"), "--output-file", str(output), "--quiet", "--generate-hashes", "--no-header",
            "--no-annotate", "--no-config", "--python-version", PYTHON, "--python-platform", platform,
            *(part for path in constraints for part in ("--constraints", str(path))),
            *(("--overrides", str(folder / "without.in")) if without else ()),
            *(("--default-index", index) if index else ()), *(("--no-deps",) if alone else ()), *(("--upgrade",) if upgrade else ()),
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ImageFailed(f"uv did not resolve {', '.join(requirements)} for {platform}:\n{done.stderr.strip()}")
        return cut(output.read_text(encoding="utf-8"))


def find_uv() -> str:
    """uv as it is installed beside this Python."""
    path = Path(sysconfig.get_path("scripts")) / "uv"
    if not path.is_file():
        raise ImageFailed(f"{path} is not there: uv resolves the locks and comes with the tests' tools: make setup")
    return str(path)


def cut(text: str) -> dict[str, str]:
    """Name -> block of a lock, in the order of the names."""
    return {NORMAL.sub("-", match["name"]).lower(): match.group() for match in BLOCK.finditer(text)}


def joined(blocks: dict[str, str]) -> str:
    return "".join(blocks[name] for name in sorted(blocks))


# --------------------------------------------------------------------------------------------------------------- table


def look_up(base: str, known: str, say: Say) -> str:
    """The digest of a base image, from its registry through the engine; `known` where that cannot be asked."""
    import docker

    try:
        with closing(docker.from_env()) as engine:
            return str(engine.images.get_registry_data(base).id)
    except docker.errors.DockerException as error:
        reason = getattr(error, "explanation", None) or str(error)
        say(f"  {base}: its registry gave no digest, {known!r} is kept: {reason}")
        return known


def rewrite_table(text: str, table: dict[str, Stack], digests: dict[str, str], paths: dict[tuple[str, str], str]) -> str:
    """versions.yaml with its comments, only digests and paths of locks changed."""
    lines, stack = [], ""
    for line in text.splitlines():
        if head := re.match(r"^  ([\w.-]+):$", line):
            stack = head[1]
        elif stack in digests and line.startswith("    digest: "):
            line = f"    digest: {digests[stack] or UNPINNED}"
        elif stack in digests and line.startswith("    locks: {"):
            locks = {architecture: paths[stack, architecture] for architecture in table[stack].locks}
            line = f"    locks: {{{', '.join(f'{name}: {path or repr(str())}' for name, path in locks.items())}}}"
        lines.append(line)
    return "\n".join(lines) + "\n"
