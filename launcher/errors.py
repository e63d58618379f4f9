"""What can go wrong, one class per exit code. Raised where it is known, printed by `cli.main` alone.

    LaunchError
    +-- ConfigRefused   2   a config, an override or an input that cannot work
    |   +-- RecordRefused   a run's record that cannot be read, or is not as it was written
    +-- ImageFailed     3   rendering, building or fetching an image
    |   +-- NodesRefused 4  the same, where nothing but the list of nodes is wrong
    +-- NodeFailed      4   a node that cannot be reached or used
    +-- RunEnded        5   a run that started and failed

The text of each says what, where (file and key), what is allowed, and the next command.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from trainer.contract import Exit

NODES = "cluster.nodes"  # the section that lists them


class LaunchError(Exception):
    exit_code = Exit.BUG


class ConfigRefused(LaunchError):
    exit_code = Exit.USAGE


class RecordRefused(ConfigRefused):
    """Exit code 2, as every input that cannot be used."""


class NodesRefused(ConfigRefused):
    exit_code = Exit.NODE


class ImageFailed(LaunchError):
    exit_code = Exit.IMAGE


class NodeFailed(LaunchError):
    exit_code = Exit.NODE


class RunEnded(LaunchError):
    exit_code = Exit.RUN


def refuse_config(text: str, keys: Iterable[str]) -> NoReturn:
    """Raises ConfigRefused, as NodesRefused where all the `keys` that are wrong are of cluster.nodes: to whoever starts runs by a script
    that is a bad node, whether the file or the host itself tells it."""
    raise (NodesRefused if all(key.startswith(NODES) for key in keys) else ConfigRefused)(text)


def suggest(word: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid are: x, y` for a word that is not in `valid`."""
    names = sorted(valid)
    close = get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid are: {', '.join(names)}"
