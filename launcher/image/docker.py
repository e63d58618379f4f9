"""The Docker engine of this machine, asked through the docker command line: whether it can build, which of our images it has, what is in
them. Nodes are asked with the same command (`image_query`) and the answer is read by the same parser (`read_image`)."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.errors import ImageFailed
from launcher.image.stack import LABEL, Image

OLDEST_ENGINE = (20, 10)  # the first whose BuildKit supports RUN --mount without pulling a frontend
SEPARATE_BUILDKIT = 23  # from this client on BuildKit is a plugin, buildx; earlier clients have it built in
TIMEOUT_S = 120
NO_CLIENT = (
    "there is no docker client on PATH. On Debian: apt-get install docker.io. A run on the CPU needs no container: cluster.runtime=process"
)
# Name of an architecture in the engine -> in `uname -m`.
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
FINGERPRINT = f"{LABEL}fingerprint"
JSON = "{{json .}}"
# docker clients before 29, since 29 (docker/cli 9ba1314d3a writes it in lower case), and podman. "no such file or directory" and "no such
# host" mean that the engine did not answer.
ABSENT = re.compile(r"no such (object|container|image)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DockerCommand:
    """A docker client that can do BuildKit builds, and the architecture of its engine, as `uname -m` prints it."""

    path: str
    architecture: str


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image as an engine has it. `size_bytes`: unpacked; `layer_digests`: of the unpacked layers; `registry_digests`: NAME@sha256:... for
    each registry that has it; `layers`: (bytes, instruction), the newest first, only from `inspect`."""

    id: str
    tags: tuple[str, ...] = ()
    created: str = ""
    architecture: str = ""
    user: str = ""
    size_bytes: int = 0
    labels: Mapping[str, str]
    layer_digests: tuple[str, ...] = ()
    registry_digests: tuple[str, ...] = ()
    layers: tuple[tuple[int, str], ...] = ()

    @property
    def name(self) -> str:
        return self.tags[0] if self.tags else self.id

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the files that it was built from; '' for an image that omnilaunch did not build."""
        return self.labels.get(FINGERPRINT, "")


# --------------------------------------------------------------------------------------------------- engine and client


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the docker client. An error of the engine is in the result. Raises ImageFailed, with the fix, when there is no client or the
    engine does not answer."""
    try:
        done = subprocess.run(("docker", *arguments), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise ImageFailed(NO_CLIENT) from error
    except subprocess.TimeoutExpired as error:
        raise ImageFailed(unanswered(f"no answer within {TIMEOUT_S} s")) from error
    if done.returncode and not is_absent(done.stderr) and "response from daemon" not in done.stderr:
        raise ImageFailed(unanswered(done.stderr.strip()))
    return done


def unanswered(reason: str) -> str:
    denied = "permission denied" in reason.lower()
    fix = "add yourself to the group docker, or use sudo" if denied else "start it: systemctl start docker, or dockerd"
    return f"the Docker engine does not answer ({reason}): {fix}. A run on the CPU needs no container: cluster.runtime=process"


def is_absent(errors: str) -> bool:
    """Whether docker's stderr says that there is no container or image of that name."""
    return ABSENT.search(errors) is not None


def find_client(environ: Mapping[str, str]) -> DockerCommand:
    """The first docker client on PATH that can build with BuildKit, and the engine behind it. Raises ImageFailed saying what is
    missing, and the fix."""
    paths = [path for folder in environ.get("PATH", "").split(":") if (path := shutil.which("docker", path=folder))]
    if not paths:
        raise ImageFailed(NO_CLIENT)
    engine, architecture = ask("version", "--format", "{{.Server.Version}} {{.Server.Arch}}").stdout.split()
    return choose_client(tuple(dict.fromkeys(paths)), engine, architecture)


def choose_client(paths: tuple[str, ...], engine: str, architecture: str) -> DockerCommand:
    """Raises ImageFailed when the engine is too old, or no client of `paths` supports BuildKit."""
    if version_of(engine) < OLDEST_ENGINE:
        raise ImageFailed(
            f"the Docker engine is {engine}; BuildKit with mounts and secrets needs {OLDEST_ENGINE[0]}.{OLDEST_ENGINE[1]} or newer: upgrade it"
        )
    refused = []
    for path in paths:
        version = output_of((path, "version", "--format", "{{.Client.Version}}"))
        if (0,) < version_of(version) < (SEPARATE_BUILDKIT,) or output_of((path, "buildx", "version")):
            return DockerCommand(path=path, architecture=ARCHITECTURES.get(architecture, architecture))
        refused.append(f"{path} ({version or 'no answer'})")
    raise ImageFailed(
        f"no docker client here can do BuildKit builds: {', '.join(refused)} without the buildx plugin. "
        "Install the plugin (package docker-buildx-plugin or docker-buildx), or Debian's docker.io, whose client has BuildKit built in"
    )


def output_of(command: tuple[str, ...]) -> str:
    """Standard output of a command, '' when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(text: str) -> tuple[int, ...]:
    """(20, 10, 24) of `20.10.24+dfsg1`."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# --------------------------------------------------------------------------------------------------------------- images


def image_query(*names: str) -> tuple[str, ...]:
    """The argv that prints one line for `read_image` for each image, on this machine or on a node."""
    return ("docker", "image", "inspect", "--format", JSON, *names)


def read_image(line: str) -> BuiltImage:
    """One line of `docker image inspect`. Docker leaves out or sets to null what is empty. Raises ImageFailed for any other text."""
    try:
        facts = json.loads(line)
        image_id, config, architecture = str(facts["Id"]), facts.get("Config") or {}, facts.get("Architecture") or ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageFailed(f"docker image inspect printed {line[:80]!r}, which is not the description of an image") from error
    return BuiltImage(
        id=image_id,
        tags=tuple(facts.get("RepoTags") or ()),
        created=(facts.get("Created") or "")[:19],
        architecture=ARCHITECTURES.get(architecture, architecture),
        user=config.get("User") or "",
        size_bytes=facts.get("Size") or 0,
        labels=config.get("Labels") or {},
        layer_digests=tuple((facts.get("RootFS") or {}).get("Layers") or ()),
        registry_digests=tuple(facts.get("RepoDigests") or ()),
    )


def images_here(*names: str) -> tuple[BuiltImage, ...]:
    """Those of the images, by tag or id, that this machine's engine has."""
    lines = ask(*image_query(*names)[1:]).stdout.splitlines() if names else ()
    return tuple(read_image(line) for line in lines if line)  # the client prints an empty line where it has found none


def find(image: Image) -> str | None:
    """The id of the engine's image with this tag and this fingerprint; None if there is none."""
    return next((found.id for found in images_here(image.tag) if found.fingerprint == image.fingerprint), None)


def inspect(name: str) -> BuiltImage:
    """Everything about one image, by tag or id. Raises ImageFailed when the engine does not have it, or omnilaunch did not build it."""
    found = images_here(name)
    if not found:
        raise ImageFailed(f"the engine has no image {name}; those it has: omnilaunch image ls")
    if not found[0].fingerprint:
        raise ImageFailed(f"{name} was not built by omnilaunch: it has no label {FINGERPRINT}")
    lines = ask("image", "history", "--no-trunc", "--human=false", "--format", JSON, found[0].id).stdout.splitlines()
    return replace(found[0], layers=tuple((int(layer["Size"]), layer["CreatedBy"]) for layer in map(json.loads, lines)))


def built_images() -> tuple[BuiltImage, ...]:
    """All images of this engine that any checkout of omnilaunch built, newest first."""
    ids = dict.fromkeys(ask("image", "ls", "--quiet", "--no-trunc", "--filter", f"label={FINGERPRINT}").stdout.split())
    return tuple(sorted(images_here(*ids), key=lambda image: image.created, reverse=True))


def used_images() -> frozenset[str]:
    """Ids of the images of all containers, running or not."""
    containers = ask("container", "ls", "--all", "--quiet", "--no-trunc").stdout.split()
    return frozenset(ask("container", "inspect", "--format", "{{.Image}}", *containers).stdout.split()) if containers else frozenset()


def remove(image: BuiltImage) -> None:
    """Remove an image's tags, and the layers that no other image uses. Raises ImageFailed when it is in use."""
    for name in image.tags or (image.id,):
        done = ask("image", "rm", name)
        if done.returncode and not is_absent(done.stderr):  # absent: another omnilaunch has removed it
            raise ImageFailed(f"{name} was not removed: {done.stderr.strip()}")


def surplus(images: tuple[BuiltImage, ...], *, wanted: frozenset[str], used: frozenset[str]) -> tuple[BuiltImage, ...]:
    """The images that no container uses (`used`: ids) and that neither the present tree nor a record needs (`wanted`: tags)."""
    return tuple(image for image in images if image.id not in used and not wanted.intersection(image.tags))
