"""What is printed shows no credential, and gives a terminal no commands. Nor does what is written to a run's folder hold a credential."""

import re
from typing import Any, TextIO

from trainer.contract.secret_name import names_a_secret as names_a_secret  # here too, for the launcher

MASK = "***"
# Greedy up to the last @ before the path: a password may contain an @ itself.
USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
COLOUR = r"\033\[(?:[0-4]|[39][0-7])?(?:;(?:[0-4]|[39][0-7])){0,3}m"  # harmless; code 8, which hides text, is not among them
# Control characters other than line breaks and tabs, those that turn the direction of the text, and bytes that are not UTF-8.
COMMANDS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
COMMAND, COLOUR_OR_COMMAND = re.compile(f"(){COMMANDS}"), re.compile(f"({COLOUR})|{COMMANDS}")


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


def printable(text: str) -> str:
    """One line of a text that another one wrote, such as the name of a file or of a run: line breaks, control characters and bytes that are
    not UTF-8 are written as escapes."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def for_terminal(text: str) -> str:
    """Lines as they are printed: what a terminal would take as a command is written as an escape, which is also one of JSON. Colours stay."""
    return COLOUR_OR_COMMAND.sub(escape, text)


def for_file(text: str) -> str:
    """The same for a file, which a terminal may show later: colours are escapes too."""
    return COMMAND.sub(escape, text)


def escape(found: re.Match[str]) -> str:
    return found[1] or f"\\u{ord(found[0]):04x}"


def show(text: str = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """`print` for the terminal, as `for_terminal` writes it."""
    print(for_terminal(text), end=end, file=file, flush=True)
