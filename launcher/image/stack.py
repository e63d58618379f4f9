"""The stacks of images/versions.yaml, and the one image that belongs to a stack, an architecture and the trainer's source. Writes nothing.

The fingerprint covers everything that the build reads: Dockerfile, entrypoint, locks, trainer. The git commit is not part of it, but a label
that is set when the image is built, so that a commit which changes none of these files rebuilds nothing.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from launcher.errors import ImageFailed, suggest
from trainer.contract import SCHEMA, SpecError, decode

VERSIONS_FILE = "versions.yaml"
UNPINNED = "unpinned"
REPOSITORY = "omnilaunch"
LABEL = "io.omnilaunch."

ENTRYPOINT = "entrypoint.sh"
OPERATORS = "operators.py"
SELFTEST = "selftest.py"
LATER_COLUMNS = {"system_packages", "image_gib"}
EARLIER_COLUMNS = Path(__file__).with_name("earlier_columns.yaml")
TRAINER_FILES = ("*.py", "*.html", "*.toml")  # page.html is served by stage serve
BUILD_LOCK = "build.txt"
LOCK = "lock.txt"
TORCH_LOCK = "torch.txt"
SYSTEM_TEMPLATE = "system.Dockerfile.j2"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One row of the table: versions that belong together. `system_packages`: stage of the Dockerfile -> Debian packages; `image_gib`:
    disk space for the unpacked image; `locks`: host architecture -> file below images/, '' = not resolved yet."""

    name: str
    title: str
    family: Literal["cpu", "cuda", "ascend"]
    base: str
    digest: str
    python: str
    torch: str
    plugin: str
    toolkit: str
    driver_kind: Literal["none", "nvidia", "hdk"]
    driver_minimum: str
    driver_maximum: str
    chip_architectures: tuple[str, ...]
    system_packages: dict[str, tuple[str, ...]]
    image_gib: int
    packages: dict[str, str]
    locks: dict[str, str]
    licence: str
    support: dict[str, str]
    sources: dict[str, str]

    @property
    def host_architectures(self) -> tuple[str, ...]:
        return tuple(self.locks)

    def covers(self, chip: str) -> bool:
        """Whether the stack holds code that runs on `chip`: code for sm_XY runs on every sm_XZ with Z >= Y of the same major version
        (NVIDIA, CUDA binary compatibility); other names must be equal."""
        return chip in self.chip_architectures or any(binary_compatible(compiled, chip) for compiled in self.chip_architectures)


def binary_compatible(compiled: str, chip: str) -> bool:
    """Whether a cubin for `compiled` (sm_60) runs on `chip` (sm_61)."""
    names = (compiled, chip)
    if not all(name.startswith("sm_") and name[3:].isdigit() for name in names):
        return False
    (major, minor), (chip_major, chip_minor) = (divmod(int(name[3:]), 10) for name in names)
    return major == chip_major and minor <= chip_minor


@dataclass(frozen=True, kw_only=True)
class Image:
    """What `docker build` needs. `files`: path in the build context -> sha256; `lock`: below images/, '' = not resolved yet; `tag`: with
    the repository, `omnilaunch:<stack>-<fingerprint[:12]>`."""

    stack: str
    architecture: str
    base: str
    dockerfile: str
    files: dict[str, str]
    lock: str
    licence: str
    fingerprint: str
    tag: str
    labels: dict[str, str]


def load_stacks(images: Path) -> dict[str, Stack]:
    """Read images/versions.yaml. Raises ImageFailed naming file and key, also for a lock that does not exist."""
    path = images / VERSIONS_FILE
    try:
        stacks = read_table(path.read_bytes(), path)
    except OSError as error:
        raise ImageFailed(f"{path}: cannot be read: {error}") from error
    for stack in stacks.values():
        for architecture, lock in stack.locks.items():
            if lock and not (images / lock).is_file():
                raise ImageFailed(
                    f"{path}, key stacks.{stack.name}.locks.{architecture}: the file {lock} does not exist; write it with: omnilaunch image refresh"
                )
    return stacks


def read_table(text: str | bytes, path: Path) -> dict[str, Stack]:
    """The rows of versions.yaml, whose locks need not exist yet. `path` is for the error. Raises ImageFailed."""
    import yaml

    try:
        rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stacks"]
        if any(not row.keys() >= LATER_COLUMNS for row in rows.values()):  # the table of an earlier commit
            earlier = yaml.safe_load(EARLIER_COLUMNS.read_bytes())
            rows = {name: {**earlier.get(row.get("family"), {}), **row} for name, row in rows.items()}
        return {name: decode(Stack, {"name": name, **row}, f"stacks.{name}") for name, row in rows.items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, SpecError) as error:
        raise ImageFailed(f"{path}: cannot be read as a table of stacks: {error}") from error


