"""Make an Image real: a small build context, BuildKit through the docker client, a tag only when everything went well.

Index, mirrors and CA bundle reach pip as BuildKit secrets, so that neither a layer nor an argv nor the cache's keys hold them.
With a wheelhouse the build has no network at all.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.config.credentials import masked_addresses
from launcher.config.schema import Delivery
from launcher.errors import ImageFailed
from launcher.image.docker import DockerCommand, answer, find, find_client
from launcher.image.stack import REPOSITORY, Image, Stack, context_files, digest, draw_system
from launcher.image.wheelhouse import SYSTEM, local_files, system_files

CONTEXT_FOLDER = ".cache/image"
WHEELHOUSE = "wheelhouse"
LAST_LINES = 20
STEP = re.compile(r"^#\d+ (?P<place>\[.+?\]) (?P<what>[A-Z]+ .*)$")  # of BuildKit's plain progress
DONE = re.compile(r"^#\d+ DONE (?P<seconds>\d+\.\d)s$")

# What a build may say, and what to do about it. The first that is found is shown.
ADVICE = (
    (r"DO NOT MATCH THE HASHES", "a package is not the one that was locked: look at the mirror or the wheelhouse; never loosen the hash"),
    (r"In --require-hashes mode", "the lock misses a package: omnilaunch image refresh"),
    (
        r"No space left on device|no space left on device",
        "the engine's disk is full: docker system df shows by what, docker builder prune frees the build cache",
    ),
    (r"AssertionError: the base has Python", "take a base with the Python of the lock, or leave cluster.delivery.base empty"),
    (
        r"buildx component is missing|unknown flag: --secret",
        "the node's docker client has no BuildKit: install docker-buildx-plugin (or docker-buildx) there",
    ),
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


def build(image: Image, *, root: Path, delivery: Delivery, on_line: Callable[[str], None], fresh: bool = False) -> str:
    """The id of the built image; an image that is there already is not built again, unless `fresh`, which takes nothing over from
    earlier builds. Raises ImageFailed with what to do next; nothing is tagged then."""
    client = find_client(os.environ)
    with only_builder(root, image, on_line):
        there = find(image)
        if there and not fresh:
            on_line(f"image {image.tag} is there already")
            return there
        refuse_unbuildable(image, delivery, client)
        on_line(f"building {image.tag} from {image.base}" + ("" if "@sha256:" in image.base else ", which is not pinned by digest"))
        context = fill_context(image, root, delivery)
        with tempfile.TemporaryDirectory(prefix="omnilaunch-") as secrets:
            told = write_secrets(delivery, Path(secrets))
            command = build_command(client.path, image, context, told, source_commit(root), delivery=delivery, fresh=fresh)
            run_build(command, context.with_suffix(".log"), delivery, on_line)
    made = find(image)
    if made is None:
        raise ImageFailed(
            f"the build of {image.tag} ended without an error, yet the engine does not have the image: docker images {REPOSITORY}"
        )
    return made


# -------------------------------------------------------------------------------------------------------------- context


def refuse_unbuildable(image: Image, delivery: Delivery, client: DockerCommand) -> None:
    """Raise ImageFailed for an image that may not or cannot be built here, before anything is made."""
    if delivery.kind not in ("build", "build_on_nodes"):
        raise ImageFailed(
            f"{image.tag} is not on this machine, and cluster.delivery.kind={delivery.kind} builds none; use cluster.delivery.kind=build"
        )
    refuse_unready(image, delivery)
    if image.architecture != client.architecture:
        raise ImageFailed(
            f"{image.tag} is for {image.architecture}, the Docker engine here is {client.architecture}: build it on a machine of the nodes' "
            f"architecture. For one without a network, fill its wheelhouse here: omnilaunch image fetch --architecture {image.architecture}"
        )


def refuse_unready(image: Image, delivery: Delivery) -> None:
    """The same for one that may not or cannot be built anywhere."""
    if not image.lock:
        raise ImageFailed(
            f"stack {image.stack} has no lock for {image.architecture} yet (images/versions.yaml, key stacks.{image.stack}.locks): "
            "its image can be planned, not built"
        )
    if image.licence and not delivery.accept_licence:
        raise ImageFailed(
            f"building {image.tag} accepts this licence: {image.licence}. Say so once with cluster.delivery.accept_licence=true"
        )
    if masked := masked_addresses(delivery):
        raise ImageFailed(
            f"{image.tag} has to be built, and the run's plan has these addresses without their credentials. Give them in the environment, "
            f"and the same command again:\n{masked}"
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
    local = {f"{WHEELHOUSE}/{name}": path for name, path in local_files(root, image.lock, delivery).items()}
    local |= {f"{SYSTEM}/{name}": path for name, path in system_files(delivery).items()}
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in wanted and name not in local:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name in (WHEELHOUSE, SYSTEM):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, path in {**wanted, **local}.items():
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


def build_command(
    client: str, image: Image, context: Path, secrets: dict[str, Path], commit: str, *, delivery: Delivery, fresh: bool
) -> tuple[str, ...]:
    """The argv of a `client` program. Proxies are named without their value, which it takes from its environment."""
    labels = {**image.labels, "org.opencontainers.image.revision": commit}
    return (
        client, "build", "--progress", "plain", "--tag", image.tag,
        *(("--network", "none") if delivery.wheelhouse else ()), *(("--no-cache",) if fresh else ()),
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
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
    ) as client:
        try:
            with log.open("w", encoding="utf-8") as kept:
                for line in client.stdout or ():
                    kept.write(line)
                    last.append(line.rstrip())
                    advice.extend(advice_on(line))
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


def advice_on(said: str) -> tuple[str, ...]:
    return tuple(text for pattern, text in ADVICE if re.search(pattern, said))


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


# ------------------------------------------------------------------------------------------------------ system packages


def fetch_system(stack: Stack, *, architecture: str, root: Path, folder: Path, delivery: Delivery, on_line: Callable[[str], None]) -> None:
    """Download the Debian packages that the stack's Dockerfile installs into `folder`/system, as the base's own apt resolves and
    checks them. Raises ImageFailed where the engine or the base cannot be had, or is of another architecture."""
    client = find_client(os.environ)
    if client.architecture != architecture:
        raise ImageFailed(
            f"system packages for {architecture} are fetched on a machine of that architecture, this one's engine is {client.architecture}. "
            "The wheels are here; a base that has the packages already needs no more: cluster.delivery.base=IMAGE"
        )
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as context:
        (Path(context) / "Dockerfile").write_text(draw_system(stack, root, base=delivery.base), encoding="utf-8")
        output = ("--output", f"type=local,dest={folder / SYSTEM}")
        proxies = tuple(part for name in ("http_proxy", "https_proxy") for part in ("--build-arg", name))
        run_build((client.path, "build", "--progress", "plain", *output, *proxies, context), folder / "system.log", delivery, on_line)
