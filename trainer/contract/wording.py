"""Words of texts that people read, for launcher and trainer."""

import re

LONG_WORD = re.compile(r"\S{300,}")  # characters: a path has fewer, base64 and a table without spaces more
MOST_CHARACTERS = 3000


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `1,500 rows`. `noun`: in the singular, of which the plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shorten_values(text: str) -> str:
    """A message about data with its longest words, and what is longer than MOST_CHARACTERS, cut: 40 images as base64 are 3 MB."""
    found = LONG_WORD.sub(lambda match: f"{match[0][:60]}… ({len(match[0]):,} characters) …{match[0][-20:]}", text)
    return found if len(found) <= MOST_CHARACTERS else f"{found[:MOST_CHARACTERS]}… ({len(text):,} characters)"
