"""The errors of the launcher, one class per exit code. They are raised where the cause is known, and printed by `cli.main` alone.

    LaunchError
    +-- ConfigRefused   2   a config, an override or an input that cannot work
    |   +-- RecordRefused   a record that cannot be read, or that changed since it was written
    |   +-- NodesRefused 4  a config in which only the list of nodes is wrong
    +-- ImageFailed     3   rendering, building or fetching an image
    +-- NodeFailed      4   a node that cannot be reached or used
    +-- HubFailed       4   a hub that cannot be reached, or that gives something else than it lists
    +-- RunEnded        5   a run that started and failed

The text of each says what is wrong, where (file and key), what is allowed, and the next command.
"""

from collections.abc import Iterable
from typing import NoReturn

from trainer.contract import Exit

NODES = "cluster.nodes"  # the section that lists them


class LaunchError(Exception):
    exit_code = Exit.BUG


class ConfigRefused(LaunchError):
    exit_code = Exit.USAGE


class RecordRefused(ConfigRefused):
    """Exit code 2, like every input that cannot be used."""


class NodesRefused(ConfigRefused):
    exit_code = Exit.NODE


class ImageFailed(LaunchError):
    exit_code = Exit.IMAGE


class NodeFailed(LaunchError):
    exit_code = Exit.NODE


class HubFailed(LaunchError):
    exit_code = Exit.NODE


class RunEnded(LaunchError):
    exit_code = Exit.RUN


def refuse_config(text: str, keys: Iterable[str]) -> NoReturn:
    """Raises ConfigRefused; NodesRefused where all wrong `keys` belong to cluster.nodes, so that a script gets the exit code of a bad node
    whether the file or the node itself is wrong."""
    raise (NodesRefused if all(key.startswith(NODES) for key in keys) else ConfigRefused)(text)


def suggest(word: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid are: x, y` for a word that is not in `valid`."""
    from difflib import get_close_matches  # only errors need it

    names = sorted(valid)
    close = get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid are: {', '.join(names)}"
