"""The names in a folder, kept while the folder is unchanged, to find a file by a name that differs a little."""

import os
import unicodedata
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

KEPT = 256  # folders
MOST_NAMES = 2_000_000  # of one folder; a larger one is not listed
MOST_COMPARED, MOST_HINTS = 2_000, 20  # names that are compared letter by letter, and how often in a folder: it takes milliseconds
NEAR = 0.65  # ratio of difflib


class FolderListing:
    """The names of one folder by their key. `nearest` compares letters only for the first MOST_HINTS names, since each comparison reads all
    names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.hints = names, MOST_HINTS
        self.by_key = group(names, key_of)
        self._by_letters: dict[str, list[str]] | None = None
        self._by_stem: dict[str, list[str]] | None = None

    def like(self, name: str) -> list[str]:
        """The name itself if it is there, else all names that differ only in case and Unicode form."""
        found = self.by_key.get(key_of(name), [])
        return [name] if name in found else found

    def nearest(self, name: str) -> str:
        """The same name with another ending, or with other punctuation, or one with nearly the same letters; '' without one."""
        if self._by_stem is None or self._by_letters is None:
            self._by_stem, self._by_letters = group(self.names, stem_of), group(self.names, letters_of)
        found = self._by_stem.get(stem_of(name)) or (letters_of(name) and self._by_letters.get(letters_of(name)))
        if found:
            return min(found)
        if not self.hints or len(self.names) > MOST_COMPARED:
            return ""
        self.hints -= 1
        near = {stem_of(each): each for each in self.names if digits_of(each) == digits_of(name)}  # 0001.png is not nearly 0002.png
        return next((near[stem] for stem in get_close_matches(stem_of(name), near, 1, NEAR)), "")


def list_folder(folder: Path) -> FolderListing:
    """Empty for a folder that is missing or cannot be read."""
    try:
        stat = folder.stat()
    except (OSError, ValueError):
        return NOTHING
    return read_listing(str(folder), stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=KEPT)
def read_listing(folder: str, changed_ns: int, inode: int) -> FolderListing:
    """`changed_ns`, `inode`: of the folder, so that a changed one is read again."""
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MOST_NAMES:
                    return NOTHING
    except OSError:
        return NOTHING
    return FolderListing(tuple(sorted(names)))


def group(names: tuple[str, ...], key: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def key_of(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def stem_of(name: str) -> str:
    """Without the ending: a.jpg and a.png."""
    stem, dot, _ = key_of(name).rpartition(".")
    return stem if dot else key_of(name)


def letters_of(name: str) -> str:
    """Without spaces and punctuation: my_a.png and my a.png."""
    return "".join(letter for letter in key_of(name) if letter.isalnum())


def digits_of(name: str) -> str:
    return "".join(letter for letter in name if letter.isdigit())


NOTHING = FolderListing(())
