"""Nodes that take the image from a registry: all must have the plan's, and the same."""

import os
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.run.delivery.ship import Pulled, is_everywhere, pull
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local
from tests.launcher.engine import command

TAG, REGISTRY, PRINT = "omnilaunch:cpu-0123", "registry.example:5000/x", "f" * 64
REFERENCE = f"{REGISTRY}/{TAG}"
# The files `remote` and `local` hold what an inspect says: id, fingerprint, and a line for each registry's digest.
DOCKER = """#!/bin/sh
echo "$*" >>"$HOME/told"
case "$1 $2" in
  "pull "*) cp "$HOME/remote" "$HOME/pulled" ;;
  "tag "*) mv "$HOME/pulled" "$HOME/local" ;;
  "image inspect") [ -f "$HOME/local" ] || { echo "Error: No such image" >&2; exit 1; }
    case "$4" in "{{.Id}}") head -n 1 "$HOME/local" ;; *) cat "$HOME/local" ;; esac ;;
esac
"""


def sites(folder: Path, *remote: tuple[str, ...]) -> list[WorkingNode]:
    programs = folder / "programs"
    programs.mkdir()
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    made = []
    for rank, lines in enumerate(remote):
        home = folder / f"host{rank}"
        home.mkdir()
        (home / "remote").write_text("".join(f"{line}\n" for line in lines))
        transport = Local({"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)}, home.name)
        made.append(WorkingNode(command=command(home.name, rank), transport=transport))
    return made


def digest(letter: str) -> str:
    return f"{REGISTRY}/omnilaunch@sha256:{letter * 64}"


def pull_all(nodes: list[WorkingNode]) -> list[str]:
    said: list[str] = []
    pull(TAG, REGISTRY, nodes, said.append, fingerprint=PRINT)
    return said


def test_those_that_lack_it_take_it_and_all_are_compared(tmp_path: Path) -> None:
    nodes = sites(tmp_path, ("sha256:1", PRINT, digest("a")), ("sha256:1", PRINT, digest("a")))
    assert pull_all(nodes) == [f"pulling {REFERENCE} on host0, host1"]
    assert pull_all(nodes) == []
    assert (tmp_path / "host1/told").read_text().splitlines()[1:3] == [f"pull --quiet {REFERENCE}", f"tag {REFERENCE} {TAG}"]


def test_two_kinds_of_store_have_one_digest(tmp_path: Path) -> None:
    """containerd's store calls an image by its manifest, the older one by its config."""
    pull_all(sites(tmp_path, ("sha256:1", PRINT, "other.example/y@sha256:00", digest("a")), ("sha256:2", PRINT, digest("a"))))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_node_that_pulled_another_is_named(tmp_path: Path, odd: int) -> None:
    images = [("sha256:1", PRINT, digest("a"))] * 3
    images[odd] = ("sha256:9", PRINT, digest("b"))
    with pytest.raises(NodeFailed, match=rf"^host{odd} \(sha256:9\) pulled another {REFERENCE} .* docker image rm {TAG}") as caught:
        pull_all(sites(tmp_path, *images))
    assert str(caught.value).count("host") == 1


def test_an_image_that_is_not_the_plans_is_refused_though_all_have_it(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match=r"host0, host1: .* is not the plan's image"):
        pull_all(sites(tmp_path, ("sha256:1", "e" * 64), ("sha256:1", "")))


@pytest.mark.parametrize(
    ("images", "everywhere"),
    [
        ([("sha256:1", PRINT)] * 2, True),
        ([("sha256:1", PRINT), ("sha256:2", PRINT)], False),
        ([("sha256:1", "e" * 64)] * 2, False),
        ([("sha256:1", PRINT), None], False),
        ([None, None], False),
    ],
)
def test_an_image_is_everywhere_when_all_have_the_same_of_the_plan(
    tmp_path: Path, images: list[tuple[str, ...] | None], everywhere: bool
) -> None:
    nodes = sites(tmp_path, *(image or () for image in images))
    for rank, image in enumerate(images):
        if image:
            (tmp_path / f"host{rank}/remote").rename(tmp_path / f"host{rank}/local")
    assert is_everywhere(TAG, PRINT, nodes) is everywhere


def test_no_digest_is_no_proof() -> None:
    assert not Pulled(id="1", fingerprint="", digest="").is_same(Pulled(id="2", fingerprint="", digest=""))
