"""Which text holds a credential, and that text without it: what is printed or written to a run's folder shows none."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from launcher.config.schema import Delivery
from launcher.errors import ConfigRefused

MASK = "***"
# Greedy up to the last @ before the path: a password may hold an @ of its own.
USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
SECRET_WORDS = ("TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET")
VARIABLE = "OMNILAUNCH_DELIVERY_{name}"  # gives a run that is taken up again an address of cluster.delivery whole
PLACE_WORDS = ("FILE", "PATH", "DIR")  # SSL_KEY_FILE says where a key lies


def mask_credentials(value: Any) -> Any:
    """JSON data with `https://user:password@host` written as `https://***@host` wherever it stands; tuples become lists."""
    if isinstance(value, str):
        return USER_INFO.sub(f"{MASK}@", value) if "://" in value else value
    if isinstance(value, dict):
        return {key: mask_credentials(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_credentials(item) for item in value]
    return value


def holds_credentials(text: str) -> bool:
    """Whether a URL in the text names a user, or once did: a masked one counts."""
    return mask_credentials(text) != text or is_masked(text)


def is_masked(text: str) -> bool:
    return f"://{MASK}@" in text


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable's name says that its value is a secret. By its words: NCCL_IB_PKEY is a partition, TOKENIZERS_PARALLELISM
    no token."""
    words = variable.upper().split("_")
    if words[-1] in PLACE_WORDS:
        return False
    return any(word.removesuffix("S").endswith(SECRET_WORDS) or word in ("KEY", "KEYS", "APIKEY") for word in words)


# ------------------------------------------------------------------------------------------------------ addresses of a run that is there


def masked_fields(delivery: Delivery) -> dict[str, str]:
    """Field of cluster.delivery -> its address, of those that lack their credentials."""
    values = {field.name: getattr(delivery, field.name) for field in fields(delivery)}
    return {name: value for name, value in values.items() if isinstance(value, str) and is_masked(value)}


def without_masked(delivery: Delivery) -> Delivery:
    return replace(delivery, **dict.fromkeys(masked_fields(delivery), ""))  # type: ignore[arg-type]  # all of them are texts


def masked_addresses(delivery: Delivery) -> str:
    """What to set, a line each; '' when nothing is missing."""
    missing = masked_fields(delivery).items()
    return "\n".join(f"  export {VARIABLE.format(name=name.upper())}={value.replace(MASK, 'USER:PASSWORD')}" for name, value in missing)


def give_credentials(delivery: Delivery, environ: Mapping[str, str]) -> Delivery:
    """The addresses whole that the environment gives. Raises ConfigRefused for one that is not the recorded one."""
    given = {name: environ[variable] for name in masked_fields(delivery) if (variable := VARIABLE.format(name=name.upper())) in environ}
    for name, value in given.items():
        if mask_credentials(value) != getattr(delivery, name):
            raise ConfigRefused(
                f"{VARIABLE.format(name=name.upper())} is another address than the run's, {getattr(delivery, name)}: "
                "give that one, with its user and password in the place of ***, or unset the variable"
            )
    return replace(delivery, **given)  # type: ignore[arg-type]  # all of them are texts
