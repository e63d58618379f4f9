"""Make an Image real: a small build context, BuildKit through the docker client, a tag only when everything went well.

Facts about the engine come from its own API (the docker package); the build itself needs a client that speaks BuildKit. Index,
mirrors and CA bundle reach pip as BuildKit secrets, so that neither a layer nor an argv nor the cache's keys hold them.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ImageFailed
from launcher.image import LABEL, REPOSITORY, Image, context_files, digest
from launcher.schema import Delivery

OLDEST_ENGINE = (20, 10)  # the first whose BuildKit reads RUN --mount without a frontend to pull
SEPARATE_BUILDKIT = 23  # from this client on BuildKit is a plugin, buildx; before, it is built in
CONTEXT_FOLDER = ".cache/image"
WHEELHOUSE = "wheelhouse"
LAST_LINES = 20
STEP = re.compile(r"^#\d+ (?P<place>\[.+?\]) (?P<what>[A-Z]+ .*)$")  # of BuildKit's plain progress
DONE = re.compile(r"^#\d+ DONE (?P<seconds>\d+\.\d)s$")
DISTRIBUTION = re.compile(r"^(?P<name>[A-Za-z0-9._]+?)-(?P<version>\d[^-]*?)(-[^/]*\.whl|\.tar\.gz|\.zip)$")

# What a build may say, and what to do about it. The first that is found is shown.
ADVICE = (
    (r"DO NOT MATCH THE HASHES", "a package is not the one that was locked: look at the mirror or the wheelhouse; never loosen the hash"),
    (r"In --require-hashes mode", "the lock misses a package: omnilaunch image refresh"),
    (
        r"No space left on device|no space left on device",
        "the engine's disk is full: docker system df shows by what, docker builder prune frees the build cache",
    ),
    (r"AssertionError: the base has Python", "take a base with the Python of the lock, or leave cluster.delivery.base empty"),
    (r"exec format error", "the base is for another architecture than this machine: build on a machine of the nodes' architecture"),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "a proxy with a certificate of its own: name its bundle with cluster.delivery.ca_bundle=FILE"),
    (
        r"No matching distribution found",
        "the index lacks it: cluster.delivery.index=URL for a mirror, cluster.delivery.find_links=FOLDER for local wheels",
    ),
    (
        r"failed to resolve|failed to do request|pull access denied|no such host|failed to authorize|manifest unknown",
        "the base image cannot be pulled from here: name one that can with cluster.delivery.base=IMAGE",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Client:
    """A docker command line that can do BuildKit builds on the engine here."""

    path: str
    version: str
    engine_version: str


def build(image: Image, *, root: Path, delivery: Delivery, on_line: Callable[[str], None]) -> str:
    """The id of the built image; an image that is there already is not built again. Raises ImageFailed with what to do next;
    nothing is tagged then."""
    client = find_client(os.environ)
    with only_builder(root, image, on_line):
        there = find(image)
        if there:
            on_line(f"image {image.tag} is there already")
            return there
        refuse_unbuildable(image, delivery)
        on_line(f"building {image.tag} from {image.base}" + ("" if "@sha256:" in image.base else ", which is not pinned by digest"))
        context = fill_context(image, root, delivery)
        with tempfile.TemporaryDirectory(prefix="omnilaunch-") as secrets:
            command = build_command(client, image, context, write_secrets(delivery, Path(secrets)), source_commit(root))
            run_build(command, context.with_suffix(".log"), delivery, on_line)
    made = find(image)
    if made is None:
        raise ImageFailed(
            f"the build of {image.tag} ended without an error, yet the engine does not have the image: docker images {REPOSITORY}"
        )
    return made


# --------------------------------------------------------------------------------------------------- engine and client


def find_client(environ: Mapping[str, str]) -> Client:
    """The first docker client on PATH that can build with BuildKit, and the engine behind it. Raises ImageFailed saying what is
    missing, and the fix."""
    paths = [path for folder in environ.get("PATH", "").split(os.pathsep) if (path := shutil.which("docker", path=folder))]
    if not paths:
        raise ImageFailed(
            "there is no docker client on PATH. On Debian: apt-get install docker.io; to run without containers: cluster.runtime=process"
        )
    return choose_client(tuple(dict.fromkeys(paths)), engine_version())


def choose_client(paths: tuple[str, ...], engine: str) -> Client:
    """Raises ImageFailed when the engine is too old, or no client of `paths` speaks BuildKit."""
    if version_of(engine) < OLDEST_ENGINE:
        raise ImageFailed(
            f"the Docker engine is {engine}; BuildKit with mounts and secrets needs {OLDEST_ENGINE[0]}.{OLDEST_ENGINE[1]} or newer: upgrade it"
        )
    refused = []
    for path in paths:
        version = answer((path, "version", "--format", "{{.Client.Version}}"))
        if (0,) < version_of(version) < (SEPARATE_BUILDKIT,) or answer((path, "buildx", "version")):
            return Client(path=path, version=version, engine_version=engine)
        refused.append(f"{path} ({version or 'no answer'})")
    raise ImageFailed(
        f"no docker client here can do BuildKit builds: {', '.join(refused)} without the buildx plugin. "
        "Install the plugin (package docker-buildx-plugin or docker-buildx), or Debian's docker.io, whose client has BuildKit built in"
    )


def engine_version() -> str:
    """Asked of the engine itself. Raises ImageFailed when it does not answer."""
    import docker

    try:
        with closing(docker.from_env()) as engine:
            return str(engine.version()["Version"])
    except docker.errors.DockerException as error:
        denied = "Permission denied" in str(error)
        fix = "add yourself to the group docker, or use sudo" if denied else "start it: systemctl start docker, or dockerd"
        raise ImageFailed(
            f"the Docker engine does not answer ({error}): {fix}. To run without containers: cluster.runtime=process"
        ) from error


def find(image: Image) -> str | None:
    """The id of the engine's image with this tag and this whole fingerprint; None when there is none."""
    import docker

    with closing(docker.from_env()) as engine:
        try:
            there = engine.images.get(image.tag)
        except docker.errors.ImageNotFound:
            return None
        return str(there.id) if there.labels.get(f"{LABEL}fingerprint") == image.fingerprint else None


