"""Which text holds a credential, and that text without it: what is printed or written to a run's folder shows none."""

import re
from typing import Any

MASK = "***"
# Greedy up to the last @ before the path: a password may hold an @ of its own.
USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
SECRET_WORDS = ("TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET")
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
