"""Which image a node has under a tag: the one question that every way of delivery, the run's record and the doctor ask."""

from collections.abc import Sequence

from launcher.errors import ImageFailed, NodeFailed
from launcher.image.docker import BuiltImage, image_query, is_absent, read_image
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each
from launcher.ssh.transport import Transport


def image_on(transport: Transport, tag: str) -> BuiltImage | None:
    """The image that a machine's engine has under the tag; None if there is none. Raises NodeFailed when the engine does not answer."""
    answer = transport.run(image_query(tag))
    if answer.code and is_absent(answer.errors):
        return None
    answer.expect(f"{transport.host}: asking its Docker engine for {tag}")
    try:
        return read_image(answer.output)
    except ImageFailed as error:
        raise NodeFailed(f"{transport.host}: {error}") from error


def images_on(nodes: Sequence[WorkingNode], tag: str) -> tuple[BuiltImage | None, ...]:
    """The same for every node, in their order. One NodeFailed names every node whose engine does not answer."""
    return each(lambda node: image_on(node.transport, tag), nodes)


def is_everywhere(tag: str, fingerprint: str, nodes: Sequence[WorkingNode]) -> bool:
    """Whether every node has the same image under the tag, built from the plan's files. Then nothing has to be built, sent or asked of
    this machine's engine. Raises NodeFailed."""
    found = images_on(nodes, tag)
    return (
        all(image is not None and image.fingerprint == fingerprint for image in found) and len({image.id for image in found if image}) == 1
    )


def is_same(image: BuiltImage | None, sent: BuiltImage) -> bool:
    """Whether a node's image is the one that was sent: by its id, or by its layers, since two kinds of store give one image two ids. The
    containerd store, the default since Docker 29, uses the digest of the manifest, the older one that of the config (moby,
    daemon/containerd and daemon/images, image_inspect.go)."""
    return image is not None and (image.id == sent.id or (bool(sent.layer_digests) and image.layer_digests == sent.layer_digests))
