"""Builds an Image: fills a small build context, runs a BuildKit build with the docker client, and tags the result only if it succeeds.

Index, mirrors and CA bundle reach pip as BuildKit secrets, so that they are in no layer, no argv and no cache key. With a wheelhouse the
build runs without a network.
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
from launcher.image.docker import DockerCommand, find, find_client, output_of
from launcher.image.licence import OVERRIDE, how_to_accept
from launcher.image.stack import REPOSITORY, SYSTEM_TEMPLATE, Image, Stack, context_files, digest, draw
from launcher.image.wheelhouse import SYSTEM, local_files, system_files

CONTEXT_FOLDER = ".cache/image"
WHEELHOUSE = "wheelhouse"
LAST_LINES = 20
STEP = re.compile(r"^#\d+ (?P<stage>\[.+?\]) (?P<instruction>[A-Z]+ .*)$")  # of BuildKit's plain progress
DONE = re.compile(r"^#\d+ DONE (?P<seconds>\d+\.\d)s$")
PROXIES = ("--build-arg", "http_proxy", "--build-arg", "https_proxy")  # the client takes their values from its environment


def build(image: Image, *, root: Path, delivery: Delivery, on_line: Callable[[str], None], fresh: bool = False) -> str:
    """Build the image unless the engine has it, and return its id. `fresh` builds it in any case, without the build cache. Raises
    ImageFailed with what to do next; nothing is tagged then."""
    client = find_client(os.environ)
    with only_builder(root, image, on_line):
        existing = find(image)
        if existing and not fresh:
            on_line(f"image {image.tag} is there already")
            return existing
        refuse_unbuildable(image, delivery, client)
        on_line(f"building {image.tag} from {image.base}" + ("" if "@sha256:" in image.base else ", which is not pinned by digest"))
        context = fill_context(image, root, delivery)
        with tempfile.TemporaryDirectory(prefix="omnilaunch-") as folder:
            secrets = write_secrets(delivery, Path(folder))
            command = build_command(client.path, image, context, secrets, source_commit(root), delivery=delivery, fresh=fresh)
            run_build(command, context.with_suffix(".log"), delivery, on_line)
    built = find(image)
    if built is None:
        raise ImageFailed(f"the build of {image.tag} succeeded, but the engine does not have the image: docker images {REPOSITORY}")
    return built


def fetch_system(stack: Stack, *, architecture: str, root: Path, folder: Path, delivery: Delivery, on_line: Callable[[str], None]) -> None:
    """Download the Debian packages that the stack's Dockerfile installs into `folder`/system. The apt of the base resolves and checks
    them. Raises ImageFailed when the engine or the base is not available, or is for another architecture."""
    client = find_client(os.environ)
    if client.architecture != architecture:
        raise ImageFailed(
            f"the Docker engine here is {client.architecture}: fetch the system packages for {architecture} on a machine of that architecture. "
            "The wheels are complete; a base that has the packages already needs nothing more: cluster.delivery.base=IMAGE"
        )
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as context:
        dockerfile = draw(stack, root, base=delivery.base, template=SYSTEM_TEMPLATE)
        (Path(context) / "Dockerfile").write_text(dockerfile, encoding="utf-8")
        output = ("--output", f"type=local,dest={folder / SYSTEM}")
        run_build((client.path, "build", "--progress", "plain", *output, *PROXIES, context), folder / "system.log", delivery, on_line)


# -------------------------------------------------------------------------------------------------------------- context


def refuse_unbuildable(image: Image, delivery: Delivery, client: DockerCommand) -> None:
    """Raise ImageFailed if the image may not or cannot be built on this machine."""
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
    """Raise ImageFailed if the image may not or cannot be built on any machine."""
    if not image.lock:
        raise ImageFailed(
            f"stack {image.stack} has no lock for {image.architecture} yet (images/versions.yaml, key stacks.{image.stack}.locks): "
            "its image can be planned, but not built"
        )
    if image.licence and not delivery.accept_licence:
        raise ImageFailed(
            f"building {image.tag} accepts this licence: {image.licence}; {how_to_accept(image.licence)} (or, for one command, {OVERRIDE})"
        )
    if masked := masked_addresses(delivery):
        raise ImageFailed(
            f"{image.tag} has to be built, but the run's plan holds these addresses without their credentials. Set them in the environment "
            f"and run the same command again:\n{masked}"
        )


@contextmanager
def only_builder(root: Path, image: Image, on_line: Callable[[str], None]) -> Iterator[None]:
    """One build of a stack at a time, since builds share its context. A second one waits, and then finds the image."""
    folder = root / CONTEXT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{image.stack}-{image.architecture}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_line(f"another build of stack {image.stack} is running here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fill_context(image: Image, root: Path, delivery: Delivery) -> Path:
    """The build context: exactly the image's files. It is one folder for each stack, so that BuildKit transfers only what has changed."""
    folder = root / CONTEXT_FOLDER / f"{image.stack}-{image.architecture}"
    sources = context_files(root, image.lock)
    wanted = {
        **sources,
        **{f"{WHEELHOUSE}/{name}": path for name, path in local_files(root, image.lock, delivery).items()},
        **{f"{SYSTEM}/{name}": path for name, path in system_files(delivery).items()},
    }
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name in (WHEELHOUSE, SYSTEM):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, path in wanted.items():
        copy_changed(path, folder / name)
    for name, expected in image.files.items():
        if digest(folder / name) != expected:
            raise ImageFailed(f"{sources[name]} has changed since {image.tag} was planned; run the command again")
    (folder / "Dockerfile").write_text(image.dockerfile, encoding="utf-8")
    return folder


