"""Which image a node has, and whether that is the plan's."""

import json
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.image.docker import read_image
from launcher.run.delivery.node_image import image_on, is_everywhere, is_same
from launcher.ssh.transport import Local, Result
from tests.launcher.run.delivery.test_pull import PRINT, TAG, nodes_with


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
    nodes = nodes_with(tmp_path, *(image or () for image in images))
    for rank, image in enumerate(images):
        if image:
            (tmp_path / f"host{rank}/remote").rename(tmp_path / f"host{rank}/local")
    assert is_everywhere(TAG, PRINT, nodes) is everywhere


@pytest.mark.parametrize(
    ("there", "layers", "same"),
    [
        ("sha256:config", [], True),
        ("sha256:manifest", ["sha256:a", "sha256:b"], True),
        ("sha256:manifest", ["sha256:a", "sha256:c"], False),
        ("sha256:manifest", [], False),
    ],
)
def test_an_image_in_another_kind_of_store_is_recognised_by_its_layers(there: str, layers: list[str], same: bool) -> None:
    """Docker 29 uses the containerd store, 28 its own, where one image has another id."""
    found, sent, bare = (
        read_image(json.dumps({"Id": image_id, "RootFS": {"Layers": digests}}))
        for image_id, digests in ((there, layers), ("sha256:config", ["sha256:a", "sha256:b"]), ("sha256:config", None))
    )
    assert is_same(found, sent) is same
    assert is_same(found, bare) is (found.id == bare.id), "an engine that lists no layers proves nothing"
    assert not is_same(None, sent)


@pytest.mark.parametrize(
    ("code", "output", "errors", "words"),
    [
        (
            1,
            "",
            "Cannot connect to the Docker daemon: no such file or directory",
            "host0: asking its Docker engine for .* failed with exit code 1",
        ),
        (0, "Welcome!", "", "host0: docker image inspect printed 'Welcome!', which is not the description of an image"),
        (0, "[1]", "", "host0: docker image inspect printed"),
        (0, '{"id": 1}', "", "host0: docker image inspect printed"),
    ],
)
def test_an_engine_that_does_not_answer_is_no_absent_image(code: int, output: str, errors: str, words: str) -> None:
    class Node(Local):
        def run(self, argv: tuple[str, ...], **_: object) -> Result:
            return Result(argv=argv, code=code, output=output, errors=errors)

    with pytest.raises(NodeFailed, match=words):
        image_on(Node({}, "host0"), TAG)
