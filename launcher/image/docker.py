"""The Docker engine of this machine: whether it can build, which of our images it has, and what is in them.

Facts come from the engine's own API (the docker package); a build needs a client that speaks BuildKit, which is looked for on PATH.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import ImageFailed
from launcher.image.stack import LABEL, Image

if TYPE_CHECKING:
    from docker import DockerClient

OLDEST_ENGINE = (20, 10)  # the first whose BuildKit reads RUN --mount without a frontend to pull
SEPARATE_BUILDKIT = 23  # from this client on BuildKit is a plugin, buildx; before, it is built in
# As the engine names an architecture -> as `uname -m` does.
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, kw_only=True)
class DockerCommand:
    """A docker command line that can do BuildKit builds, and the engine behind it. `architecture` as `uname -m` prints it."""

    path: str
    version: str
    engine_version: str
    architecture: str


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """One of our images as the engine has it. `size_bytes` unpacked, `layers` (bytes, what made it) newest first."""

    id: str
    tags: tuple[str, ...]
    created: str
    architecture: str
    user: str
    size_bytes: int
    labels: dict[str, str]
    layers: tuple[tuple[int, str], ...] = ()

    @property
    def name(self) -> str:
        return self.tags[0] if self.tags else self.id


# --------------------------------------------------------------------------------------------------- engine and client


@contextmanager
def connect() -> Iterator["DockerClient"]:
    """The engine's API. Raises ImageFailed with the fix when it does not answer, or breaks off."""
    import docker

    try:
        with closing(docker.from_env(timeout=120)) as engine:
            engine.ping()
            yield engine
    except docker.errors.DockerException as error:
        raise ImageFailed(unanswered(error)) from error


def unanswered(error: Exception) -> str:
    denied = "Permission denied" in str(error)
    fix = "add yourself to the group docker, or use sudo" if denied else "start it: systemctl start docker, or dockerd"
    return f"the Docker engine does not answer ({error}): {fix}. To run without containers: cluster.runtime=process"


def find_client(environ: Mapping[str, str]) -> DockerCommand:
    """The first docker client on PATH that can build with BuildKit, and the engine behind it. Raises ImageFailed saying what is
    missing, and the fix."""
    paths = [path for folder in environ.get("PATH", "").split(":") if (path := shutil.which("docker", path=folder))]
    if not paths:
        raise ImageFailed(
            "there is no docker client on PATH. On Debian: apt-get install docker.io; to run without containers: cluster.runtime=process"
        )
    with connect() as engine:
        facts = engine.version()
    return choose_client(tuple(dict.fromkeys(paths)), str(facts["Version"]), str(facts["Arch"]))


def choose_client(paths: tuple[str, ...], engine: str, architecture: str) -> DockerCommand:
    """Raises ImageFailed when the engine is too old, or no client of `paths` speaks BuildKit."""
    if version_of(engine) < OLDEST_ENGINE:
        raise ImageFailed(
            f"the Docker engine is {engine}; BuildKit with mounts and secrets needs {OLDEST_ENGINE[0]}.{OLDEST_ENGINE[1]} or newer: upgrade it"
        )
    refused = []
    for path in paths:
        version = answer((path, "version", "--format", "{{.Client.Version}}"))
        if (0,) < version_of(version) < (SEPARATE_BUILDKIT,) or answer((path, "buildx", "version")):
            return DockerCommand(path=path, version=version, engine_version=engine, architecture=ARCHITECTURES.get(architecture, architecture))
        refused.append(f"{path} ({version or 'no answer'})")
    raise ImageFailed(
        f"no docker client here can do BuildKit builds: {', '.join(refused)} without the buildx plugin. "
        "Install the plugin (package docker-buildx-plugin or docker-buildx), or Debian's docker.io, whose client has BuildKit built in"
    )


def answer(command: tuple[str, ...]) -> str:
    """Standard output of a command, '' when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(text: str) -> tuple[int, ...]:
    """(20, 10, 24) of `20.10.24+dfsg1`."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# --------------------------------------------------------------------------------------------------------------- images


def find(image: Image) -> str | None:
    """The id of the engine's image with this tag and this whole fingerprint; None when there is none."""
    import docker

    with connect() as engine:
        try:
            there = engine.images.get(image.tag)
        except docker.errors.ImageNotFound:
            return None
        return str(there.id) if there.labels.get(f"{LABEL}fingerprint") == image.fingerprint else None


def inspect(name: str) -> BuiltImage:
    """Everything about one image, by tag or id. Raises ImageFailed when the engine has none, or it is none of ours."""
    import docker

    with connect() as engine:
        try:
            there = engine.images.get(name)
        except docker.errors.ImageNotFound as error:
            raise ImageFailed(f"the engine has no image {name}; those it has: omnilaunch image ls") from error
        layers = tuple((int(layer["Size"]), str(layer["CreatedBy"])) for layer in there.history())
        found = described(there, layers)
    if f"{LABEL}fingerprint" not in found.labels:
        raise ImageFailed(f"{name} was not built by omnilaunch: it has no label {LABEL}fingerprint")
    return found


def built_images() -> tuple[BuiltImage, ...]:
    """All images that were built from here or by another omnilaunch, newest first."""
    with connect() as engine:
        found = [described(image, ()) for image in engine.images.list(filters={"label": f"{LABEL}fingerprint"})]
    return tuple(sorted(found, key=lambda image: image.created, reverse=True))


def described(image: Any, layers: tuple[tuple[int, str], ...]) -> BuiltImage:
    facts = image.attrs
    return BuiltImage(
        id=image.id,
        tags=tuple(image.tags),
        created=facts["Created"][:19],
        architecture=ARCHITECTURES.get(facts["Architecture"], facts["Architecture"]),
        user=facts["Config"].get("User", ""),
        size_bytes=facts["Size"],
        labels=dict(image.labels),
        layers=layers,
    )


def used_images() -> frozenset[str]:
    """Ids of the images that a container, running or not, was made from."""
    with connect() as engine:
        return frozenset(container.attrs["ImageID"] for container in engine.containers.list(all=True, sparse=True))


def remove(image: BuiltImage) -> None:
    """Take an image's tags away, and with them the layers that no other image has. Raises ImageFailed when it is in use."""
    import docker

    with connect() as engine:
        for name in image.tags or (image.id,):
            try:
                engine.images.remove(name)
            except docker.errors.ImageNotFound:  # another omnilaunch was quicker
                continue
            except docker.errors.APIError as error:
                raise ImageFailed(f"{name} was not removed: {error.explanation}") from error


def surplus(images: tuple[BuiltImage, ...], *, wanted: frozenset[str], used: frozenset[str]) -> tuple[BuiltImage, ...]:
    """The images that nothing asks for: no container (`used`, ids), and neither the present tree nor a record (`wanted`, tags)."""
    return tuple(image for image in images if image.id not in used and not wanted.intersection(image.tags))
