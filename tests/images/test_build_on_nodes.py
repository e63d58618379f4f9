"""A node that builds the image itself, with BuildKit and secrets. This machine's engine is that of the node."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.image.stack import load_stacks, render
from launcher.run.delivery.node_image import image_on
from launcher.run.delivery.remote_build import build_on
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local
from tests.images.conftest import Built, in_container, tags
from tests.launcher.engine import command

pytestmark = pytest.mark.docker


def test_a_node_builds_what_this_machine_would_have_built(built: Built, copied: Path, tmp_path: Path) -> None:
    """One file of the trainer has changed, so only the last layer is new."""
    (copied / "trainer" / "__init__.py").write_text('"""Built by a node."""\n', encoding="utf-8")
    delivery = replace(built.delivery, kind="build_on_nodes")
    image = render(load_stacks(copied / "images")["cpu"], architecture="x86_64", root=copied, base=delivery.base)
    node = Local(os.environ)
    site, said, root = WorkingNode(command=command("here", 0), transport=node), list[str](), tmp_path / "root"
    assert image.tag != built.image.tag and image_on(node, image.tag) is None
    try:
        build_on(image, (site,), project=copied, root=str(root), delivery=delivery, source=node, say=said.append)
        built_there = image_on(node, image.tag)
        assert built_there and built_there.fingerprint == image.fingerprint and "one fingerprint" in said[-1]
        assert in_container(image.tag, "python", "-c", "import trainer; print(trainer.__doc__)") == "Built by a node."
        assert list(root.iterdir()) == []
        said.clear()
        build_on(image, (site,), project=copied, root=str(root), delivery=delivery, source=node, say=said.append)
        assert said == []
    finally:
        node.run(("docker", "image", "rm", image.tag))


def test_a_base_that_the_node_cannot_have(built: Built, copied: Path, tmp_path: Path) -> None:
    delivery = replace(built.delivery, kind="build_on_nodes", base="registry.invalid/nothing:1")
    image = render(load_stacks(copied / "images")["cpu"], architecture="x86_64", root=copied, base=delivery.base)
    site = WorkingNode(command=command("here", 0), transport=Local(os.environ))
    with pytest.raises(
        NodeFailed, match=r"here: receiving the context of omnilaunch:cpu-\w+, and building it, failed[\s\S]*cluster\.delivery\.base=IMAGE"
    ):
        build_on(image, (site,), project=copied, root=str(tmp_path), delivery=delivery, source=site.transport, say=print)
    assert image.tag not in tags() and not list(tmp_path.glob(".omnilaunch-build*"))
