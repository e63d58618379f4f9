"""cluster.delivery.kind=build_on_nodes: every node that lacks the image builds it, from the same Dockerfile and context, which are sent to all
of them at the same time. For a link that is too slow for an image, and for a machine without an engine or of another architecture.

Two builds of one context have different ids (file times, a base that is not pinned). So the fingerprint of everything that went into the
build is compared, which every image carries as a label. Index, CA bundle and proxy are sent as files that only the building user may
read; they are removed when the build ends.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed, NodeFailed
from launcher.image.build import advice_on, build_command, fill_context, only_builder, refuse_unready, source_commit, write_secrets
from launcher.image.stack import Image
from launcher.run.delivery.broadcast import send
from launcher.run.delivery.node_image import images_on
from launcher.run.delivery.script import read_script
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import together
from launcher.ssh.transport import Transport

SECRETS = "secrets"
PROXY = "proxy"  # both names are those of node_scripts/build_image.sh
# An address that would be another machine on every node.
LOOPBACK = re.compile(r"^(file:|[\w+]+://([^/@]*@)?(localhost|127\.[\d.]+|\[::1\])([:/]|$))")


def build_on(
    image: Image,
    nodes: Sequence[WorkingNode],
    *,
    project: Path,
    root: str,
    delivery: Delivery,
    source: Transport,
    say: Callable[[str], None],
) -> None:
    """Build the image on every node that lacks it. `root`: cluster.root, where the build context lies during the build. Raises ImageFailed
    for an image that cannot be built this way, NodeFailed with the last lines of every node whose build failed."""
    lacking = nodes_without(image, nodes)
    if not lacking:
        return
    refuse_unready(image, delivery)
    refuse_unsendable(delivery)
    hosts = ", ".join(node.command.host for node in lacking)
    say(f"building {image.tag} on {hosts}, from {image.base}; a first build takes minutes")
    with ExitStack() as stack:
        stack.enter_context(only_builder(project, image, say))
        context = fill_context(image, project, delivery)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnilaunch-")))
        secrets = gather_secrets(delivery, folder)
        command = build_command("docker", image, Path(context.name), secrets, source_commit(project), delivery=delivery, fresh=False)
        save = ("tar", "-C", str(context.parent), "-cf", "-", context.name, "-C", str(folder), SECRETS)
        load = ("sh", "-c", read_script("build_image.sh"), "sh", root, *command[1:])
        answers = send(save, load, lacking, source, say, what=f"the context of {image.tag}, and building it,")
    if failures := [with_advice(answer) for answer in answers if answer]:
        raise together(failures, len(lacking))
    if wrong := ", ".join(node.command.host for node in nodes_without(image, lacking)):
        raise NodeFailed(f"after building, {wrong} does not have {image.tag} with fingerprint {image.fingerprint[:12]}")
    say(f"built on {hosts}: one fingerprint, {image.fingerprint[:12]}; the ids may differ between nodes")


def nodes_without(image: Image, nodes: Sequence[WorkingNode]) -> list[WorkingNode]:
    found = images_on(nodes, image.tag)
    return [node for node, built in zip(nodes, found, strict=True) if built is None or built.fingerprint != image.fingerprint]


def refuse_unsendable(delivery: Delivery) -> None:
    """Wheels and the CA bundle are sent with the context; an address of this machine cannot be."""
    for key in ("index", "extra_index", "find_links", "proxy"):
        value = getattr(delivery, key)
        if LOOPBACK.match(value):
            raise ImageFailed(
                f"cluster.delivery.{key} is an address of this machine, which means the node itself on a node. Use the host name at which the "
                "nodes reach it, a folder with wheels (cluster.delivery.wheelhouse=FOLDER, which is sent), or cluster.delivery.kind=build"
            )


def gather_secrets(delivery: Delivery, folder: Path) -> dict[str, Path]:
    """Everything that must stay out of argv and layers, as files of `folder`/secrets; secret id -> its path relative to `folder`. The proxy
    is not one of the build's secrets; build_image.sh reads it."""
    secrets = folder / SECRETS
    secrets.mkdir(mode=0o700)
    found = write_secrets(delivery, secrets)
    for name, path in found.items():
        if path.parent != secrets:
            shutil.copyfile(path, secrets / name)
            found[name] = secrets / name
    if delivery.proxy:
        (secrets / PROXY).touch(mode=0o600)
        (secrets / PROXY).write_text(delivery.proxy, encoding="utf-8")
    return {name: path.relative_to(folder) for name, path in found.items()}


def with_advice(failure: NodeFailed) -> NodeFailed:
    advice = advice_on(str(failure))
    return NodeFailed(f"{failure}\n  what to do: {advice}") if advice else failure
