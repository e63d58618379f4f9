"""`omnilaunch image ACTION`: build, inspect, list and remove the images, and resolve what they are built from."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.plan import PROJECT, add_overrides, conf_of
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.config.schema import Config
    from launcher.image.docker import BuiltImage
    from launcher.image.stack import Image, Stack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, (action, text) in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in ("build", "inspect", "fetch"):
            add_overrides(sub, "as for plan: hardware=h200 cluster=lab")
            sub.add_argument("--architecture", default="", help="of the nodes: x86_64 or aarch64; as in the cluster file when omitted")
        if name == "build":
            sub.add_argument("--fresh", action="store_true", help="build without the cache of earlier builds")
        if name == "fetch":
            sub.add_argument("--to", default="", metavar="FOLDER", help="the wheelhouse; wheelhouse/<stack>-<architecture> when omitted")
        if name == "prune":
            sub.add_argument("--yes", action="store_true", help="remove them; otherwise they are only listed")
        if name == "refresh":
            sub.add_argument("stacks", nargs="*", metavar="STACK", help="rows of images/versions.yaml; all when omitted")
            sub.add_argument("--upgrade", action="store_true", help="take the newest allowed versions instead of the locked ones")
        sub.set_defaults(action=action, parser=sub)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.action(arguments))


def select(arguments: argparse.Namespace) -> "tuple[Config, Stack, str]":
    """The config that the overrides name, for a run in its image; its stack, and the architecture of the nodes."""
    from dataclasses import replace

    from launcher.config.compose import compose
    from launcher.image.stack import find_stack, load_stacks
    from launcher.plan.local_context import for_this_machine

    config = compose(arguments.overrides, conf_of(arguments))
    config = for_this_machine(replace(config, cluster=replace(config.cluster, runtime="docker")), arguments.overrides)
    architecture = arguments.architecture or config.cluster.nodes[0].architecture
    return config, find_stack(load_stacks(PROJECT / "images"), config.hardware.stack), architecture


def render_selected(arguments: argparse.Namespace) -> "tuple[Config, Image]":
    from launcher.image.stack import render
    from launcher.plan.accepted import take_licence
    from launcher.plan.local_context import find_acceptance

    config, stack, architecture = select(arguments)
    config, _ = take_licence(config, {stack.name: stack}, find_acceptance(config, {stack.name: stack}, os.environ))
    return config, render(stack, architecture=architecture, root=PROJECT, base=config.cluster.delivery.base)


def render_images(arguments: argparse.Namespace) -> int:
    from launcher.image.docs import write_rendered

    for path in write_rendered(PROJECT):
        arguments.say(str(path.relative_to(PROJECT)))
    return Exit.OK


def refresh_locks(arguments: argparse.Namespace) -> int:
    from launcher.image.docs import write_rendered
    from launcher.image.refresh import refresh

    for path in (*refresh(PROJECT, stacks=tuple(arguments.stacks), say=arguments.say, upgrade=arguments.upgrade), *write_rendered(PROJECT)):
        arguments.say(str(path.relative_to(PROJECT)))
    return Exit.OK


def build_image(arguments: argparse.Namespace) -> int:
    from launcher.image.build import build

    config, image = render_selected(arguments)
    arguments.say(build(image, root=PROJECT, delivery=config.cluster.delivery, on_line=arguments.say, fresh=arguments.fresh))
    return Exit.OK


def list_images(arguments: argparse.Namespace) -> int:
    from launcher.commands.image_description import describe_images
    from launcher.image.docker import built_images

    arguments.say(describe_images(built_images()))
    return Exit.OK


def inspect_image(arguments: argparse.Namespace) -> int:
    from launcher.commands.image_description import describe_image, describe_unbuilt
    from launcher.image.docker import find, inspect

    _, image = render_selected(arguments)
    arguments.say(describe_image(inspect(image.tag)) if find(image) else describe_unbuilt(image))
    return Exit.OK


def prune_images(arguments: argparse.Namespace) -> int:
    """Remove images that are used by no container, named by no record, and not built by the present tree."""
    from launcher.commands.image_description import describe_images
    from launcher.image.docker import built_images, remove, surplus, used_images
    from launcher.record.record import recorded_images

    images = built_images()
    present = {image.name for image in images if is_present(image)}
    found = surplus(images, wanted=frozenset(recorded_images(Path.cwd() / "runs") | present), used=used_images())
    if not found:
        arguments.say("nothing to remove: every image is needed by the present tree, by a record of this folder or by a container")
    elif not arguments.yes:
        arguments.say(f"{describe_images(found)}\nNothing was removed. To remove these {len(found)} images: omnilaunch image prune --yes")
    else:
        for image in found:
            remove(image)
            arguments.say(f"removed {image.name}")
    return Exit.OK


def is_present(image: "BuiltImage") -> bool:
    """Whether the present tree would build exactly this image, from the base that it was built from."""
    from launcher.image.stack import LABEL, load_stacks, render

    stack = load_stacks(PROJECT / "images").get(image.labels.get(f"{LABEL}stack", ""))
    if stack is None or image.architecture not in stack.locks:
        return False
    now = render(stack, architecture=image.architecture, root=PROJECT, base=image.labels.get(f"{LABEL}base", ""))
    return image.labels[f"{LABEL}fingerprint"] == now.fingerprint


def fetch_image(arguments: argparse.Namespace) -> int:
    """Fill a wheelhouse: wheels, then system packages where this machine has a Docker engine, then the manifest."""
    from launcher.errors import ImageFailed
    from launcher.image.build import fetch_system
    from launcher.image.stack import pinned
    from launcher.image.wheelhouse import fetch_wheels, write_manifest

    config, stack, architecture = select(arguments)
    delivery, folder = config.cluster.delivery, Path(arguments.to or f"wheelhouse/{stack.name}-{architecture}").resolve()
    fetch_wheels(stack, architecture=architecture, root=PROJECT, folder=folder, environ=os.environ, delivery=delivery, say=arguments.say)
    try:
        fetch_system(stack, architecture=architecture, root=PROJECT, folder=folder, delivery=delivery, on_line=arguments.say)
    except ImageFailed as error:
        arguments.say(f"without system packages: {error}")
    arguments.say(str(write_manifest(folder, stack, architecture)))
    arguments.say(f"The site also needs the base image: {delivery.base or pinned(stack)}")
    arguments.say(
        f"To build there, without a network: omnilaunch image build hardware={config.hardware.name} cluster.delivery.wheelhouse=FOLDER"
    )
    return Exit.OK


ACTIONS = {
    "render": (render_images, "write images/rendered/ and docs/images.md from images/versions.yaml"),
    "refresh": (refresh_locks, "resolve the locks and the digests of the base images again (needs a network)"),
    "build": (build_image, "build the image of a hardware, unless the engine has it already"),
    "ls": (list_images, "list the images of this engine"),
    "inspect": (inspect_image, "show what the image of a hardware contains"),
    "prune": (prune_images, "remove images that are no longer needed"),
    "fetch": (fetch_image, "fill a wheelhouse for a site without a network"),
}
