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
# Of a typing error: how near a name must be, and how much nearer than others to be the only one that is offered (ratios of difflib).
LEAST_RATIO, CLOSE, MOST_NEAR = 0.7, 0.03, 3
SHORTEST = 3  # letters of the beginning of a name
DESTRUCTIVE, DESTRUCTIVE_RATIO = ("stop", "prune"), 0.85


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
    names = sorted(valid)
    near = find_near(word, names)
    hint = f"did you mean {join_or(map(repr, near))}? " if near else ""
    return f"{hint}valid are: {', '.join(names)}"


def find_near(word: str, names: Iterable[str], *, least: float = LEAST_RATIO) -> tuple[str, ...]:
    """The names that `word` may be a typing error of, at most three: those that differ in case and separators alone, else those that
    begin so, else those with the same letters, else those that are nearly as near as the nearest. A number is never a typing error: 72b
    is another model than 7b, and a p40 another card than a p4."""
    from difflib import SequenceMatcher  # only errors need it

    known = tuple(names)
    if same := [name for name in known if plain(name) == plain(word)]:
        return tuple(same[:MOST_NEAR])
    begun = [name for name in known if len(plain(word)) >= SHORTEST and plain(name).startswith(plain(word))]
    if 0 < len(begun) <= MOST_NEAR:
        return tuple(sorted(begun))
    if swapped := [name for name in known if sorted(plain(name)) == sorted(plain(word)) and name[:1] == word[:1].lower()]:
        return tuple(swapped[:MOST_NEAR])
    alike = (name for name in known if digits(name) == digits(word) and may_be_near(word.lower(), name.lower(), least))
    ratios = {name: SequenceMatcher(None, word.lower(), name.lower()).ratio() for name in alike}
    nearest = max(ratios.values(), default=0.0)
    near = sorted(name for name, ratio in ratios.items() if ratio >= max(least, nearest - CLOSE, needed(name)))
    return tuple(near) if len(near) <= MOST_NEAR else ()


def may_be_near(word: str, name: str, least: float) -> bool:
    """Whether their letters allow such a ratio, whatever their order: it saves comparing most names."""
    if 2 * min(len(word), len(name)) < least * (len(word) + len(name)):
        return False
    common = sum(min(word.count(letter), name.count(letter)) for letter in set(word))
    return 2 * common >= least * (len(word) + len(name))


def needed(name: str) -> float:
    """A verb that ends something is offered for a word that can hardly mean anything else: `step` is not `stop`."""
    return DESTRUCTIVE_RATIO if name in DESTRUCTIVE else 0.0


def plain(text: str) -> str:
    """Lower case, letters and digits only."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def digits(text: str) -> str:
    return "".join(letter for letter in text if letter.isdigit())


def join_or(names: Iterable[str]) -> str:
    """a, b or c"""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
