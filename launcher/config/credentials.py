"""The addresses of cluster.delivery, which are recorded without their credentials, and how the environment gives these back."""

from collections.abc import Mapping
from dataclasses import fields, replace

from launcher.config.schema import Delivery
from launcher.errors import ConfigRefused
from launcher.redact import MASK, is_masked, mask_credentials

VARIABLE = "OMNILAUNCH_DELIVERY_{name}"  # holds a complete address of cluster.delivery, for a run that is attached to or run again


def masked_fields(delivery: Delivery) -> dict[str, str]:
    """Field of cluster.delivery -> its address, of those without their credentials."""
    values = {field.name: getattr(delivery, field.name) for field in fields(delivery)}
    return {name: value for name, value in values.items() if isinstance(value, str) and is_masked(value)}


def without_masked(delivery: Delivery) -> Delivery:
    return replace(delivery, **dict.fromkeys(masked_fields(delivery), ""))  # type: ignore[arg-type]  # all of them are texts


def masked_addresses(delivery: Delivery) -> str:
    """The variables to set, one per line; '' when nothing is missing."""
    missing = masked_fields(delivery).items()
    return "\n".join(f"  export {VARIABLE.format(name=name.upper())}={value.replace(MASK, 'USER:PASSWORD')}" for name, value in missing)


def give_credentials(delivery: Delivery, environ: Mapping[str, str]) -> Delivery:
    """With the complete addresses that the environment gives. Raises ConfigRefused for one that differs from the recorded one."""
    given = {name: environ[variable] for name in masked_fields(delivery) if (variable := VARIABLE.format(name=name.upper())) in environ}
    for name, value in given.items():
        if mask_credentials(value) != getattr(delivery, name):
            raise ConfigRefused(
                f"{VARIABLE.format(name=name.upper())} is another address than the run's, {getattr(delivery, name)}: "
                "set it to that address, with its user and password in place of ***, or unset the variable"
            )
    return replace(delivery, **given)  # type: ignore[arg-type]  # all of them are texts
