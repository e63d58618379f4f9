"""A base image made on the spot, and the CPU image built from it: no registry is asked."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launcher.build import build
from launcher.image import Image, load_stacks, render
from launcher.schema import Delivery

ROOT = Path(__file__).resolve().parents[2]
BASE = "omnilaunch-base:bookworm"


@dataclass(frozen=True, kw_only=True)
class Built:
    """The CPU image as the engine has it, and how it was made. `said`: the lines of the build."""

    image: Image
    id: str
    delivery: Delivery
    said: tuple[str, ...]


def run(*command: str) -> str:
    """Standard output; an error shows what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian 12 with its Python 3.11, as python:3.11-slim-bookworm would be; kept by the engine for the next time."""
    if subprocess.run(("docker", "image", "inspect", BASE), capture_output=True).returncode == 0:
        return BASE
    folder = tmp_path_factory.mktemp("debian") / "root"
    run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3-venv", "bookworm", str(folder))
    passing = [f"--exclude=./{name}/*" for name in ("var/cache/apt/archives", "var/lib/apt/lists")]
    with subprocess.Popen(("tar", "-C", str(folder), *passing, "-c", "."), stdout=subprocess.PIPE) as tar:
        subprocess.run(("docker", "import", "-", BASE), stdin=tar.stdout, capture_output=True, check=True)
    shutil.rmtree(folder)
    return BASE


@pytest.fixture(scope="session")
def delivery(base: str) -> Delivery:
    """What pip on this machine is told (`pip config`), the build is told as well: mirror, local wheels, CA bundle."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    told = {key.split(".")[-1]: shlex.split(value)[0] for key, _, value in (line.partition("=") for line in lines)}
    folder = told.get("find-links", "")
    return Delivery(
        base=base, find_links=folder if Path(folder).is_dir() else "", ca_bundle=told.get("cert", ""), index=told.get("index-url", "")
    )


@pytest.fixture(scope="session")
def make(delivery: Delivery) -> Callable[[Path, str], Built]:
    """Build the CPU image of a project folder; `base` stands in for the usual one."""

    def make(root: Path, base: str = "") -> Built:
        mine = replace(delivery, base=base or delivery.base)
        image = render(load_stacks(root / "images")["cpu"], architecture="x86_64", root=root, base=mine.base)
        said: list[str] = []
        return Built(image=image, id=build(image, root=root, delivery=mine, on_line=said.append), delivery=mine, said=tuple(said))

    return make


def copy_project(target: Path) -> Path:
    """What an image is made from, as it is now: nobody's edit can come between two builds."""
    for folder in ("images", "trainer"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def built(make: Callable[..., Built], project: Path) -> Built:
    return make(project)