def copy_changed(source: Path, target: Path) -> None:
    """Copy a file whose size or time differs, with a mode that does not depend on the user's umask. Every layer is owned by root."""
    old, new = target.stat() if target.exists() else None, source.stat()
    if old and (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if target.suffix == ".sh" else 0o644)
    os.utime(target, ns=(new.st_atime_ns, new.st_mtime_ns))


def write_secrets(delivery: Delivery, folder: Path) -> dict[str, Path]:
    """Secret id -> file: pip's configuration, and the CA bundle if one is configured. Raises ImageFailed if that does not exist."""
    lines = ["[global]", f"find-links = /{WHEELHOUSE}" + (f" {delivery.find_links}" if "://" in delivery.find_links else "")]
    lines += [f"index-url = {delivery.index}"] if delivery.index else []
    lines += [f"extra-index-url = {delivery.extra_index}"] if delivery.extra_index else []
    lines += ["no-index = true"] if delivery.wheelhouse else []
    secrets = {"pip": folder / "pip.conf"}
    if delivery.ca_bundle:
        secrets["ca"] = Path(delivery.ca_bundle)
        lines.append("cert = /run/secrets/ca")
        if not secrets["ca"].is_file():
            raise ImageFailed(f"cluster.delivery.ca_bundle: the file {delivery.ca_bundle} does not exist")
    secrets["pip"].touch(mode=0o600)
    secrets["pip"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return secrets


# ---------------------------------------------------------------------------------------------------------------- build


def build_command(
    client: str, image: Image, context: Path, secrets: dict[str, Path], commit: str, *, delivery: Delivery, fresh: bool
) -> tuple[str, ...]:
    """The argv of a build with the docker client at `client`."""
    labels = {**image.labels, "org.opencontainers.image.revision": commit}
    return (
        client, "build", "--progress", "plain", "--tag", image.tag,
        *(("--network", "none") if delivery.wheelhouse else ()), *(("--no-cache",) if fresh else ()),
        *(part for name, value in sorted(labels.items()) for part in ("--label", f"{name}={value}")),
        *(part for name, path in sorted(secrets.items()) for part in ("--secret", f"id={name},src={path}")),
        *PROXIES, str(context),
    )  # fmt: skip


def run_build(command: tuple[str, ...], log: Path, delivery: Delivery, on_line: Callable[[str], None]) -> None:
    """Run the client, write its output to `log`, and report its steps. Raises ImageFailed with the last lines and, if the cause is
    known, what to do."""
    proxy = {"http_proxy": delivery.proxy, "https_proxy": delivery.proxy} if delivery.proxy else {}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        env={**os.environ, **proxy, "DOCKER_BUILDKIT": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C of the terminal is handled by the launcher
    ) as client:
        try:
            with log.open("w", encoding="utf-8") as file:
                for line in client.stdout or ():
                    file.write(line)
                    last.append(line.rstrip())
                    if text := progress_line(line.rstrip()):
                        on_line(text)
        except BaseException:
            client.terminate()  # the engine ends a build whose client has gone
            raise
    if client.returncode:
        shown = "\n  ".join(line for line in last if line)
        advice = advice_on(log.read_text(encoding="utf-8"))
        raise ImageFailed(
            f"the image was not built (docker build ended with {client.returncode}); its last lines:\n  {shown}\n  all of them: {log}"
            + (f"\n  what to do: {advice}" if advice else "")
        )


def advice_on(output: str) -> str:
    """What to do about the first known error in a build's output; '' if none is known."""
    import yaml

    rows = yaml.safe_load(Path(__file__).with_name("build_errors.yaml").read_text(encoding="utf-8"))
    return next((str(row["fix"]) for line in output.splitlines() for row in rows if re.search(row["pattern"], line)), "")


def progress_line(line: str) -> str:
    """What is reported of BuildKit's progress: each step as it starts, without its mounts, and the seconds of a step that took long."""
    if step := STEP.match(line):
        instruction = re.sub(r"--mount=\S+ +", "", step["instruction"])
        return f"  {re.sub(' +', ' ', step['stage'])} {instruction[:100]}"
    done = DONE.match(line)
    return f"    {float(done['seconds']):.0f} s" if done and float(done["seconds"]) >= 2 else ""


def source_commit(root: Path) -> str:
    """The commit of the project's folder, `unknown` outside git."""
    return output_of(("git", "-C", str(root), "rev-parse", "HEAD")) or "unknown"
