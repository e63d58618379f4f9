"""A base image made with debootstrap, and images built from it, without a registry."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Delivery
from launcher.image.build import build, fetch_system
from launcher.image.docker import built_images
from launcher.image.proof import Proof, lock_digest, write_proof
from launcher.image.stack import Image, load_stacks, render
from launcher.image.wheelhouse import fetch_wheels, write_manifest

ROOT = Path(__file__).resolve().parents[2]
BASE = "omnilaunch-base:bookworm"


@dataclass(frozen=True, kw_only=True)
class Built:
    """An image as the engine has it, and how it was made. `said`: the lines of the build."""

    image: Image
    id: str
    delivery: Delivery
    said: tuple[str, ...]


def run(*command: str) -> str:
    """Standard output; an error shows the output of the command."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian 12 with its Python 3.11, in place of python:3.11-slim-bookworm; the engine keeps it for the next time."""
    if subprocess.run(("docker", "image", "inspect", BASE), capture_output=True).returncode == 0:
        return BASE
    folder = tmp_path_factory.mktemp("debian") / "root"
    run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3-venv", "bookworm", str(folder))
    passing = [f"--exclude=./{name}/*" for name in ("var/cache/apt/archives", "var/lib/apt/lists")]
    with subprocess.Popen(("tar", "-C", str(folder), *passing, "-c", "."), stdout=subprocess.PIPE) as tar:
        subprocess.run(("docker", "import", "-", BASE), stdin=tar.stdout, capture_output=True, check=True)
    shutil.rmtree(folder)
    return BASE


def pip_delivery() -> Delivery:
    """The settings of pip on this machine (`pip config`) for a build: mirror, local wheels, CA bundle."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {key.split(".")[-1]: shlex.split(value)[0] for key, _, value in (line.partition("=") for line in lines)}
    folder = settings.get("find-links", "")
    return Delivery(
        find_links=folder if Path(folder).is_dir() else "",
        ca_bundle=settings.get("cert", ""),
        index=settings.get("index-url", ""),
        accept_licence=True,
    )


@pytest.fixture(scope="session")
def delivery(base: str) -> Delivery:
    return replace(pip_delivery(), base=base)


@pytest.fixture(scope="session")
def make(delivery: Delivery) -> Callable[..., Built]:
    """Build the image of a stack from a project folder; keywords change the delivery: another base, a wheelhouse."""

    def make(root: Path, stack: str = "cpu", *, fresh: bool = False, **changes: str) -> Built:
        mine = replace(delivery, **changes)
        image = render(load_stacks(root / "images")[stack], architecture="x86_64", root=root, base=mine.base)
        said: list[str] = []
        made = build(image, root=root, delivery=mine, on_line=said.append, fresh=fresh)
        return Built(image=image, id=made, delivery=mine, said=tuple(said))

    return make


def copy_project(target: Path) -> Path:
    """A copy of the sources of an image, so that no edit comes between two builds."""
    for folder in ("images", "trainer"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def built(make: Callable[..., Built], project: Path) -> Built:
    return make(project)


@pytest.fixture
def copied(built: Built, project: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may change. Its build context is that of the project, as in the one folder that a user edits."""
    (tmp_path / ".cache").symlink_to(project / ".cache")
    return copy_project(tmp_path)


def tags() -> set[str]:
    """The tags of all our images that the engine has."""
    return {tag for image in built_images() for tag in image.tags}


@pytest.fixture(scope="session")
def wheelhouse(delivery: Delivery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages of the CPU image, fetched as for a site without a network."""
    folder, stack = tmp_path_factory.mktemp("wheelhouse"), load_stacks(ROOT / "images")["cpu"]
    fetch_wheels(stack, architecture="x86_64", root=ROOT, folder=folder, environ=os.environ, delivery=delivery, say=print)
    fetch_system(stack, architecture="x86_64", root=ROOT, folder=folder, delivery=delivery, on_line=print)
    write_manifest(folder, stack, "x86_64")
    return folder


def inspect(name: str) -> dict[str, Any]:
    """docker image inspect."""
    answer: dict[str, Any] = json.loads(run("docker", "image", "inspect", name))[0]
    return answer


def in_container(image: str, *command: str, user: str = "1000:1000", network: str = "none", mounts: tuple[str, ...] = ()) -> str:
    """Run in a container that can write only to /tmp and reach no network. Ranks need a network: without one the host has no name."""
    restrictions = ("--read-only", "--tmpfs", "/tmp:exec", "--network", network, "--cap-drop", "ALL", "--shm-size", "256m")
    bound = tuple(part for mount in mounts for part in ("--mount", mount))
    return run("docker", "run", "--rm", "--user", user, *restrictions, *bound, image, *command)


@pytest.fixture
def prove(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write a proof to images/proven.json if the tests run with --prove; a test calls it last."""

    def prove(stack: str, architecture: str, **facts: Any) -> None:
        if request.config.getoption("--prove"):
            lock = lock_digest(load_stacks(ROOT / "images")[stack], architecture, ROOT)
            today = datetime.now(UTC).date().isoformat()
            write_proof(ROOT, Proof(stack=stack, architecture=architecture, lock=lock, date=today, **facts))

    return prove
