"""`omnilaunch image ACTION`: what each action does, told as its story. Imported by every command, so it imports late itself."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.schema import Config
    from launcher.image.docker import BuiltImage
    from launcher.image.stack import Image, Stack

PROJECT = Path(__file__).resolve().parents[2]


def add_to(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, (verb, text) in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in ("build", "inspect", "fetch"):
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for plan: hardware=h200 cluster=lab")
            sub.add_argument("--architecture", default="", help="of the nodes: x86_64 or aarch64; the cluster's own when left out")
        if name == "build":
            sub.add_argument("--fresh", action="store_true", help="take nothing over from earlier builds")
        if name == "fetch":
            sub.add_argument("--to", default="", metavar="FOLDER", help="the wheelhouse; wheelhouse/<stack>-<architecture> when left out")
        if name == "prune":
            sub.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
        if name == "refresh":
            sub.add_argument("stacks", nargs="*", metavar="STACK", help="rows of images/versions.yaml; all when left out")
            sub.add_argument("--upgrade", action="store_true", help="newest versions instead of the locked ones where both agree")
        sub.set_defaults(verb=verb)


def chosen(arguments: argparse.Namespace) -> "tuple[Config, Stack, str]":
    """What the overrides choose, and the architecture of the nodes."""
    from launcher.config.compose import compose
    from launcher.image.stack import find_stack, load_stacks

    config = compose(arguments.overrides, PROJECT / "conf")
    architecture = arguments.architecture or config.cluster.nodes[0].architecture
    return config, find_stack(load_stacks(PROJECT / "images"), config.hardware.stack), architecture


def matching(arguments: argparse.Namespace) -> "tuple[Config, Image]":
    from launcher.image.stack import render

    config, stack, architecture = chosen(arguments)
    return config, render(stack, architecture=architecture, root=PROJECT, base=config.cluster.delivery.base)


def say(text: str) -> None:
    print(text, flush=True)


def render_images(arguments: argparse.Namespace) -> int:
    from launcher.image.docs import write_rendered

    for path in write_rendered(PROJECT):
        print(path.relative_to(PROJECT))
    return Exit.OK


def refresh_locks(arguments: argparse.Namespace) -> int:
    from launcher.image.docs import write_rendered
    from launcher.image.refresh import refresh

    for path in (*refresh(PROJECT, stacks=tuple(arguments.stacks), say=say, upgrade=arguments.upgrade), *write_rendered(PROJECT)):
        print(path.relative_to(PROJECT))
    return Exit.OK


def build_image(arguments: argparse.Namespace) -> int:
    from launcher.image.build import build

    config, image = matching(arguments)
    print(build(image, root=PROJECT, delivery=config.cluster.delivery, on_line=say, fresh=arguments.fresh))
    return Exit.OK


def list_images(arguments: argparse.Namespace) -> int:
    from launcher.commands.image_description import describe_images
    from launcher.image.docker import built_images

    print(describe_images(built_images()))
    return Exit.OK


def inspect_image(arguments: argparse.Namespace) -> int:
    from launcher.commands.image_description import describe_image, describe_unbuilt
    from launcher.image.docker import find, inspect

    _, image = matching(arguments)
    print(describe_image(inspect(image.tag)) if find(image) else describe_unbuilt(image))
    return Exit.OK


def prune_images(arguments: argparse.Namespace) -> int:
    """Images that no container uses, that no record names and that the present tree would not build."""
    from launcher.commands.image_description import describe_images
    from launcher.image.docker import built_images, remove, surplus, used_images
    from launcher.record.record import recorded_images

    images = built_images()
    present = {image.name for image in images if is_present(image)}
    found = surplus(images, wanted=frozenset(recorded_images(Path.cwd() / "runs") | present), used=used_images())
    if not found:
        print("nothing to remove: every image is wanted by the present tree, a record of this folder or a container")
    elif not arguments.yes:
        print(f"{describe_images(found)}\nNothing was removed. To remove these {len(found)}: omnilaunch image prune --yes")
    else:
        for image in found:
            remove(image)
            print(f"removed {image.name}")
    return Exit.OK


def is_present(image: "BuiltImage") -> bool:
    """Whether the tree as it is now would build this very image, from the base that it was built from."""
    from launcher.image.stack import LABEL, load_stacks, render

    stack = load_stacks(PROJECT / "images").get(image.labels.get(f"{LABEL}stack", ""))
    if stack is None or image.architecture not in stack.locks:
        return False
    now = render(stack, architecture=image.architecture, root=PROJECT, base=image.labels.get(f"{LABEL}base", ""))
    return image.labels[f"{LABEL}fingerprint"] == now.fingerprint


def fetch_image(arguments: argparse.Namespace) -> int:
    """Fill a wheelhouse: wheels first, then system packages where this machine's engine can have them, the list last."""
    from launcher.errors import ImageFailed
    from launcher.image.build import fetch_system
    from launcher.image.stack import pinned
    from launcher.image.wheelhouse import fetch_wheels, write_manifest

    config, stack, architecture = chosen(arguments)
    delivery, folder = config.cluster.delivery, Path(arguments.to or f"wheelhouse/{stack.name}-{architecture}").resolve()
    fetch_wheels(stack, architecture=architecture, root=PROJECT, folder=folder, environ=os.environ, delivery=delivery, say=say)
    try:
        fetch_system(stack, architecture=architecture, root=PROJECT, folder=folder, delivery=delivery, on_line=say)
    except ImageFailed as error:
        say(f"without system packages: {error}")
    print(
        f"{write_manifest(folder, stack, architecture)}\nBesides the folder the site needs the base image: {delivery.base or pinned(stack)}"
    )
    print(f"Build there, with the network off: omnilaunch image build hardware={config.hardware.name} cluster.delivery.wheelhouse=FOLDER")
    return Exit.OK


ACTIONS = {
    "render": (render_images, "write images/rendered/ and docs/images.md from images/versions.yaml"),
    "refresh": (refresh_locks, "resolve the locks again and look up the bases' digests (needs the network)"),
    "build": (build_image, "build the image of a hardware, unless the engine has it"),
    "ls": (list_images, "the images of this engine"),
    "inspect": (inspect_image, "what is in the image of a hardware"),
    "prune": (prune_images, "remove images that nothing asks for any more"),
    "fetch": (fetch_image, "fill a wheelhouse for a site without a network"),
}