def find_stack(stacks: dict[str, Stack], name: str) -> Stack:
    if name not in stacks:
        raise ImageFailed(f"unknown stack {name!r} (images/{VERSIONS_FILE}); {suggest(name, stacks)}")
    return stacks[name]


def render(stack: Stack, *, architecture: str, root: Path, base: str = "") -> Image:
    """The image of a stack for one host architecture. `base` replaces the stack's base image. Reads files below `root`, writes none.
    Raises ImageFailed if the stack has no such architecture, or a file is missing."""
    if architecture not in stack.locks:
        raise ImageFailed(
            f"stack {stack.name} has no {architecture} image (images/{VERSIONS_FILE}, key stacks.{stack.name}.locks); "
            f"it has: {', '.join(stack.host_architectures)}"
        )
    dockerfile = draw(stack, root, base=base)
    lock = stack.locks[architecture]
    files = {name: digest(path) for name, path in context_files(root, lock).items()}
    digests = {"Dockerfile": text_digest(dockerfile), "architecture": architecture, **files}
    fingerprint = text_digest("".join(f"{name}\0{value}\n" for name, value in sorted(digests.items())))
    return Image(
        stack=stack.name,
        architecture=architecture,
        base=base or pinned(stack),
        dockerfile=dockerfile,
        files=files,
        lock=lock,
        licence=stack.licence,
        fingerprint=fingerprint,
        tag=f"{REPOSITORY}:{stack.name}-{fingerprint[:12]}",
        labels={
            f"{LABEL}fingerprint": fingerprint,
            f"{LABEL}architecture": architecture,
            f"{LABEL}lock": files.get(LOCK, ""),
            f"{LABEL}base": base,  # '' = the stack's own
        },
    )


def draw(stack: Stack, root: Path, *, base: str = "", template: str = "") -> str:
    """The Dockerfile: `template` (of the family when omitted), filled from the row. SYSTEM_TEMPLATE downloads the system packages, for a wheelhouse."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(root / "images")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template(template or f"{stack.family}.Dockerfile.j2").render(
        stack=stack, base=base or pinned(stack), base_given=bool(base), labels=common_labels(stack), system=stack.system_packages
    )


def pinned(stack: Stack) -> str:
    """The base image for FROM: with its digest if that is known."""
    return stack.base if stack.digest == UNPINNED else f"{stack.base}@{stack.digest}"


def common_labels(stack: Stack) -> dict[str, str]:
    """The labels that do not depend on architecture and commit. `docker inspect` shows them."""
    plugin = dict([stack.plugin.split()]) if stack.plugin else {}
    versions = {"python": stack.python, "torch": stack.torch, **stack.packages, **plugin}
    return {
        "org.opencontainers.image.title": f"{REPOSITORY} {stack.name}",
        "org.opencontainers.image.description": stack.title,
        f"{LABEL}stack": stack.name,
        f"{LABEL}toolkit": stack.toolkit or "none",
        f"{LABEL}contract": str(SCHEMA),
        **{f"{LABEL}{name}": version for name, version in sorted(versions.items())},
    }


def context_files(root: Path, lock: str) -> dict[str, Path]:
    """Path in the build context -> file. Only files that the image holds, so that a README or a test changes no fingerprint."""
    images, trainer = root / "images", root / "trainer"
    files = {name: images / name for name in (ENTRYPOINT, OPERATORS, SELFTEST)} | {BUILD_LOCK: images / "locks" / BUILD_LOCK}
    if lock:
        torch = torch_lock(images / lock)
        files |= {LOCK: images / lock, **({TORCH_LOCK: torch} if torch.is_file() else {})}
    found = sorted(path for pattern in TRAINER_FILES for path in trainer.rglob(pattern))
    return files | {f"trainer/{path.relative_to(trainer).as_posix()}": path for path in found}


def torch_lock(lock: Path) -> Path:
    """The lock of torch alone, next to the lock of all packages, for a torch that has an index of its own. If that index cannot be
    reached, pip then tries it for one package and not for every package."""
    return lock.with_name(f"{lock.stem}.torch.txt")


def digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ImageFailed(f"{path}: needed for the image, but cannot be read: {error}") from error


def text_digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
