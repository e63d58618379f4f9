"""cluster.delivery.kind=pull: every node takes the image from a registry, and afterwards all must have the same one."""

from collections.abc import Callable, Sequence

from launcher.errors import NodeFailed
from launcher.image.docker import BuiltImage
from launcher.run.delivery.broadcast import LIMIT_S
from launcher.run.delivery.node_image import images_on
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each


def pull(tag: str, registry: str, nodes: Sequence[WorkingNode], say: Callable[[str], None], *, fingerprint: str) -> None:
    """Pull the image on every node that lacks `tag`, and tag it. Raises NodeFailed, naming the nodes whose image was not built from
    the plan's files or differs from that of the other nodes."""
    lacking = [node for node, image in zip(nodes, images_on(nodes, tag), strict=True) if image is None]
    reference = f"{registry.rstrip('/')}/{tag}"

    def pull_on(node: WorkingNode) -> None:
        run, host = node.transport.run, node.command.host
        run(("docker", "pull", "--quiet", reference), timeout_s=LIMIT_S).expect(f"{host}: pulling {reference}")
        run(("docker", "tag", reference, tag)).expect(f"{host}: tagging {reference}")

    if lacking:
        say(f"pulling {reference} on {', '.join(node.command.host for node in lacking)}")
        each(pull_on, lacking)
    require_same(tag, reference, fingerprint, nodes)


def require_same(tag: str, reference: str, fingerprint: str, nodes: Sequence[WorkingNode]) -> None:
    """A tag can be pushed again between two pulls."""
    fix = f"docker image rm {tag} {reference} there, and launch again"
    pulled = dict(zip((node.command.host for node in nodes), images_on(nodes, tag), strict=True))
    images = {host: image for host, image in pulled.items() if image is not None}
    if absent := pulled.keys() - images.keys():
        raise NodeFailed(f"{', '.join(sorted(absent))}: {tag} was removed after it was pulled; launch again")
    if wrong := [host for host, image in images.items() if image.fingerprint != fingerprint]:
        raise NodeFailed(f"{', '.join(wrong)}: {tag} is not the plan's image (fingerprint {fingerprint[:12]}): push that one; {fix}")
    repository = reference.rpartition(":")[0]
    usual = max(images.values(), key=lambda image: sum(is_same_pull(image, other, repository) for other in images.values()))
    if other := [f"{host} ({image.id[:19]})" for host, image in images.items() if not is_same_pull(image, usual, repository)]:
        raise NodeFailed(f"{', '.join(other)} pulled another {reference} than the rest, which have {usual.id[:19]}: {fix}")


def is_same_pull(one: BuiltImage, other: BuiltImage, repository: str) -> bool:
    """By the id; or by the digest in the registry, since two kinds of store give one image two ids (see node_image.is_same)."""
    digests = {digest for digest in one.registry_digests if digest.startswith(f"{repository}@")}
    return one.id == other.id or not digests.isdisjoint(other.registry_digests)
