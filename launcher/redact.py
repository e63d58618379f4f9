"""Which text and which variable holds a credential. What is printed, or written to a run's folder, shows none."""

import re
from typing import Any

from trainer.contract.secret_name import names_a_secret as names_a_secret  # here too, for the launcher

MASK = "***"
# Greedy up to the last @ before the path: a password may contain an @ itself.
USER_INFO = re.compile(r"(?<=://)[^/\s]*@")


def mask_credentials(value: Any) -> Any:
    """JSON data with `https://user:password@host` replaced by `https://***@host` everywhere; tuples become lists."""
    if isinstance(value, str):
        return USER_INFO.sub(f"{MASK}@", value) if "://" in value else value
    if isinstance(value, dict):
        return {key: mask_credentials(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_credentials(item) for item in value]
    return value


def holds_credentials(text: str) -> bool:
    """Whether a URL in the text names a user, or did before it was masked."""
    return mask_credentials(text) != text or is_masked(text)


def is_masked(text: str) -> bool:
    return f"://{MASK}@" in text
