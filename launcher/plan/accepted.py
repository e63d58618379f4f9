"""Whether the licence of a plan's image was accepted: by an override, or by this user before."""

from collections.abc import Mapping
from dataclasses import replace

from launcher.config.schema import Config
from launcher.image.licence import OVERRIDE, AcceptedLicence, licence_of
from launcher.image.stack import Stack


def take_licence(config: Config, stacks: Mapping[str, Stack], accepted: Mapping[str, str]) -> tuple[Config, AcceptedLicence | None]:
    """The config with `accept_licence` set where the user accepted the licence of the image before, and how it was accepted."""
    stack, delivery = stacks.get(config.hardware.stack), config.cluster.delivery
    if not (stack and stack.licence and config.cluster.runtime == "docker"):
        return config, None
    licence = licence_of(stack.licence)
    name, sha256 = (licence.name, licence.sha256) if licence else (stack.licence, "")
    if delivery.accept_licence:
        return config, AcceptedLicence(name=name, sha256=sha256, how=OVERRIDE)
    if sha256 not in accepted:
        return config, None
    cluster = replace(config.cluster, delivery=replace(delivery, accept_licence=True))
    how = f"omnilaunch licence accept {name}"
    return replace(config, cluster=cluster), AcceptedLicence(name=name, sha256=sha256, how=how, accepted_at=accepted[sha256])
