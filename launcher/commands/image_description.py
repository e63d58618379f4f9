"""Built images, and one that is not built, as text for a person."""

from launcher.image.docker import BuiltImage
from launcher.image.stack import LABEL, Image
from launcher.plan.text import program, table

OPEN_LABEL = "org.opencontainers.image."


def describe_images(images: tuple[BuiltImage, ...]) -> str:
    """One line an image, newest first."""
    lines = [f"{image.name:40} {image.size_bytes / 1e9:6.2f} GB  {image.architecture:8} {image.created}" for image in images]
    return "\n".join(lines) or "no images of omnilaunch in this engine; build one with: omnilaunch image build hardware=cpu"


def describe_image(image: BuiltImage) -> str:
    """What is in a built image: its labels, and its layers from the last to the first."""
    rows = {"image": image.name, "id": image.id, "built": image.created, "for": image.architecture}
    rows |= {"runs as": image.user or "root", "size": f"{image.size_bytes / 1e9:.2f} GB"}
    labels = {name.removeprefix(LABEL).removeprefix(OPEN_LABEL): value for name, value in sorted(image.labels.items()) if value}
    layers = [f"{size / 1e6:9.1f} MB  {command[:100]}" for size, command in image.layers if size]
    return "\n".join((table(rows | labels), "", "layers, last first", *layers))


def describe_unbuilt(image: Image) -> str:
    rows = {"image": image.tag, "built": "no", "from": image.base, "lock": image.lock or "none yet for this architecture"}
    return table(rows | {"next": f"{program()} image build with the same overrides"})
