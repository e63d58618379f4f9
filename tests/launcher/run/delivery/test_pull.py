"""Nodes that pull the image from a registry: all must have the plan's image, and the same one."""

import json
import os
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.image.docker import FINGERPRINT, read_image
from launcher.run.delivery.pull import is_same_pull, pull
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local
from tests.launcher.engine import command

TAG, REGISTRY, PRINT = "omnilaunch:cpu-0123", "registry.example:5000/x", "f" * 64
REFERENCE = f"{REGISTRY}/{TAG}"
# The files `remote` and `local` hold what an inspect prints.
DOCKER = """#!/bin/sh
echo "$*" >>"$HOME/asked"
case "$1 $2" in
  "pull "*) cp "$HOME/remote" "$HOME/pulled" ;;
  "tag "*) mv "$HOME/pulled" "$HOME/local" ;;
  "image inspect") [ -f "$HOME/local" ] || { echo "Error: No such image" >&2; exit 1; }; cat "$HOME/local" ;;
esac
"""


def inspected(image_id: str, fingerprint: str, *digests: str) -> str:
    labels = {FINGERPRINT: fingerprint} if fingerprint else None
    return json.dumps({"Id": image_id, "Config": {"Labels": labels}, "RepoDigests": digests})


def nodes_with(folder: Path, *remote: tuple[str, ...]) -> list[WorkingNode]:
    programs = folder / "programs"
    programs.mkdir()
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    made = []
    for rank, lines in enumerate(remote):
        home = folder / f"host{rank}"
        home.mkdir()
        (home / "remote").write_text(inspected(*lines) if lines else "")
        transport = Local({"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)}, home.name)
        made.append(WorkingNode(command=command(home.name, rank), transport=transport))
    return made


def digest(letter: str) -> str:
    return f"{REGISTRY}/omnilaunch@sha256:{letter * 64}"


def pull_all(nodes: list[WorkingNode]) -> list[str]:
    said: list[str] = []
    pull(TAG, REGISTRY, nodes, said.append, fingerprint=PRINT)
    return said


def test_nodes_that_lack_it_pull_it_and_all_are_compared(tmp_path: Path) -> None:
    nodes = nodes_with(tmp_path, ("sha256:1", PRINT, digest("a")), ("sha256:1", PRINT, digest("a")))
    assert pull_all(nodes) == [f"pulling {REFERENCE} on host0, host1"]
    assert pull_all(nodes) == []
    assert (tmp_path / "host1/asked").read_text().splitlines()[1:3] == [f"pull --quiet {REFERENCE}", f"tag {REFERENCE} {TAG}"]


def test_two_kinds_of_store_have_one_digest(tmp_path: Path) -> None:
    """The containerd store identifies an image by its manifest, the older one by its config."""
    pull_all(nodes_with(tmp_path, ("sha256:1", PRINT, "other.example/y@sha256:00", digest("a")), ("sha256:2", PRINT, digest("a"))))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_node_that_pulled_another_is_named(tmp_path: Path, odd: int) -> None:
    images = [("sha256:1", PRINT, digest("a"))] * 3
    images[odd] = ("sha256:9", PRINT, digest("b"))
    with pytest.raises(NodeFailed, match=rf"^host{odd} \(sha256:9\) pulled another {REFERENCE} .* docker image rm {TAG}") as caught:
        pull_all(nodes_with(tmp_path, *images))
    assert str(caught.value).count("host") == 1


def test_an_image_that_is_not_the_plans_is_refused_though_all_have_it(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match=r"host0, host1: .* is not the plan's image"):
        pull_all(nodes_with(tmp_path, ("sha256:1", "e" * 64), ("sha256:1", "")))


def test_without_a_digest_two_images_are_not_the_same() -> None:
    one, other = (read_image(inspected(image_id, PRINT)) for image_id in ("1", "2"))
    assert not is_same_pull(one, other, f"{REGISTRY}/omnilaunch") and is_same_pull(one, one, f"{REGISTRY}/omnilaunch")