def built_images() -> tuple[str, ...]:
    """Tags of all images that were built from here or by another omnilaunch, newest first as the engine lists them."""
    import docker

    engine_version()
    with closing(docker.from_env()) as engine:
        return tuple(tag for image in engine.images.list(filters={"label": f"{LABEL}fingerprint"}) for tag in image.tags)


def answer(command: tuple[str, ...]) -> str:
    """Standard output of a command, '' when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(text: str) -> tuple[int, ...]:
    """(20, 10, 24) of `20.10.24+dfsg1`."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# -------------------------------------------------------------------------------------------------------------- context


def refuse_unbuildable(image: Image, delivery: Delivery) -> None:
    """Raise ImageFailed for an image that may not or cannot be built, before anything is made."""
    if delivery.kind != "build":
        raise ImageFailed(
            f"{image.tag} is not on this machine and cluster.delivery.kind={delivery.kind} is still to come; use cluster.delivery.kind=build"
        )
    if not image.lock:
        raise ImageFailed(
            f"stack {image.stack} has no lock for {image.architecture} yet (images/versions.yaml, key stacks.{image.stack}.locks): "
            "its image can be planned, not built"
        )
    if image.licence and not delivery.accept_licence:
        raise ImageFailed(
            f"building {image.tag} accepts this licence: {image.licence}. Say so once with cluster.delivery.accept_licence=true"
        )


