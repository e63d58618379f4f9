"""Lists that may be long, as text: the first entries, and how many more there are."""

from collections.abc import Mapping, Sequence

MOST_FILES = 10  # changed files in a message


def list_some(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b and 3 more`"""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{separator.join(names[:most])}{more}"


def keep_some(lines: Sequence[str], most: int) -> tuple[str, ...]:
    """The first `most` lines, and `and 3 more` as a line of its own."""
    return (*lines[:most], *((f"and {len(lines) - most:,} more",) if len(lines) > most else ()))


def describe_changes(expected: Mapping[str, str], found: Mapping[str, str], most: int = MOST_FILES) -> tuple[str, ...]:
    """A line for each file whose hash is another one, and for each that is missing or new. Both: name -> hash."""
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    lines = [f"{name}: {'missing' if name not in found else 'new' if name not in expected else 'another file'}" for name in names]
    return keep_some(lines, most)