@contextmanager
def only_builder(root: Path, image: Image, on_line: Callable[[str], None]) -> Iterator[None]:
    """One build of a stack at a time, since they share a context; a second one waits and then finds the image."""
    folder = root / CONTEXT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{image.stack}-{image.architecture}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_line(f"another build of stack {image.stack} is under way here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fill_context(image: Image, root: Path, delivery: Delivery) -> Path:
    """The folder that the client sends: exactly the image's files, at one place for a stack, since BuildKit then takes over only
    what has changed."""
    folder = root / CONTEXT_FOLDER / f"{image.stack}-{image.architecture}"
    wanted = context_files(root, image.lock)
    wheels = {f"{WHEELHOUSE}/{path.name}": path for path in local_wheels(image, root, delivery)}
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in wanted and name not in wheels:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    (folder / WHEELHOUSE).mkdir(parents=True, exist_ok=True)
    for name, path in {**wanted, **wheels}.items():
        place(path, folder / name)
    for name, expected in image.files.items():
        if digest(folder / name) != expected:
            raise ImageFailed(f"{wanted[name]} has changed since {image.tag} was planned; start again")
    (folder / "Dockerfile").write_text(image.dockerfile, encoding="utf-8")
    return folder


def place(source: Path, target: Path) -> None:
    """Copy what differs, with a mode that does not depend on the user's umask; owners are root in any layer."""
    there, here = target.stat() if target.exists() else None, source.stat()
    if there and (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if target.suffix == ".sh" else 0o644)
    os.utime(target, ns=(here.st_atime_ns, here.st_mtime_ns))


def local_wheels(image: Image, root: Path, delivery: Delivery) -> tuple[Path, ...]:
    """Files of the local folders that the lock asks for, by name and version; pip checks their hashes inside."""
    pins = {
        (normal(name), version)
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", (root / "images" / image.lock).read_text(), re.MULTILINE)
    }
    folders = [Path(where) for where in (delivery.wheelhouse, delivery.find_links) if where and "://" not in where]
    for folder in folders:
        if not folder.is_dir():
            raise ImageFailed(
                f"the folder {folder} of cluster.delivery.{'wheelhouse' if str(folder) == delivery.wheelhouse else 'find_links'} does not exist"
            )
    found = {
        path.name: path
        for folder in folders
        for path in sorted(folder.iterdir())
        if (match := DISTRIBUTION.match(path.name)) and (normal(match["name"]), match["version"]) in pins
    }
    return tuple(found.values())


def normal(name: str) -> str:
    """As the packaging specification compares project names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_secrets(delivery: Delivery, folder: Path) -> dict[str, Path]:
    """Secret id -> file: pip's configuration, and the CA bundle where one is given. Raises ImageFailed when it cannot be read."""
    lines = ["[global]", f"find-links = /{WHEELHOUSE}" + (f" {delivery.find_links}" if "://" in delivery.find_links else "")]
    lines += [f"index-url = {delivery.index}"] if delivery.index else []
    lines += [f"extra-index-url = {delivery.extra_index}"] if delivery.extra_index else []
    lines += ["no-index = true"] if delivery.wheelhouse else []
    secrets = {"pip": folder / "pip.conf"}
    if delivery.ca_bundle:
        secrets["ca"] = Path(delivery.ca_bundle)
        lines.append("cert = /run/secrets/ca")
        if not secrets["ca"].is_file():
            raise ImageFailed(f"cluster.delivery.ca_bundle: there is no file {delivery.ca_bundle}")
    secrets["pip"].touch(mode=0o600)
    secrets["pip"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return secrets


# ---------------------------------------------------------------------------------------------------------------- build


def build_command(client: Client, image: Image, context: Path, secrets: dict[str, Path], commit: str) -> tuple[str, ...]:
    """The argv. Proxies are named without their value, which the client takes from its environment."""
    labels = {**image.labels, "org.opencontainers.image.revision": commit}
    return (
        client.path, "build", "--progress", "plain", "--tag", image.tag,
        *(part for name, value in sorted(labels.items()) for part in ("--label", f"{name}={value}")),
        *(part for name, path in sorted(secrets.items()) for part in ("--secret", f"id={name},src={path}")),
        *(part for name in ("http_proxy", "https_proxy") for part in ("--build-arg", name)),
        str(context),
    )  # fmt: skip


def run_build(command: tuple[str, ...], log: Path, delivery: Delivery, on_line: Callable[[str], None]) -> None:
    """Run the client, keep all that it says in `log`, hand on its steps. Raises ImageFailed with the last lines and, where the
    cause is known, what to do."""
    proxy = {"http_proxy": delivery.proxy, "https_proxy": delivery.proxy} if delivery.proxy else {}
    environment = {**os.environ, **proxy, "DOCKER_BUILDKIT": "1"}
    last: deque[str] = deque(maxlen=LAST_LINES)
    advice: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as client:
        try:
            with log.open("w", encoding="utf-8") as kept:
                for line in client.stdout or ():
                    kept.write(line)
                    last.append(line.rstrip())
                    advice.extend(text for pattern, text in ADVICE if re.search(pattern, line))
                    if said := shorten(line.rstrip()):
                        on_line(said)
        except BaseException:
            client.terminate()  # the engine ends a build whose client has gone
            raise
    if client.returncode:
        fix = f"\n  what to do: {advice[0]}" if advice else ""
        shown = "\n  ".join(line for line in last if line)
        raise ImageFailed(
            f"the image was not built (docker build ended with {client.returncode}); its last lines:\n  {shown}\n  all of them: {log}{fix}"
        )


def shorten(line: str) -> str:
    """What a person follows of BuildKit's progress: steps as they begin, without their mounts, and what took long."""
    if step := STEP.match(line):
        what = re.sub(r"--mount=\S+ +", "", step["what"])
        return f"  {re.sub(' +', ' ', step['place'])} {what[:100]}"
    done = DONE.match(line)
    return f"    {float(done['seconds']):.0f} s" if done and float(done["seconds"]) >= 2 else ""


def source_commit(root: Path) -> str:
    """The commit of the project's folder, `unknown` outside git."""
    return answer(("git", "-C", str(root), "rev-parse", "HEAD")) or "unknown"
